import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import alembic.command
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from jobs.domain.batch import BatchStatus
from jobs.domain.shard import UnitKind, UnitState
from jobs.feed import FeedSettings
from storage import batches, models, shards, units, workers
from storage.blobs import open_blobs
from storage.config import BlobSettings
from storage.database import Database, alembic_config, check_schema, open_database, upgrade
from storage.tables import metadata
from tests.builders import Bench, Clock, ScriptedEngine, Worker, await_set, await_true, make_lines
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


FLUSH_EACH = FeedSettings(flush_results=1, flush_bytes=1, flush_seconds=0, poll_seconds=0.02)


@contextmanager
def bench_of(db: Database, folder: Path) -> Iterator[Bench]:
    with open_blobs(BlobSettings(), folder) as blobs:
        bench = Bench(db=db, blobs=blobs, clock=Clock())
        with bench.stack:
            yield bench


def downgrade(db: Database) -> None:
    """Leave the rows that the first version would have."""
    config = alembic_config()
    with db.transaction() as tx:
        config.attributes["connection"] = tx.connection
        alembic.command.downgrade(config, "0001")


def test_a_batch_in_flight_goes_on_over_the_upgrade(empty: Database, tmp_path: Path) -> None:
    upgrade(empty)
    with bench_of(empty, tmp_path) as bench:
        batch = bench.submit_planned(make_lines(6), shard_lines=3)
        engine = ScriptedEngine(slots=2)
        engine.pause_after(2)
        with Worker(bench, engine, settings=FLUSH_EACH) as worker:
            await_set(engine.paused)
            await_true(lambda: batches.get(empty, batch.id).request_counts.completed == 2)
            assert UnitState.LEASED in bench.states(batch)
            downgrade(empty)
            upgrade(empty)
            check_schema(empty)
            engine.go_on()
            assert worker.result() == 6
        finished = bench.finalize()
        assert finished.status is BatchStatus.COMPLETED
        assert {line["custom_id"] for line in bench.output_of(finished)} == {
            f"r{number}" for number in range(6)
        }
        assert len(bench.output_of(finished)) == 6


def test_a_batch_whose_worker_was_killed_before_the_upgrade_is_finished_by_another(
    empty: Database, tmp_path: Path
) -> None:
    upgrade(empty)
    with bench_of(empty, tmp_path) as bench:
        batch = bench.submit_planned(make_lines(3))
        bench.claim(UnitKind.SHARD)
        downgrade(empty)
        upgrade(empty)
        [(_, state)] = shards.list_for_batch(empty, batch.id)
        assert state is UnitState.LEASED
        assert len(units.reap_other_boots(empty, boot_id="another")) == 1
        with Worker(bench, ScriptedEngine()) as worker:
            assert worker.result() == 3
        assert bench.finalize().status is BatchStatus.COMPLETED


def test_rows_of_the_older_version_stay_good(empty: Database) -> None:
    upgrade(empty, revision="0001")
    now = empty.now()
    instant = now if empty.is_postgres else int(now.timestamp() * 1_000_000)
    with empty.transaction() as tx:
        for name in ("worker_before", "worker_after"):
            if name == "worker_after":
                config = alembic_config()
                config.attributes["connection"] = tx.connection
                alembic.command.upgrade(config, "head")
            tx.execute(
                sa.text(
                    "INSERT INTO workers (id, boot_id, started_at, heartbeat_at, draining) "
                    "VALUES (:name, 'b', :now, :now, false)"
                ),
                {"name": name, "now": instant},
            )
        tx.execute(
            sa.text(
                "INSERT INTO models (name, fingerprint, capabilities, published_at) "
                "VALUES ('demo', 'f', '{}', :now)"
            ),
            {"now": instant},
        )
    found = workers.list_recent(empty, since=now - timedelta(seconds=1))
    assert [(one.id, one.models, one.host, one.role, one.state) for one in found] == [
        ("worker_after", (), "", "engine", "idle"),
        ("worker_before", (), "", "engine", "idle"),
    ]
    assert models.get(empty, "demo").published_by is None


def test_going_back_keeps_the_batches(empty: Database, tmp_path: Path) -> None:
    upgrade(empty)
    with bench_of(empty, tmp_path) as bench:
        batch = bench.submit_planned(make_lines(3))
        downgrade(empty)
        with empty.read() as tx:
            assert tx.execute(sa.text("SELECT id FROM batches")).scalars().all() == [batch.id]
        upgrade(empty)
        check_schema(empty)
        assert batches.get(empty, batch.id) == batch


@pytest.mark.slow
def test_of_two_upgrades_at_once_both_end_well(empty: Database, tmp_path: Path) -> None:
    upgrade(empty, revision="0001")
    url = empty.engine.url.render_as_string(hide_password=False)
    with ExitStack() as stack:
        with empty.transaction() as tx:
            # Both have to wait for this transaction, and so meet each other behind it.
            if empty.is_postgres:
                tx.execute(sa.text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"))
            processes = [stack.enter_context(start_upgrade(url, tmp_path)) for _ in range(2)]
            await_true(lambda: count_waiting(empty, processes) == 2, 60)
        said = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    check_schema(empty)


@contextmanager
def start_upgrade(url: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli.main", "db", "upgrade"],
        env={**os.environ, "BATCHCTL_DATABASE__URL": url, "BATCHCTL_DATA": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def count_waiting(db: Database, processes: list["subprocess.Popen[str]"]) -> int:
    if db.is_postgres:
        with db.read() as tx:
            query = (
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return int(tx.execute(sa.text(query)).scalar_one())
    # SQLite names nobody who waits; having the file open is as near as one can look.
    return sum(opens(process.pid, str(db.engine.url.database)) for process in processes)


def opens(pid: int, path: str) -> bool:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            if descriptor.readlink() == Path(path):
                return True
    return False
