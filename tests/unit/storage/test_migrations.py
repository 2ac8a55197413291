from collections.abc import Iterator
from pathlib import Path

import alembic.command
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from storage.database import Database, alembic_config, check_schema, open_database, upgrade
from storage.tables import metadata
from tests.conftest import PostgresServer


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        with open_database(f"sqlite:///{tmp_path / 'x.db'}") as db:
            yield db
        return
    server = request.getfixturevalue("postgres_server")
    assert isinstance(server, PostgresServer)
    url = server.create_database(migrated=False)
    with open_database(url) as db:
        yield db
    server.drop_database(url)


def test_there_is_one_history() -> None:
    assert len(ScriptDirectory.from_config(alembic_config()).get_heads()) == 1


def test_the_migrated_tables_are_those_the_code_knows(empty: Database) -> None:
    upgrade(empty)
    with empty.read() as tx:
        context = MigrationContext.configure(
            tx.connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []


def test_partial_indexes_and_fill_factors_are_the_same_by_both_ways(empty: Database) -> None:
    upgrade(empty)
    migrated = describe(empty)
    with empty.transaction() as tx:
        for table in (
            *reversed(metadata.sorted_tables),
            sa.Table("alembic_version", sa.MetaData()),
        ):
            tx.execute(sa.schema.DropTable(table))
        metadata.create_all(tx.connection)
    assert describe(empty) == migrated


def describe(db: Database) -> set[str]:
    query = (
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> "
        "'alembic_version' UNION ALL SELECT relname || reloptions::text FROM pg_class "
        "WHERE reloptions IS NOT NULL AND relnamespace = 'public'::regnamespace"
        if db.is_postgres
        else "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    )
    with db.read() as tx:
        return {str(found) for found in tx.execute(sa.text(query)).scalars()}


def test_no_index_contains_what_a_renewal_changes() -> None:
    for table in metadata.tables.values():
        for index in table.indexes:
            assert "lease_expires_at" not in {column.name for column in index.columns}


def test_going_down_and_up_again_leaves_nothing_behind(empty: Database) -> None:
    upgrade(empty)
    config = alembic_config()
    with empty.transaction() as tx:
        config.attributes["connection"] = tx.connection
        alembic.command.downgrade(config, "base")
        assert sa.inspect(tx.connection).get_table_names() == ["alembic_version"]
    upgrade(empty)
    check_schema(empty)


def test_a_plain_engine_or_a_url_may_be_handed_in(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    config = alembic_config()
    config.set_main_option("sqlalchemy.url", url)
    alembic.command.upgrade(config, "head")
    engine = sa.create_engine(url)
    config.attributes["connection"] = engine
    alembic.command.downgrade(config, "base")
    assert sa.inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()
