"""Runs migrations over a connection, an engine or a URL that the caller hands in."""

import sqlalchemy as sa
from alembic import context


def _migrate(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=context.config.attributes.get("target_metadata"),
        render_as_batch=True,
        compare_type=True,
        # SQLite can undo DDL too, once the driver starts no transactions of its own.
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _run() -> None:
    given = context.config.attributes.get("connection")
    if isinstance(given, sa.Connection):
        _migrate(given)
        return
    engine = given if isinstance(given, sa.Engine) else None
    if engine is None:
        url = context.config.get_main_option("sqlalchemy.url")
        if not url:
            raise RuntimeError("no database was given; run `batchctl db upgrade`")
        engine = sa.create_engine(url)
    with engine.connect() as connection:
        _migrate(connection)
        connection.commit()


_run()
