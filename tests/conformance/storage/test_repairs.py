from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa

from jobs.domain.batch import Batch, BatchStatus, RequestCounts
from jobs.domain.errors import Conflict, LeaseLost
from jobs.domain.ids import BatchId
from jobs.domain.result import Usage
from jobs.domain.retry import Settlement
from jobs.domain.shard import Lease, Segment, UnitKind, UnitState
from storage import batches, repairs, segments, shards, units
from storage.tables import batches as batches_table
from storage.tables import units as units_table
from tests.conformance.storage.bench import Bench


def finish(bench: Bench) -> tuple[BatchId, Lease]:
    """Run a batch of three and two lines, in segments of two, one and two; lease its finalizer."""
    batch_id = bench.add_planned(3, 2)
    lease = bench.must_claim(UnitKind.SHARD)
    bench.record(lease, [0, 1])
    bench.record(lease, [2], sequence=1, num_failed=1)
    lease = bench.must_claim(UnitKind.SHARD)
    bench.record(lease, [0, 1], num_lines=2)
    return batch_id, bench.must_claim(UnitKind.FINALIZE)


def segments_of(bench: Bench, batch_id: BatchId) -> list[Segment]:
    return segments.list_for_batch(bench.db, batch_id)[0]


def states(bench: Bench, batch_id: BatchId) -> list[UnitState]:
    return [state for _, state in shards.list_for_batch(bench.db, batch_id)]


def run_again(bench: Bench, lease: Lease, number: int = 0) -> Batch:
    return repairs.run_again(bench.db, lease, [segments_of(bench, lease.batch_id)[number]])


def test_lines_of_a_lost_segment_are_run_again_and_only_those(bench: Bench) -> None:
    batch_id, lease = finish(bench)
    before = batches.get(bench.db, batch_id)
    bench.clock.advance(10)
    batch = run_again(bench, lease)
    assert (batch.status, batch.ending) == (BatchStatus.IN_PROGRESS, None)
    assert batch.in_progress_at == before.in_progress_at
    assert batch.finalizing_at is None
    assert batch.request_counts == RequestCounts(total=5, completed=2, failed=1)
    assert batch.usage == Usage(prompt_tokens=20, completion_tokens=10, cached_tokens=2)
    assert states(bench, batch_id) == [UnitState.PENDING, UnitState.DONE]
    [(first, _), _] = shards.list_for_batch(bench.db, batch_id)
    assert first.done == b"\x04"
    again = bench.must_claim(UnitKind.SHARD)
    assert (again.unit_id, again.attempt) == (first.unit_id, 1)
    assert bench.record(again, [0, 1])
    assert batches.get(bench.db, batch_id).status is BatchStatus.FINALIZING
    assert bench.complete(bench.must_claim(UnitKind.FINALIZE)).status is BatchStatus.COMPLETED


def test_a_repair_that_is_repeated_changes_nothing(bench: Bench) -> None:
    batch_id, lease = finish(bench)
    lost = segments_of(bench, batch_id)[:1]
    first = repairs.run_again(bench.db, lease, lost)
    assert repairs.run_again(bench.db, lease, lost) == first
    assert repairs.count(bench.db, batch_id) == 1
    assert len(segments_of(bench, batch_id)) == 2


def test_a_finalizer_that_lost_its_lease_takes_nothing_out(bench: Bench) -> None:
    batch_id, lease = finish(bench)
    bench.clock.advance(100)
    units.reap(bench.db)
    with pytest.raises(LeaseLost):
        run_again(bench, lease)
    assert len(segments_of(bench, batch_id)) == 3
    assert states(bench, batch_id) == [UnitState.DONE] * 2
    assert repairs.count(bench.db, batch_id) == 0


def test_the_finalizer_after_a_repair_has_an_epoch_of_its_own(bench: Bench) -> None:
    """Files of two finalizers are told apart by it, and an old one may still be writing."""
    _, lease = finish(bench)
    bench.clock.advance(100)
    units.reap(bench.db)
    bench.clock.advance(100)
    lease = bench.must_claim(UnitKind.FINALIZE)
    run_again(bench, lease)
    bench.record(bench.must_claim(UnitKind.SHARD), [0, 1])
    after = bench.must_claim(UnitKind.FINALIZE)
    assert after.unit_id != lease.unit_id
    assert after.epoch > lease.epoch
    with pytest.raises(LeaseLost):
        run_again(bench, replace(after, epoch=lease.epoch))


