from collections.abc import Callable
from datetime import timedelta

import pytest
import sqlalchemy as sa

from jobs import finalizer
from jobs.domain.batch import Batch, BatchStatus, LineProblem
from jobs.domain.errors import BatchctlError, BlobCorrupt, BlobMissing, LeaseLost
from jobs.domain.result import Result, Usage, render_result
from jobs.domain.retry import Settlement
from jobs.domain.shard import Lease, Segment, UnitKind, UnitState, bitmap
from jobs.finalizer import CountMismatch, InputLost
from storage import batches, files, segments, units
from storage.blobs.base import input_key, segment_key
from storage.jsonl import encode_segment
from storage.tables import segments as segments_table
from storage.tables import shards as shards_table
from tests.builders import Bench, ScriptedEngine, Worker, ids_of, make_lines

Entry = tuple[int, int, bytes]


def entry(index: int) -> Entry:
    line = render_result(
        Result(id=1, text="x"),
        custom_id=f"r{index}",
        request_id=str(index),
        endpoint="/v1/chat/completions",
        model="m",
        created=1,
    )
    return index, 0, line


def record(bench: Bench, lease: Lease, entries: list[Entry], *, positions: range) -> str:
    """Record a segment that says it has the results of `positions`; return its key."""
    info = bench.blobs.put(segment_key(lease, 0, "0" * 64), encode_segment(entries))
    segments.record(
        bench.db,
        lease,
        Segment(
            unit_id=lease.unit_id,
            epoch=lease.epoch,
            sequence=0,
            blob_key=info.key,
            sha256=info.sha256,
            num_bytes=info.num_bytes,
            positions=bitmap(list(positions), len(positions)),
            num_completed=len(positions),
            num_failed=0,
            usage=Usage(),
        ),
        lease_seconds=60,
    )
    return info.key


def refuse_to_publish(bench: Bench, error: type[BatchctlError]) -> None:
    lease = bench.claim(UnitKind.FINALIZE)
    with pytest.raises(error):
        finalizer.finalize(bench.db, bench.blobs, lease)
    batch = batches.get(bench.db, lease.batch_id)
    assert batch.status is BatchStatus.FINALIZING
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    published, _ = files.list_page(bench.db, tenant_id=batch.tenant_id, purpose="batch_output")
    assert published == []
    assert list(bench.blobs.list_keys("outputs/")) == []


def run(bench: Bench, num_lines: int = 6, *, shard_lines: int = 1000) -> Batch:
    batch = bench.submit_planned(make_lines(num_lines), shard_lines=shard_lines)
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    return batch


@pytest.mark.parametrize("at", [0, 5, 30, -1])
def test_segment_with_a_changed_byte_is_not_published(bench: Bench, at: int) -> None:
    run(bench)
    (key,) = bench.blobs.list_keys("segments/")
    content = bytearray(bench.blobs.get(key))
    content[at] ^= 1
    bench.blobs.put(key, bytes(content))
    refuse_to_publish(bench, BlobCorrupt)


def test_segment_that_is_gone_stops_the_publication(bench: Bench) -> None:
    run(bench, shard_lines=2)
    bench.blobs.delete(list(bench.blobs.list_keys("segments/"))[1])
    refuse_to_publish(bench, BlobMissing)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entries: entries[:-1],
        lambda entries: entries[1:],
        lambda entries: [entries[0], *entries],
        lambda entries: [*entries[:-1], entry(7)],
        lambda entries: [entries[0], entries[0], *entries[2:]],
    ],
    ids=["last missing", "first missing", "one too many", "one of another shard", "one twice"],
)
def test_results_that_do_not_add_up_are_not_published(
    bench: Bench, damage: Callable[[list[Entry]], list[Entry]]
) -> None:
    bench.submit_planned(make_lines(3))
    lease = bench.claim(UnitKind.SHARD)
    record(bench, lease, damage([entry(n) for n in range(3)]), positions=range(3))
    refuse_to_publish(bench, CountMismatch)


def test_a_batch_that_lost_a_whole_shard_is_not_published(bench: Bench) -> None:
    run(bench, shard_lines=2)
    with bench.db.transaction() as tx:
        last = sa.select(sa.func.max(shards_table.c.ordinal)).scalar_subquery()
        gone = sa.select(shards_table.c.unit_id).where(shards_table.c.ordinal == last)
        unit_id = tx.execute(gone).scalar_one()
        for table in (segments_table, shards_table):
            tx.execute(sa.delete(table).where(table.c.unit_id == unit_id))
    refuse_to_publish(bench, CountMismatch)


