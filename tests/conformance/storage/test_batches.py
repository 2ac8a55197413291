from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from jobs.domain.batch import BatchEnding, BatchStatus, LineProblem, RequestCounts
from jobs.domain.errors import Conflict, IllegalTransition, LeaseLost, NotFound
from jobs.domain.ids import BatchId, FileId, TenantId
from jobs.domain.result import Usage
from jobs.domain.retry import Settlement
from jobs.domain.shard import Cut, UnitKind, UnitState
from storage import batches, files, outbox, segments, shards, units
from storage.tables import batches as batches_table
from storage.tables import units as units_table
from tests.conformance.storage.bench import Bench

PROBLEM = LineProblem(code="invalid_json_line", message="Not JSON.", param=None, line=7)


def test_a_batch_is_read_as_it_was_inserted(bench: Bench) -> None:
    batch = bench.make_batch()
    assert batches.insert(bench.db, batch) == batch
    assert batches.get(bench.db, batch.id) == batch
    assert batches.get(bench.db, batch.id, tenant_id=batch.tenant_id) == batch


def test_inserting_a_batch_again_returns_it_and_plans_it_once(bench: Bench) -> None:
    batch = bench.add_batch()
    assert batches.insert(bench.db, batch) == batch
    bench.must_claim()
    assert bench.claim() is None


def test_an_idempotency_key_that_repeats_returns_the_first_batch(bench: Bench) -> None:
    first = batches.insert(bench.db, bench.make_batch(idempotency_key="k"))
    second = batches.insert(bench.db, bench.make_batch(idempotency_key="k"))
    assert second == first
    assert len(batches.list_page(bench.db, tenant_id=first.tenant_id)[0]) == 1
    other = TenantId("other")
    third = batches.insert(bench.db, bench.make_batch(idempotency_key="k", tenant_id=other))
    assert third.id != first.id


def test_a_batch_needs_a_file_of_its_tenant(bench: Bench) -> None:
    batch = bench.make_batch()
    with pytest.raises(NotFound, match="No such File object: file-none"):
        batches.insert(bench.db, replace(batch, input_file_id=FileId("file-none")))
    foreign = bench.add_file(tenant_id=TenantId("other"))
    with pytest.raises(NotFound):
        batches.insert(bench.db, replace(batch, input_file_id=foreign.id))
    deleted = bench.add_file()
    files.mark_deleted(bench.db, deleted.id)
    with pytest.raises(NotFound):
        batches.insert(bench.db, replace(batch, input_file_id=deleted.id))


def test_another_tenant_sees_no_batch(bench: Bench) -> None:
    batch = bench.add_batch()
    with pytest.raises(NotFound, match=f"No such Batch object: {batch.id}"):
        batches.get(bench.db, batch.id, tenant_id=TenantId("other"))
    with pytest.raises(NotFound):
        batches.request_cancel(bench.db, batch.id, tenant_id=TenantId("other"))


def test_pages_of_batches_go_from_new_to_old_without_gap_or_repetition(bench: Bench) -> None:
    made = []
    for number in range(7):
        if number % 3:  # some of the same instant
            bench.clock.advance(1)
        made.append(bench.add_batch().id)
    batches.insert(bench.db, bench.make_batch(tenant_id=TenantId("other")))
    seen: list[BatchId] = []
    has_more = True
    while has_more:
        page, has_more = batches.list_page(
            bench.db,
            tenant_id=TenantId("default"),
            after=seen[-1] if seen else None,
            limit=3,
        )
        assert has_more == (len(seen) < 6)
        seen += [batch.id for batch in page]
    assert seen == made[::-1]
    with pytest.raises(NotFound):
        batches.list_page(bench.db, tenant_id=TenantId("default"), after=BatchId("batch_none"))