def test_who_ran_the_shard_before_may_not_write_it_any_more(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    old = bench.must_claim(UnitKind.SHARD)
    segment = bench.make_segment(old, [0, 1, 2])
    assert segments.record(bench.db, old, segment, lease_seconds=60)
    bench.record(bench.must_claim(UnitKind.SHARD), [0, 1], num_lines=2)
    run_again(bench, bench.must_claim(UnitKind.FINALIZE))
    with pytest.raises(LeaseLost):
        segments.record(bench.db, old, segment, lease_seconds=60)
    bench.must_claim(UnitKind.SHARD)
    with pytest.raises(LeaseLost):
        segments.record(bench.db, old, segment, lease_seconds=60)
    assert len(segments_of(bench, batch_id)) == 1


def cancel(bench: Bench, batch_id: BatchId) -> None:
    batches.request_cancel(bench.db, batch_id)


def expire(bench: Bench, _: BatchId) -> None:
    bench.clock.advance(25 * 3600)
    batches.expire_overdue(bench.db)


@pytest.mark.parametrize(
    ("stop", "status", "state"),
    [
        (cancel, BatchStatus.CANCELLING, UnitState.CANCELLED),
        (expire, BatchStatus.FINALIZING, UnitState.EXPIRED),
    ],
)
def test_of_a_stopped_batch_nothing_runs_again(
    bench: Bench,
    stop: Callable[[Bench, BatchId], None],
    status: BatchStatus,
    state: UnitState,
) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.record(bench.must_claim(UnitKind.SHARD), [0, 1, 2])
    stop(bench, batch_id)
    lease = bench.must_claim(UnitKind.FINALIZE)
    batch = run_again(bench, lease)
    assert batch.status is status
    assert states(bench, batch_id) == [state] * 2
    assert bench.claim(UnitKind.SHARD) is None
    assert bench.must_claim(UnitKind.FINALIZE).epoch > lease.epoch


def test_a_batch_may_be_cancelled_after_a_repair(bench: Bench) -> None:
    batch_id, lease = finish(bench)
    run_again(bench, lease)
    batches.request_cancel(bench.db, batch_id)
    assert states(bench, batch_id) == [UnitState.CANCELLED, UnitState.DONE]
    assert bench.complete(bench.must_claim(UnitKind.FINALIZE)).status is BatchStatus.CANCELLED


def test_a_shard_that_had_failed_stays_failed(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    lease = bench.must_claim(UnitKind.SHARD)
    bench.record(lease, [0, 1])
    units.settle(bench.db, lease, Settlement(state=UnitState.FAILED, exit="x: y"))
    bench.record(bench.must_claim(UnitKind.SHARD), [0, 1], num_lines=2)
    batch = run_again(bench, bench.must_claim(UnitKind.FINALIZE))
    assert batch.status is BatchStatus.FINALIZING
    assert batch.request_counts.completed == 2
    assert states(bench, batch_id) == [UnitState.FAILED, UnitState.DONE]
    assert bench.claim(UnitKind.FINALIZE) is not None


def test_the_sweeper_finds_a_repaired_batch_that_nobody_moved_on(bench: Bench) -> None:
    """As a process of an older version leaves one: it sees the finalize unit that has ended."""
    batch_id, lease = finish(bench)
    run_again(bench, lease)
    assert batches.advance_finished(bench.db) == []
    with bench.db.transaction() as tx:
        tx.execute(
            sa.update(units_table).where(units_table.c.state == "pending").values(state="failed")
        )
    assert batches.advance_finished(bench.db) == [batch_id]
    assert batches.advance_finished(bench.db) == []
    assert bench.claim(UnitKind.FINALIZE) is not None


# --- the triggers, whatever code is wrong ---


@pytest.mark.parametrize(
    "values",
    [
        {"state": "pending"},  # not under the same epoch
        {"state": "pending", "epoch": 0},
        {"state": "leased", "epoch": 9},
        {"state": "failed", "epoch": 9},
        {"epoch": 9},
    ],
)
def test_a_shard_that_is_done_changes_in_no_other_way(
    bench: Bench, values: dict[str, object]
) -> None:
    batch_id, _ = finish(bench)
    with pytest.raises(Conflict, match="has ended"), bench.db.transaction() as tx:
        tx.execute(
            sa.update(units_table)
            .where(units_table.c.batch_id == batch_id, units_table.c.kind == "shard")
            .values(values)
        )


@pytest.mark.parametrize("kind", ["plan", "finalize"])
def test_other_units_never_run_again(bench: Bench, kind: str) -> None:
    batch_id, lease = finish(bench)
    if kind == "finalize":
        run_again(bench, lease)
    with pytest.raises(Conflict, match="has ended"), bench.db.transaction() as tx:
        tx.execute(
            sa.update(units_table)
            .where(units_table.c.batch_id == batch_id, units_table.c.kind == kind)
            .values(state="pending", epoch=9)
        )


def test_a_shard_never_runs_again_once_its_batch_has_ended(bench: Bench) -> None:
    batch_id, lease = finish(bench)
    bench.complete(lease)
    with pytest.raises(Conflict, match="has ended"), bench.db.transaction() as tx:
        tx.execute(
            sa.update(units_table)
            .where(units_table.c.batch_id == batch_id, units_table.c.kind == "shard")
            .values(state="pending", epoch=9)
        )


@pytest.mark.parametrize(
    "column",
    [
        *("final_completed", "final_failed", "final_prompt_tokens"),
        *("final_completion_tokens", "final_cached_tokens"),
    ],
)
def test_the_numbers_of_a_batch_that_ended_never_change(bench: Bench, column: str) -> None:
    batch_id, lease = finish(bench)
    bench.complete(lease)
    with pytest.raises(Conflict, match="has ended"), bench.db.transaction() as tx:
        tx.execute(
            sa.update(batches_table).where(batches_table.c.id == batch_id).values({column: 99})
        )