@pytest.mark.parametrize(
    ("reason", "code", "message"),
    [
        ("engine_misconfigured: /srv/m: none.", "engine_misconfigured", "cannot be loaded."),
        ("attempts_exhausted", "attempts_exhausted", "could not be run"),
        ("stuck", "attempts_exhausted", "could not be run"),
    ],
)
def test_lines_of_a_failed_shard_say_why_they_have_no_answer(
    bench: Bench, reason: str, code: str, message: str
) -> None:
    bench.submit_planned(make_lines(5), shard_lines=3)
    lease = bench.claim(UnitKind.SHARD)
    units.settle(bench.db, lease, Settlement(state=UnitState.FAILED, exit=reason))
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    batch = bench.finalize()
    assert batch.status is BatchStatus.COMPLETED
    assert ids_of(bench.output_of(batch)) == ["r3", "r4"]
    errors = bench.errors_of(batch)
    assert ids_of(errors) == ["r0", "r1", "r2"]
    for line in errors:
        assert line["response"] is None
        assert line["error"]["code"] == code
        assert message in line["error"]["message"]
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 3)


def test_finished_lines_of_a_failed_shard_are_kept(bench: Bench) -> None:
    bench.submit_planned(make_lines(6))
    engine = ScriptedEngine()
    engine.pause_after(2)
    with Worker(bench, engine) as worker:
        engine.paused.wait(20)
        worker.stop.set()
        worker.result()
    lease = bench.claim(UnitKind.SHARD)
    units.settle(bench.db, lease, Settlement(state=UnitState.FAILED, exit="x: Why."))
    batch = bench.finalize()
    assert ids_of(bench.output_of(batch)) == ["r0", "r1"]
    assert ids_of(bench.errors_of(batch)) == ["r2", "r3", "r4", "r5"]


def test_files_are_those_of_the_batch_and_are_kept_for_as_long_as_it_asks(bench: Bench) -> None:
    bench.submit(make_lines(2), output_expires_after_seconds=7200)
    bench.plan()
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    batch = bench.finalize()
    assert batch.output_file_id is not None
    file = files.get(bench.db, batch.output_file_id)
    content = bench.blobs.get(file.blob_key)
    assert (file.purpose, file.num_bytes) == ("batch_output", len(content))
    assert file.expires_at == file.created_at + timedelta(seconds=7200)
    assert content.endswith(b"}\n")


def test_second_finalizer_publishes_nothing(bench: Bench) -> None:
    run(bench)
    old = bench.claim(UnitKind.FINALIZE)
    units.reap(bench.db, now=bench.db.now() + timedelta(hours=1))
    bench.clock.advance(7200)
    with pytest.raises(LeaseLost):
        finalizer.finalize(bench.db, bench.blobs, old)
    assert batches.get(bench.db, old.batch_id).status is BatchStatus.FINALIZING
    batch = bench.finalize()
    assert batch.status is BatchStatus.COMPLETED
    assert ids_of(bench.output_of(batch)) == [f"r{n}" for n in range(6)]


def test_progress_is_told_shard_by_shard(bench: Bench) -> None:
    run(bench, 5, shard_lines=2)
    told: list[int] = []
    lease = bench.claim(UnitKind.FINALIZE)
    finalizer.finalize(bench.db, bench.blobs, lease, on_progress=told.append)
    assert told == [2, 4, 5]


def test_input_that_is_gone_with_lines_unanswered_is_said_and_ends_the_batch(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(2))
    lease = bench.claim(UnitKind.SHARD)
    reason = "blob_missing: There is no blob."
    units.settle(bench.db, lease, Settlement(state=UnitState.FAILED, exit=reason))
    bench.blobs.delete(input_key(batch.input_file_id))
    finalize_lease = bench.claim(UnitKind.FINALIZE)
    with pytest.raises(InputLost):
        finalizer.finalize(bench.db, bench.blobs, finalize_lease)
    problem = LineProblem(code="input_lost", message="gone")
    batches.give_up(bench.db, finalize_lease, errors=[problem])
    ended = batches.get(bench.db, batch.id)
    assert ended.status is BatchStatus.FAILED
    assert ended.errors == (problem,)
    assert ended.output_file_id is None
