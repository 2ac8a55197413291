import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from jobs.domain.ids import UnitId
from jobs.domain.retry import Settlement
from jobs.domain.shard import Lease, UnitKind, UnitState
from jobs.leases import LeaseKeeper, LeaseTimes
from storage import batches, units
from storage.database import open_database
from tests.builders import Bench, await_set, await_true, make_lines

TIMES = LeaseTimes(lease_seconds=60, renew_seconds=0.02, watch_seconds=0.02, stall_seconds=3600)


@dataclass
class Holder:
    """Counts what a keeper says about the leases it keeps."""

    keeper: LeaseKeeper
    lost: list[UnitId] = field(default_factory=list)
    stopping: list[UnitState] = field(default_factory=list)
    told: threading.Event = field(default_factory=threading.Event)
    looked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    count: int = 0

    def hold(self, lease: Lease, *, progress: Callable[[], object] | None = None) -> None:
        self.keeper.hold(
            lease,
            progress=progress or self.progress,
            on_lost=self.on_lost,
            on_stopping=self.on_stopping,
        )

    def progress(self) -> int:
        self.count += 1
        self.looked.release()
        return self.count

    def on_lost(self, unit_id: UnitId) -> None:
        self.lost.append(unit_id)
        self.told.set()

    def on_stopping(self, _unit_id: UnitId, state: UnitState) -> None:
        self.stopping.append(state)
        self.told.set()

    def await_turns(self, turns: int = 5) -> None:
        """Return once the keeper has looked at a lease that it keeps so many times more."""
        for _ in range(turns):
            assert self.looked.acquire(timeout=20)


@contextmanager
def keeping(bench: Bench, times: LeaseTimes = TIMES) -> Iterator[Holder]:
    keeper = LeaseKeeper(bench.db, times)
    keeper.start()
    try:
        yield Holder(keeper)
    finally:
        keeper.close()


def leased(bench: Bench) -> Lease:
    bench.submit_planned(make_lines(2))
    return bench.claim(UnitKind.SHARD)


def test_lease_is_renewed_while_the_work_makes_progress(bench: Bench) -> None:
    lease = leased(bench)
    with keeping(bench) as holder:
        holder.hold(lease)
        bench.clock.advance(59)
        holder.await_turns()
        bench.clock.advance(59)
        assert units.reap(bench.db) == [], "twice the time it was leased for"
        assert holder.lost == []


def test_lease_of_work_that_stands_still_is_not_renewed(bench: Bench) -> None:
    lease = leased(bench)
    with keeping(bench, replace(TIMES, stall_seconds=0)) as holder:
        holder.hold(lease, progress=lambda: holder.looked.release())  # noqa: PLW0108  never moves
        holder.await_turns()
        bench.clock.advance(59)
        holder.await_turns()
        bench.clock.advance(2)
        assert [reaped.unit_id for reaped in units.reap(bench.db)] == [lease.unit_id]


def test_lease_that_was_given_away_is_reported_once(bench: Bench) -> None:
    lease = leased(bench)
    with keeping(bench) as holder:
        holder.hold(lease)
        holder.await_turns(1)
        units.reap(bench.db, now=bench.db.now() + timedelta(hours=1))
        await_set(holder.told)
        assert holder.lost == [lease.unit_id]
        other = leased(bench)
        holder.hold(other)
        holder.await_turns()
        assert holder.lost == [lease.unit_id]


def test_lease_that_was_given_back_takes_no_later_one_of_its_unit_along(bench: Bench) -> None:
    lease = leased(bench)
    later: list[Lease] = []
    with keeping(bench) as holder:

        def change() -> int:
            """Do what the work does while the keeper is about to renew."""
            if not later:
                units.settle(bench.db, lease, Settlement(state=UnitState.PENDING, exit="released"))
                later.append(bench.claim(UnitKind.SHARD))
                holder.hold(later[0])
            return 0

        holder.hold(lease, progress=change)
        holder.await_turns()
        holder.keeper.drop(lease)
        holder.await_turns()
        assert later[0].unit_id == lease.unit_id
        assert holder.lost == []
        assert holder.keeper.num_held(UnitKind.SHARD) == 1


def test_holder_that_cannot_renew_gives_up_before_its_lease_ends(
    bench: Bench, tmp_path: Path
) -> None:
    lease = leased(bench)
    times = LeaseTimes(lease_seconds=0.2, renew_seconds=0.02, watch_seconds=0.02)
    # No statement works on a database without tables.
    with open_database(f"sqlite:///{tmp_path}/empty.sqlite3") as broken:
        keeper = LeaseKeeper(broken, times)
        holder = Holder(keeper)
        keeper.start()
        holder.hold(lease)
        await_set(holder.told)
        keeper.close()
    assert holder.lost == [lease.unit_id]


def test_cancel_is_reported_once_and_the_lease_still_kept(bench: Bench) -> None:
    lease = leased(bench)
    with keeping(bench) as holder:
        holder.hold(lease)
        batches.request_cancel(bench.db, lease.batch_id)
        await_set(holder.told)
        holder.await_turns()
        assert (holder.stopping, holder.lost) == ([UnitState.CANCELLED], [])


def test_deadline_is_reported_before_any_sweep(bench: Bench) -> None:
    lease = leased(bench)
    with keeping(bench) as holder:
        holder.hold(lease)
        bench.clock.advance(86401)
        await_set(holder.told)
        assert holder.stopping == [UnitState.EXPIRED]


def test_dropped_lease_is_left_to_run_out(bench: Bench) -> None:
    lease, other = leased(bench), leased(bench)
    with keeping(bench) as holder:
        holder.hold(lease)
        holder.hold(other)
        holder.keeper.drop(lease)
        bench.clock.advance(50)
        holder.await_turns()
        bench.clock.advance(50)
        await_true(lambda: bool(units.reap(bench.db)))
        assert holder.lost == []


def test_keeper_goes_on_after_a_fault_of_what_it_asks(bench: Bench) -> None:
    bench.submit_planned(make_lines(2), shard_lines=1)
    asked: list[int] = []

    def fail_once() -> int:
        asked.append(1)
        if len(asked) == 1:
            raise AttributeError("a fault of ours")
        return len(asked)

    with keeping(bench) as holder:
        holder.hold(bench.claim(UnitKind.SHARD), progress=fail_once)
        holder.hold(bench.claim(UnitKind.SHARD))
        holder.await_turns()
    assert len(asked) > 1
    assert holder.lost == []
