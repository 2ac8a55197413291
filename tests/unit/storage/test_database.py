import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
import sqlalchemy.exc

from jobs.domain.errors import BatchctlError, Conflict, DatabaseUnavailable
from storage.config import BlobSettings, DatabaseSettings
from storage.database import (
    ERRORS,
    Transaction,
    check_schema,
    open_database,
    upgrade,
    writes,
)
from storage.tables import files


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "is not one"),
        ("nonsense", "is not one"),
        ("mysql://u:hunter2@host/db", "unknown"),
        ("oracle+nothing://u:hunter2@host/db", "unknown"),
        ("sqlite:////nowhere/at/all/x.db", "unable to open database file"),
        ("postgresql://u:hunter2@127.0.0.1:1/db", "refused"),
        ("postgres://u:hunter2@no-such-host.invalid/db", "host"),
        ("postgresql+asyncpg://u:hunter2@127.0.0.1:1/db", "refused"),
    ],
)
def test_a_database_that_cannot_be_opened_says_why_in_one_line_without_its_password(
    url: str, message: str
) -> None:
    with pytest.raises(DatabaseUnavailable, match=message) as caught:
        open_database(url)
    assert "\n" not in caught.value.message
    assert "hunter2" not in caught.value.message


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match="unable to open database file"):
        open_database(f"sqlite:///{tmp_path}")


def test_a_file_of_something_else_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database" * 100)
    with pytest.raises(DatabaseUnavailable, match="file is not a database"):
        open_database(f"sqlite:///{tmp_path / 'x.db'}")


def test_a_locked_database_is_waited_for_and_then_unavailable(sqlite_url: str) -> None:
    path = sa.make_url(sqlite_url).database
    assert path is not None
    settings = DatabaseSettings(busy_timeout_seconds=0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    with open_database(sqlite_url, settings=settings) as db:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match="locked"):
            db.run(lambda tx: tx.execute(sa.delete(files)))
        with db.read() as tx:
            assert tx.execute(sa.select(files)).all() == []
        holder.execute("ROLLBACK")
        db.run(lambda tx: tx.execute(sa.delete(files)))
    holder.close()


def test_a_wrong_password_is_refused_and_not_shown(postgres_url: str) -> None:
    url = sa.make_url(postgres_url).set(username="nobody_here", password="hunter2")  # noqa: S106 - wrong
    with pytest.raises(DatabaseUnavailable, match="nobody_here") as caught:
        open_database(url.render_as_string(hide_password=False))
    assert "hunter2" not in caught.value.message


def test_sqlite_is_set_to_lose_nothing(sqlite_url: str) -> None:
    with open_database(sqlite_url) as db, db.read() as tx:
        pragmas = {
            name: tx.connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
    }


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


def test_now_is_aware_utc_and_may_be_fixed(url: str) -> None:
    with open_database(url) as db:
        assert abs((db.now() - datetime.now(UTC)).total_seconds()) < 60
        assert db.now().tzinfo is UTC
    instant = datetime(2026, 1, 2, tzinfo=UTC)
    with open_database(url, clock=lambda: instant) as db:
        assert db.now() == instant


def test_an_exception_undoes_a_transaction(url: str) -> None:
    with open_database(url) as db:

        def fail(tx: Transaction) -> None:
            insert_file(tx, "file-a")
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            db.run(fail)
        with db.read() as tx:
            assert tx.execute(sa.select(files)).all() == []


def test_a_refused_change_is_a_conflict(url: str) -> None:
    with open_database(url) as db:
        db.run(lambda tx: insert_file(tx, "file-a"))
        with pytest.raises(Conflict, match="refused"):
            db.run(lambda tx: insert_file(tx, "file-a"))


def insert_file(tx: Transaction, file_id: str) -> None:
    tx.execute(
        sa.insert(files).values(
            id=file_id,
            tenant_id="t",
            filename="f",
            purpose="batch",
            num_bytes=1,
            sha256="0",
            blob_key="k",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
    )


def test_a_write_is_repeated_when_postgres_ended_its_connection(postgres_url: str) -> None:
    calls = 0

    @writes
    def write(tx: Transaction, *, file_id: str) -> str:
        nonlocal calls
        calls += 1
        insert_file(tx, file_id)
        if calls == 1:
            me = tx.execute(sa.select(sa.func.pg_backend_pid())).scalar_one()
            with open_database(postgres_url) as other, other.transaction() as killer:
                killer.execute(sa.select(sa.func.pg_terminate_backend(me)))
        tx.execute(sa.select(1))
        return file_id

    with open_database(postgres_url) as db:
        assert write(db, file_id="file-a") == "file-a"
        assert calls == 2
        with db.read() as tx:
            assert len(tx.execute(sa.select(files)).all()) == 1


def test_a_statement_that_takes_too_long_is_ended_and_not_repeated(postgres_url: str) -> None:
    calls = 0

    @writes
    def sleep(tx: Transaction) -> None:
        nonlocal calls
        calls += 1
        tx.execute(sa.select(sa.func.pg_sleep(30)))

    settings = DatabaseSettings(statement_timeout_seconds=0.05)
    with (
        open_database(postgres_url, settings=settings) as db,
        pytest.raises(DatabaseUnavailable, match="statement timeout"),
    ):
        sleep(db)
    assert calls == 1


def test_an_empty_database_says_how_to_upgrade(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path / 'x.db'}") as db:
        with pytest.raises(DatabaseUnavailable, match="run `batchctl db upgrade`"):
            check_schema(db)
        with pytest.raises(DatabaseUnavailable, match="run `batchctl db upgrade`"), db.read() as tx:
            tx.execute(sa.select(files))
        upgrade(db)
        check_schema(db)
        upgrade(db)


def test_a_database_of_a_newer_program_is_left_alone(url: str) -> None:
    with open_database(url) as db:
        with db.read() as tx:
            head = tx.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()
        db.run(lambda tx: tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'")))
        try:
            with pytest.raises(DatabaseUnavailable, match="newer version"):
                check_schema(db)
        finally:
            db.run(
                lambda tx: tx.execute(
                    sa.text("UPDATE alembic_version SET version_num = :head"), {"head": head}
                )
            )


def _walk(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _walk(below)


def test_every_exception_of_sqlalchemy_has_one_of_ours() -> None:
    for kind in _walk(sqlalchemy.exc.SQLAlchemyError):
        ours = next(ours for foreign, ours in ERRORS if issubclass(kind, foreign))
        assert issubclass(ours, BatchctlError)


def test_settings_show_no_secret() -> None:
    database = DatabaseSettings(url="postgresql://u:hunter2@h/d")
    blobs = BlobSettings.model_validate({"secret_key": "hunter2", "access_key": "hunter2"})
    assert "hunter2" not in repr(database) + repr(blobs)


def test_without_a_url_the_database_is_in_the_data_folder(tmp_path: Path) -> None:
    assert DatabaseSettings().resolve_url(tmp_path) == f"sqlite:///{tmp_path}/batchctl.sqlite3"
