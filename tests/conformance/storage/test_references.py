import pytest

from jobs.domain.batch import BatchStatus
from jobs.domain.errors import Conflict, NotFound
from jobs.domain.ids import BatchId
from jobs.domain.shard import UnitKind
from storage import audits, batches, references, segments
from tests.conformance.storage.bench import Bench

DAY = 86_400


def test_segments_of_a_batch_are_forgotten_only_when_its_files_have_them(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    with pytest.raises(Conflict, match="finalizing"):
        references.forget_segments(bench.db, batch_id)
    batches.give_up(bench.db, bench.must_claim(UnitKind.FINALIZE), errors=[])
    with pytest.raises(Conflict, match="failed"):
        references.forget_segments(bench.db, batch_id)
    assert len(segments.list_for_batch(bench.db, batch_id)[0]) == 2
    with pytest.raises(NotFound, match="batch_none"):
        references.forget_segments(bench.db, BatchId("batch_none"))


def test_batches_are_collectable_once_and_from_an_instant_on(bench: Bench) -> None:
    ended = bench.clock.now
    batch_ids = []
    for _ in range(2):
        batch_ids.append(bench.add_planned(3, 2))
        bench.run_all_shards()
        bench.complete(bench.must_claim(UnitKind.FINALIZE))
    bench.add_planned(3)  # it runs
    bench.record(bench.must_claim(UnitKind.SHARD), [0])
    bench.clock.advance(1)
    assert references.list_collectable(bench.db, ended_before=ended) == []
    now = bench.clock.now
    assert references.list_collectable(bench.db, ended_before=now) == sorted(batch_ids)
    assert len(references.list_collectable(bench.db, ended_before=now, limit=1)) == 1
    assert references.forget_segments(bench.db, batch_ids[0]) == 2
    assert references.list_collectable(bench.db, ended_before=now) == batch_ids[1:]


def test_a_sample_for_audits_has_running_and_recently_ended_batches(bench: Bench) -> None:
    old = bench.add_planned(3, 2)
    bench.run_all_shards()
    bench.complete(bench.must_claim(UnitKind.FINALIZE))
    bench.clock.advance(DAY)
    since = bench.clock.now
    ended = set()
    for _ in range(3):
        ended.add(bench.add_planned(3, 2))
        bench.run_all_shards()
        bench.complete(bench.must_claim(UnitKind.FINALIZE))
    running = {bench.add_planned(3, 2) for _ in range(3)}
    bench.add_batch()  # not planned yet: there is nothing to look at
    found = audits.sample(bench.db, ended_since=since, limit=4)
    assert len(found) == len(set(found)) == 4
    assert (len(ended & set(found)), len(running & set(found))) == (2, 2)
    assert set(audits.sample(bench.db, ended_since=since, limit=100)) == ended | running
    assert old not in found
    assert batches.get(bench.db, old).status is BatchStatus.COMPLETED
