import random
import threading
from collections.abc import Callable

import pytest

from jobs.domain.batch import BatchStatus
from jobs.domain.errors import Conflict, LeaseLost
from jobs.domain.ids import BatchId
from jobs.domain.retry import Settlement
from jobs.domain.shard import UnitKind, UnitState, bitmap, has_bit
from storage import batches, segments, shards, units
from tests.conformance.storage.bench import Bench

NUM_LINES = 4


def run_together(*actions: Callable[[], None]) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(len(actions), timeout=30)

    def run(action: Callable[[], None]) -> None:
        try:
            start.wait()
            action()
        except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def work(bench: Bench, name: str) -> None:
    """Run shards a line at a time, giving some back in between."""
    rng = random.Random(name)
    while (lease := bench.claim(UnitKind.SHARD, worker=name)) is not None:
        done = shards.get(bench.db, lease.unit_id).done
        missing = [p for p in range(NUM_LINES) if not has_bit(done, p)]
        try:
            for sequence, position in enumerate(missing):
                if rng.random() < 0.2:
                    units.settle(bench.db, lease, Settlement(state=UnitState.PENDING))
                    break
                bench.record(lease, [position], num_lines=NUM_LINES, sequence=sequence)
        except LeaseLost:
            continue


def check(bench: Bench, batch_id: BatchId) -> None:
    """Every line that is done is in exactly one segment, and every sum agrees."""
    batch = batches.get(bench.db, batch_id)
    done = 0
    for shard, _ in shards.list_for_batch(bench.db, batch_id):
        union = 0
        for segment in segments.list_for_unit(bench.db, shard.unit_id):
            positions = int.from_bytes(segment.positions, "little")
            assert not union & positions
            union |= positions
        assert union == int.from_bytes(shard.done, "little")
        done += union.bit_count()
    assert batch.request_counts.completed == done


def test_two_workers_finish_every_line_once_and_one_finalizer_follows(bench: Bench) -> None:
    batch_id = bench.add_planned(*[NUM_LINES] * 12)
    run_together(lambda: work(bench, "a"), lambda: work(bench, "b"))
    work(bench, "c")  # what the last of them gave back
    check(bench, batch_id)
    assert batches.get(bench.db, batch_id).request_counts.completed == 12 * NUM_LINES
    assert batches.get(bench.db, batch_id).status is BatchStatus.FINALIZING
    assert bench.must_claim().kind is UnitKind.FINALIZE
    assert bench.claim() is None


@pytest.mark.parametrize("seed", range(3))
def test_cancel_sweep_and_reap_beside_two_workers_leave_nothing_hanging(
    bench: Bench, seed: int
) -> None:
    batch_id = bench.add_planned(*[NUM_LINES] * 12)

    def disturb() -> None:
        rng = random.Random(seed)
        for _ in range(4):
            bench.clock.advance(61)
            units.reap(bench.db, rng=rng)
            batches.advance_finished(bench.db)
        batches.request_cancel(bench.db, batch_id)
        for _ in range(4):
            batches.advance_finished(bench.db)
            batches.expire_overdue(bench.db)
            units.poke_due(bench.db)

    run_together(lambda: work(bench, "a"), lambda: work(bench, "b"), disturb)
    bench.clock.advance(1000)
    units.reap(bench.db)
    batches.advance_finished(bench.db)
    check(bench, batch_id)
    finalizer = bench.must_claim()
    assert finalizer.kind is UnitKind.FINALIZE
    ended = bench.complete(finalizer)
    assert ended.status in {BatchStatus.CANCELLED, BatchStatus.COMPLETED}


def test_one_of_two_commits_of_the_same_line_wins(bench: Bench) -> None:
    bench.add_planned(NUM_LINES)
    lease = bench.must_claim()
    outcomes: list[str] = []

    def commit(sequence: int) -> None:
        try:
            bench.record(lease, [0], num_lines=NUM_LINES, sequence=sequence)
        except Conflict:
            outcomes.append("refused")
        else:
            outcomes.append("committed")

    run_together(lambda: commit(0), lambda: commit(1))
    assert sorted(outcomes) == ["committed", "refused"]
    assert shards.get(bench.db, lease.unit_id).done == bitmap([0], NUM_LINES)


def test_one_batch_comes_of_two_inserts_with_one_key(bench: Bench) -> None:
    first, second = (bench.make_batch(idempotency_key="k") for _ in range(2))
    found: list[BatchId] = []
    run_together(
        lambda: found.append(batches.insert(bench.db, first).id),
        lambda: found.append(batches.insert(bench.db, second).id),
    )
    assert len(set(found)) == 1
    assert bench.claim() is not None
    assert bench.claim() is None
