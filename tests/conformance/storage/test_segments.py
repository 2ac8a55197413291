from dataclasses import replace

import pytest

from jobs.domain.errors import Conflict, LeaseLost, NotFound
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.shard import UnitKind, bitmap
from storage import batches, segments, shards, units
from tests.conformance.storage.bench import Bench


def test_a_segment_marks_its_lines_done_and_extends_the_lease(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    bench.clock.advance(50)
    assert not bench.record(lease, [0, 2])
    assert shards.get(bench.db, lease.unit_id).done == bitmap([0, 2], 3)
    bench.clock.advance(50)
    assert units.reap(bench.db) == []
    bench.clock.advance(11)
    assert len(units.reap(bench.db)) == 1


def test_the_last_segment_ends_the_shard(bench: Bench) -> None:
    bench.add_planned(3, 2)
    lease = bench.must_claim()
    assert not bench.record(lease, [0])
    assert bench.record(lease, [1, 2], sequence=1)
    assert units.renew(bench.db, [lease], lease_seconds=60) == {}
    assert bench.must_claim().ordinal == 1


def test_a_repeated_commit_is_a_success_and_counts_once(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    assert not bench.record(lease, [0])
    assert not bench.record(lease, [0])
    assert bench.record(lease, [1, 2], sequence=1)
    assert bench.record(lease, [1, 2], sequence=1)
    assert batches.get(bench.db, lease.batch_id).request_counts.completed == 3
    assert len(segments.list_for_unit(bench.db, lease.unit_id)) == 2


def test_a_commit_whose_reply_was_lost_before_the_reap_is_a_success(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    bench.record(lease, [0])
    bench.clock.advance(61)
    units.reap(bench.db)
    assert not bench.record(lease, [0])
    with pytest.raises(LeaseLost):
        bench.record(lease, [1], sequence=1)


def test_a_sequence_number_does_not_stand_for_two_segments(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    bench.record(lease, [0])
    with pytest.raises(Conflict, match="other bytes"):
        bench.record(lease, [1])


def test_a_stale_epoch_is_refused(bench: Bench) -> None:
    bench.add_planned(3)
    old = bench.must_claim()
    bench.clock.advance(61)
    units.reap(bench.db)
    with pytest.raises(LeaseLost):
        bench.record(old, [0])
    bench.clock.advance(61)
    new = bench.must_claim(worker="worker_b")
    with pytest.raises(LeaseLost):
        bench.record(old, [0])
    assert not bench.record(new, [0])
    forged = replace(bench.make_segment(new, [1], sequence=1), epoch=old.epoch)
    with pytest.raises(LeaseLost):
        segments.record(bench.db, new, forged, lease_seconds=60)


def test_a_line_never_gets_a_second_result(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    bench.record(lease, [0, 1])
    with pytest.raises(Conflict, match="second result"):
        bench.record(lease, [1, 2], sequence=1)
    assert shards.get(bench.db, lease.unit_id).done == bitmap([0, 1], 3)
    assert len(segments.list_for_unit(bench.db, lease.unit_id)) == 1


def test_a_position_past_the_last_line_is_refused(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    with pytest.raises(Conflict, match="past its last line"):
        bench.record(lease, [3], num_lines=4)
    with pytest.raises(Conflict, match="past its last line"):
        bench.record(lease, [9], num_lines=10)


def test_progress_survives_a_lost_lease(bench: Bench) -> None:
    bench.add_planned(3)
    bench.record(bench.must_claim(), [1])
    bench.clock.advance(1000)
    units.reap(bench.db)
    bench.clock.advance(1000)
    again = bench.must_claim()
    assert shards.get(bench.db, again.unit_id).done == bitmap([1], 3)
    assert bench.record(again, [0, 2])
    epochs = [s.epoch for s in segments.list_for_unit(bench.db, again.unit_id)]
    assert epochs == [1, again.epoch]


def test_segments_of_a_batch_come_by_shard_and_page(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    first, second = bench.must_claim(), bench.must_claim()
    bench.record(second, [0], num_lines=2)
    for sequence in range(3):
        bench.record(first, [sequence], sequence=sequence)
    listed = list(segments.iterate_for_batch(bench.db, batch_id, page=2))
    assert [(s.unit_id, s.sequence) for s in listed] == [
        *((first.unit_id, n) for n in range(3)),
        (second.unit_id, 0),
    ]
    assert listed[0] == bench.make_segment(first, [0])
    assert segments.list_for_batch(bench.db, BatchId("batch_x")) == ([], None)


def test_a_shard_that_does_not_exist_is_not_found(bench: Bench) -> None:
    with pytest.raises(NotFound):
        shards.get(bench.db, UnitId("unit_x"))


def test_finalize_units_have_no_segments(bench: Bench) -> None:
    bench.add_planned(3, 2)
    bench.run_all_shards()
    lease = bench.must_claim(UnitKind.FINALIZE)
    assert segments.list_for_unit(bench.db, lease.unit_id) == []