def test_a_plan_starts_the_batch_and_inserts_its_shards(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    batch = batches.get(bench.db, batch_id)
    assert batch.status is BatchStatus.IN_PROGRESS
    assert batch.request_counts == RequestCounts(total=5)
    assert batch.planned_at == batch.in_progress_at == bench.clock.now
    found = shards.list_for_batch(bench.db, batch_id)
    assert [(s.ordinal, s.first_index, s.num_lines, s.done) for s, _ in found] == [
        (0, 0, 3, b"\0"),
        (1, 3, 2, b"\0"),
    ]
    assert {state for _, state in found} == {UnitState.PENDING}


def test_a_plan_that_is_recorded_again_changes_nothing(bench: Bench) -> None:
    bench.add_batch()
    lease = bench.must_claim()
    assert bench.record_plan(lease)
    assert bench.record_plan(lease)
    assert len(shards.list_for_batch(bench.db, lease.batch_id)) == 2


def test_a_stale_planner_writes_nothing(bench: Bench) -> None:
    bench.add_batch()
    lease = bench.must_claim()
    bench.clock.advance(1000)
    units.reap(bench.db)
    bench.clock.advance(1000)
    again = bench.must_claim()
    with pytest.raises(LeaseLost):
        bench.record_plan(lease)
    assert bench.record_plan(again)
    with pytest.raises(LeaseLost):
        bench.record_plan(lease)
    with pytest.raises(LeaseLost):
        batches.refuse(bench.db, lease, errors=[PROBLEM], num_errors=1)


def test_a_large_plan_is_recorded_in_one_transaction(bench: Bench) -> None:
    batch_id = bench.add_planned(*[1] * 2000)
    found = shards.list_for_batch(bench.db, batch_id)
    assert [shard.first_index for shard, _ in found] == list(range(2000))


def test_lines_and_bytes_may_exceed_32_bits(bench: Bench) -> None:
    bench.add_batch()
    lease = bench.must_claim()
    cut = Cut(first_index=2**33, first_line=2**34, num_lines=1, byte_start=2**45, num_bytes=2**35)
    batches.record_plan(
        bench.db, lease, cuts=[cut], source_blob_key="x", model_key="demo", total=2**33
    )
    ((shard, _),) = shards.list_for_batch(bench.db, lease.batch_id)
    assert (shard.first_index, shard.byte_start, shard.num_bytes) == (2**33, 2**45, 2**35)
    assert batches.get(bench.db, lease.batch_id).request_counts.total == 2**33


def test_a_plan_without_lines_goes_straight_to_finalizing(bench: Bench) -> None:
    batch = bench.add_batch()
    assert batches.record_plan(
        bench.db, bench.must_claim(), cuts=[], source_blob_key="x", model_key=None, total=0
    )
    assert batches.get(bench.db, batch.id).status is BatchStatus.FINALIZING
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_a_refused_file_fails_its_batch_with_the_problems(bench: Bench) -> None:
    batch = bench.add_batch()
    lease = bench.must_claim()
    assert batches.refuse(bench.db, lease, errors=[PROBLEM], num_errors=9)
    assert batches.refuse(bench.db, lease, errors=[PROBLEM], num_errors=9)
    failed = batches.get(bench.db, batch.id)
    assert (failed.status, failed.errors, failed.num_errors) == (
        BatchStatus.FAILED,
        (PROBLEM,),
        9,
    )
    assert failed.failed_at == bench.clock.now
    assert bench.claim() is None
    (event,) = outbox.list_due(bench.db, now=bench.clock.now)
    assert (event.batch_id, event.event) == (batch.id, "batch.failed")


def test_counts_and_usage_are_sums_over_shards_until_the_files_are_written(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    first = bench.must_claim()
    bench.record(first, [0, 2], num_failed=1)
    batch = batches.get(bench.db, batch_id)
    assert batch.request_counts == RequestCounts(total=5, completed=1, failed=1)
    assert batch.usage == Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=1)
    bench.record(first, [1], sequence=1)
    bench.run_all_shards()
    batch = batches.get(bench.db, batch_id)
    assert batch.request_counts == RequestCounts(total=5, completed=4, failed=1)
    assert batches.list_page(bench.db, tenant_id=batch.tenant_id)[0] == [batch]


def test_the_last_shard_makes_the_batch_finalize_at_once(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    batch = batches.get(bench.db, batch_id)
    assert (batch.status, batch.ending) == (BatchStatus.FINALIZING, BatchEnding.COMPLETED)
    assert batch.finalizing_at == bench.clock.now
    assert batches.advance_finished(bench.db) == []
    assert bench.must_claim().kind is UnitKind.FINALIZE
    assert bench.claim() is None


def test_completing_publishes_the_files_and_the_final_counts(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    lease = bench.must_claim()
    done = bench.complete(lease, num_completed=4, num_failed=1)
    assert done == batches.get(bench.db, batch_id)
    assert (done.status, done.completed_at) == (BatchStatus.COMPLETED, bench.clock.now)
    assert done.request_counts == RequestCounts(total=5, completed=4, failed=1)
    assert done.usage == Usage(prompt_tokens=20, completion_tokens=10, cached_tokens=2)
    assert done.error_file_id is None
    assert done.output_file_id is not None
    assert files.get(bench.db, done.output_file_id).purpose == "batch_output"
    (event,) = outbox.list_due(bench.db, now=bench.clock.now)
    assert event.event == "batch.completed"


def test_completing_again_changes_nothing(bench: Bench) -> None:
    bench.add_planned(3, 2)
    bench.run_all_shards()
    lease = bench.must_claim()
    first = bench.complete(lease)
    assert bench.complete(lease) == first


def test_a_stale_finalizer_publishes_nothing(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    lease = bench.must_claim()
    bench.clock.advance(1000)
    units.reap(bench.db)
    with pytest.raises(LeaseLost):
        bench.complete(lease)
    assert batches.get(bench.db, batch_id).output_file_id is None
    with bench.db.read() as tx:
        outputs = tx.execute(sa.text("SELECT count(*) FROM files WHERE purpose <> 'batch'"))
        assert outputs.scalar_one() == 0


@pytest.mark.parametrize(
    "change", [{"status": "in_progress"}, {"output_file_id": None}, {"ending": "expired"}]
)
def test_a_batch_that_ended_stays_as_it_is(bench: Bench, change: dict[str, str | None]) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    before = bench.complete(bench.must_claim())
    with pytest.raises(Conflict, match="ended"), bench.db.transaction() as tx:
        tx.execute(sa.update(batches_table).where(batches_table.c.id == batch_id).values(change))
    assert batches.get(bench.db, batch_id) == before


def test_cancelling_before_the_plan_ends_without_any_request(bench: Bench) -> None:
    batch = bench.add_batch()
    cancelled = batches.request_cancel(bench.db, batch.id)
    assert (cancelled.status, cancelled.ending) == (
        BatchStatus.CANCELLING,
        BatchEnding.CANCELLED,
    )
    assert cancelled.cancelling_at == bench.clock.now
    lease = bench.must_claim()
    assert lease.kind is UnitKind.FINALIZE
    assert bench.complete(lease, num_completed=0).status is BatchStatus.CANCELLED


def test_cancelling_during_the_plan_ends_when_the_planner_finds_out(bench: Bench) -> None:
    batch = bench.add_batch()
    lease = bench.must_claim()
    assert batches.request_cancel(bench.db, batch.id).status is BatchStatus.CANCELLING
    assert bench.claim() is None
    assert not bench.record_plan(lease)
    assert not bench.record_plan(lease)
    assert shards.list_for_batch(bench.db, batch.id) == []
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_a_refusal_after_a_cancel_still_ends_cancelled(bench: Bench) -> None:
    batch = bench.add_batch()
    lease = bench.must_claim()
    batches.request_cancel(bench.db, batch.id)
    assert not batches.refuse(bench.db, lease, errors=[PROBLEM], num_errors=1)
    assert batches.get(bench.db, batch.id).status is BatchStatus.CANCELLING
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_cancelling_at_work_keeps_what_is_committed_until_the_holder_ends(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    lease = bench.must_claim()
    batches.request_cancel(bench.db, batch_id)
    assert bench.claim() is None
    assert not bench.record(lease, [0])
    units.settle(bench.db, lease, Settlement(state=UnitState.CANCELLED))
    finalizer = bench.must_claim()
    assert finalizer.kind is UnitKind.FINALIZE
    assert batches.get(bench.db, batch_id).request_counts.completed == 1
    done = bench.complete(finalizer, num_completed=1, num_failed=4)
    assert (done.status, done.cancelled_at) == (BatchStatus.CANCELLED, bench.clock.now)
    assert done.finalizing_at is None


def test_the_last_line_of_a_cancelled_batch_lets_it_end(bench: Bench) -> None:
    batch_id = bench.add_planned(3)
    lease = bench.must_claim()
    batches.request_cancel(bench.db, batch_id)
    assert bench.record(lease, [0, 1, 2])
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_cancelling_while_the_files_are_written_changes_nothing(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    before = batches.get(bench.db, batch_id)
    assert batches.request_cancel(bench.db, batch_id) == before
    assert bench.complete(bench.must_claim()).status is BatchStatus.COMPLETED


def test_cancelling_twice_is_the_same_as_once(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    first = batches.request_cancel(bench.db, batch_id)
    bench.clock.advance(5)
    assert batches.request_cancel(bench.db, batch_id) == first
    cancelled = bench.complete(bench.must_claim(), num_completed=0, num_failed=5)
    assert batches.request_cancel(bench.db, batch_id) == cancelled


def test_a_batch_that_completed_cannot_be_cancelled(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    bench.complete(bench.must_claim())
    with pytest.raises(IllegalTransition, match=batch_id):
        batches.request_cancel(bench.db, batch_id)


def test_an_overdue_batch_ends_its_pending_work_and_keeps_its_status(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2, hours=1)
    lease = bench.must_claim()
    assert batches.expire_overdue(bench.db) == []
    bench.clock.advance(3600)
    assert batches.expire_overdue(bench.db) == [batch_id]
    assert batches.expire_overdue(bench.db) == []
    batch = batches.get(bench.db, batch_id)
    assert (batch.status, batch.ending) == (BatchStatus.IN_PROGRESS, BatchEnding.EXPIRED)
    assert bench.claim() is None
    units.settle(bench.db, lease, Settlement(state=UnitState.EXPIRED))
    done = bench.complete(bench.must_claim(), num_completed=0, num_failed=5)
    assert (done.status, done.expired_at) == (BatchStatus.EXPIRED, bench.clock.now)


def test_a_batch_overdue_before_its_plan_expires(bench: Bench) -> None:
    batch = bench.add_batch(hours=1)
    bench.clock.advance(3600)
    assert batches.expire_overdue(bench.db) == [batch.id]
    assert batches.get(bench.db, batch.id).status is BatchStatus.FINALIZING
    done = bench.complete(bench.must_claim(), num_completed=0)
    assert done.status is BatchStatus.EXPIRED


def test_a_planner_that_is_overdue_records_nothing(bench: Bench) -> None:
    batch = bench.add_batch(hours=1)
    lease = bench.must_claim()
    bench.clock.advance(3600)
    batches.expire_overdue(bench.db)
    assert not bench.record_plan(lease)
    assert batches.get(bench.db, batch.id).ending is BatchEnding.EXPIRED
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_expiry_takes_a_bounded_number_the_most_overdue_first(bench: Bench) -> None:
    late = bench.add_batch(hours=2)
    early = bench.add_batch(hours=1)
    bench.clock.advance(3 * 3600)
    assert batches.expire_overdue(bench.db, limit=1) == [early.id]
    assert batches.expire_overdue(bench.db, limit=1) == [late.id]


def test_work_that_a_race_left_behind_is_moved_on(bench: Bench) -> None:
    finished = bench.add_planned(1)
    lease = bench.must_claim()
    cancelled = bench.add_planned(1, 1)
    batches.request_cancel(bench.db, cancelled)
    with bench.db.transaction() as tx:
        # As if the process had died between the two, and a release had crossed the cancel.
        tx.execute(
            sa.update(units_table).where(units_table.c.id == lease.unit_id).values(state="done")
        )
        tx.execute(sa.delete(units_table).where(units_table.c.kind == UnitKind.FINALIZE))
    waiting = bench.add_planned(2)
    assert batches.advance_finished(bench.db, limit=10) == sorted([finished, cancelled])
    assert batches.advance_finished(bench.db) == []
    assert batches.get(bench.db, finished).status is BatchStatus.FINALIZING
    assert batches.get(bench.db, cancelled).status is BatchStatus.CANCELLING
    assert batches.get(bench.db, waiting).status is BatchStatus.IN_PROGRESS


def test_pending_work_of_a_cancelled_batch_is_swept(bench: Bench) -> None:
    batch_id = bench.add_planned(1, 1)
    batches.request_cancel(bench.db, batch_id)
    with bench.db.transaction() as tx:
        tx.execute(sa.delete(units_table).where(units_table.c.kind == UnitKind.FINALIZE))
        tx.execute(
            sa.insert(units_table).values(
                id="unit_stray",
                batch_id=batch_id,
                kind="shard",
                ordinal=7,
                priority=0,
                deadline_at=bench.clock.now + timedelta(hours=1),
                state="pending",
                not_before=bench.clock.now,
                format_version=1,
            )
        )
    assert batches.advance_finished(bench.db) == [batch_id]
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_a_published_batch_lists_the_segments_it_was_made_of(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    bench.complete(bench.must_claim())
    assert len(list(segments.iterate_for_batch(bench.db, batch_id))) == 2


def test_events_are_delivered_once_or_later(bench: Bench) -> None:
    bench.add_batch()
    batches.refuse(bench.db, bench.must_claim(), errors=[PROBLEM], num_errors=1)
    (event,) = outbox.list_due(bench.db, now=bench.clock.now)
    outbox.mark_failed(bench.db, event.id, not_before=bench.clock.now + timedelta(seconds=9))
    assert outbox.list_due(bench.db, now=bench.clock.now) == []
    bench.clock.advance(9)
    (again,) = outbox.list_due(bench.db, now=bench.clock.now)
    assert (again.id, again.attempts) == (event.id, 1)
    outbox.mark_delivered(bench.db, event.id, now=bench.clock.now)
    assert outbox.list_due(bench.db, now=bench.clock.now) == []
