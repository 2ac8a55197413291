import random

from jobs import sweeper
from jobs.domain.batch import BatchStatus
from jobs.domain.ids import WorkerId
from jobs.domain.shard import UnitKind, UnitState
from jobs.sweeper import Swept
from storage import batches, workers
from storage.workers import Worker
from tests.builders import Bench, make_lines


def tick(bench: Bench, *, limit: int = 100) -> Swept:
    return sweeper.tick(bench.db, rng=random.Random(0), limit=limit)


def test_sweeper_finds_nothing_where_all_is_well(bench: Bench) -> None:
    bench.submit_planned(make_lines(3))
    bench.claim(UnitKind.SHARD)
    assert tick(bench) == Swept(reaped=0, expired=0, finished=0)


def test_expired_lease_returns_its_shard_to_the_queue(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(3))
    bench.claim(UnitKind.SHARD)
    bench.clock.advance(59)
    assert tick(bench).reaped == 0
    bench.clock.advance(2)
    assert tick(bench).reaped == 1
    assert bench.states(batch) == [UnitState.PENDING]
    assert tick(bench).reaped == 0


def test_overdue_batch_is_handed_to_the_finalizer(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(3), window_seconds=1000, shard_lines=2)
    bench.clock.advance(999)
    assert tick(bench).expired == 0
    bench.clock.advance(2)
    assert tick(bench).expired == 1
    assert bench.states(batch) == [UnitState.EXPIRED] * 2
    assert bench.finalize().status is BatchStatus.EXPIRED
    assert tick(bench).expired == 0


def test_overdue_batch_waits_for_the_shard_that_runs(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(3), window_seconds=30, shard_lines=2)
    bench.claim(UnitKind.SHARD)
    bench.clock.advance(40)
    tick(bench)
    assert bench.states(batch) == [UnitState.LEASED, UnitState.EXPIRED]
    assert batches.get(bench.db, batch.id).status is BatchStatus.IN_PROGRESS
    bench.clock.advance(60)
    tick(bench)
    assert bench.states(batch) == [UnitState.EXPIRED] * 2
    assert bench.finalize().request_counts.failed == 3


def test_turn_is_bounded(bench: Bench) -> None:
    bench.submit_planned(make_lines(5), shard_lines=1)
    for _ in range(5):
        bench.claim(UnitKind.SHARD)
    bench.clock.advance(100)
    assert [tick(bench, limit=2).reaped for _ in range(4)] == [2, 2, 1, 0]


def test_turn_that_may_not_reap_leaves_an_expired_lease_to_its_holder(bench: Bench) -> None:
    bench.submit_planned(make_lines(3))
    bench.claim(UnitKind.SHARD)
    bench.clock.advance(61)
    assert sweeper.tick(bench.db, rng=random.Random(0), reap=False).reaped == 0
    assert tick(bench).reaped == 1


def test_a_worker_that_ended_without_a_word_is_forgotten_after_a_day(bench: Bench) -> None:
    now = bench.db.now()
    workers.heartbeat(
        bench.db, Worker(id=WorkerId("worker_a"), boot_id="b", started_at=now, heartbeat_at=now)
    )
    bench.clock.advance(24 * 3600 - 60)
    tick(bench)
    assert len(workers.list_recent(bench.db, since=now)) == 1
    bench.clock.advance(120)
    tick(bench)
    assert workers.list_recent(bench.db, since=now) == []
