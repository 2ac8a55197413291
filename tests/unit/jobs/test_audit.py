"""An audit of batches that are as they should be, and of each kind that is not."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from jobs import audit as auditing
from jobs.audit import Report
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import NotFound
from jobs.domain.ids import BatchId
from jobs.domain.responses import RESPONSES
from jobs.domain.retry import Settlement
from jobs.domain.shard import UnitKind, UnitState
from jobs.feed import FeedSettings
from storage import batches, files, references, units
from storage.blobs.base import hash_bytes, input_key, segments_prefix
from storage.jsonl import decode_segment, encode_segment
from storage.tables import files as files_table
from storage.tables import segments as segments_table
from storage.tables import shards as shards_table
from tests.builders import Bench, ScriptedEngine, Worker, make_line, make_lines

NUM_LINES = 7
EACH = FeedSettings(flush_results=2, flush_bytes=1 << 40, flush_seconds=1e9, poll_seconds=0.02)


def content() -> bytes:
    """Return lines of which the last one fails."""
    return make_lines(NUM_LINES - 1) + make_line("bad", "refuse this") + b"\n"


def run_part(bench: Bench, num_answered: int) -> Batch:
    """Run so many requests of a batch of three shards and stop."""
    batch = bench.submit_planned(content(), shard_lines=3)
    engine = ScriptedEngine(slots=1)
    engine.pause_after(num_answered)
    with Worker(bench, engine, settings=EACH) as worker:
        assert engine.paused.wait(20)
        worker.stop.set()
        worker.result()
    return batches.get(bench.db, batch.id)


def run(bench: Bench) -> Batch:
    bench.submit_planned(content(), shard_lines=3)
    with Worker(bench, ScriptedEngine(), settings=EACH) as worker:
        worker.result()
    return bench.finalize()


def audit(bench: Bench, batch: Batch, **options: Any) -> Report:  # noqa: ANN401
    return auditing.audit(bench.db, bench.blobs, batch.id, **options)


def violated(bench: Bench, batch: Batch) -> set[str]:
    return set(audit(bench, batch).violated)


def skipped(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.skipped is not None}


def told(report: Report) -> str:
    return "; ".join(one for check in report.checks for one in check.told)


# --- as it should be ---


def test_batch_that_is_finished_passes_every_check(bench: Bench) -> None:
    batch = run(bench)
    seen: list[int] = []
    report = audit(bench, batch, on_progress=seen.append)
    assert report.violated == ()
    assert skipped(report) == set()
    assert (report.status, report.num_lines) == (BatchStatus.COMPLETED, NUM_LINES)
    checked = {check.name: check.num_checked for check in report.checks}
    assert (checked["complete"], checked["order"], checked["shards"]) == (NUM_LINES, NUM_LINES, 3)
    assert checked["files"] == 2
    assert seen == sorted(seen)


@pytest.mark.parametrize("num_answered", [0, 1, 4, 6])
def test_batch_that_runs_passes_every_check(bench: Bench, num_answered: int) -> None:
    batch = run_part(bench, num_answered)
    report = audit(bench, batch)
    assert report.violated == ()
    assert skipped(report) == {"files"}
    assert {c.name: c.num_checked for c in report.checks}["order"] == num_answered


def test_batch_of_responses_is_recounted_by_the_names_they_have_for_tokens(bench: Bench) -> None:
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": RESPONSES, "body": body}
        for n, body in enumerate([{"model": "simulated", "input": text} for text in "abc"])
    ]
    bench.submit(b"".join(json.dumps(line).encode() + b"\n" for line in lines), endpoint=RESPONSES)
    bench.plan()
    with Worker(bench, ScriptedEngine(), settings=EACH) as worker:
        worker.result()
    batch = bench.finalize()
    assert batch.usage.completion_tokens > 0
    assert audit(bench, batch).violated == ()


def test_batch_that_was_cancelled_half_way_passes(bench: Bench) -> None:
    batch = run_part(bench, 4)
    batches.request_cancel(bench.db, batch.id)
    batch = bench.finalize()
    assert batch.status is BatchStatus.CANCELLED
    assert audit(bench, batch).violated == ()


def test_batch_that_was_cancelled_before_its_plan_passes(bench: Bench) -> None:
    batch = bench.submit(content())
    batches.request_cancel(bench.db, batch.id)
    batch = bench.finalize()
    assert batch.status is BatchStatus.CANCELLED
    assert audit(bench, batch).violated == ()


def test_batch_that_was_refused_passes(bench: Bench) -> None:
    bench.submit(b"no json\n")
    batch = bench.plan()
    assert batch.status is BatchStatus.FAILED
    report = audit(bench, batch)
    assert report.violated == ()
    assert skipped(report) >= {"shards", "files"}


def test_batch_with_a_failed_shard_passes(bench: Bench) -> None:
    bench.submit_planned(content(), shard_lines=3)
    lease = bench.claim(UnitKind.SHARD)
    units.settle(bench.db, lease, Settlement(state=UnitState.FAILED, exit="x: y"))
    with Worker(bench, ScriptedEngine(), settings=EACH) as worker:
        worker.result()
    assert audit(bench, bench.finalize()).violated == ()


def test_segments_that_were_collected_are_said_to_be_and_the_files_are_enough(bench: Bench) -> None:
    batch = run(bench)
    references.forget_segments(bench.db, batch.id)
    report = audit(bench, batch)
    assert report.violated == ()
    assert skipped(report) == {"segments"}


def test_files_that_were_deleted_are_said_to_be(bench: Bench) -> None:
    batch = run(bench)
    assert batch.output_file_id is not None
    files.mark_deleted(bench.db, batch.output_file_id)
    report = audit(bench, batch)
    assert report.violated == ()
    assert skipped(report) == {"files", "complete", "unique", "order"}


def test_unknown_batch_is_said_to_be_unknown(bench: Bench) -> None:
    with pytest.raises(NotFound, match="batch_none"):
        auditing.audit(bench.db, bench.blobs, BatchId("batch_none"))


# --- rows that are wrong ---


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("num_done", 2),
        ("num_completed", 2),
        ("num_failed", 1),
        ("prompt_tokens", 1),
        ("completion_tokens", 1),
        ("cached_tokens", 1),
        ("done", b"\3"),
        ("done", b"\x0f"),
    ],
)
def test_shard_whose_numbers_are_not_those_of_its_segments_fails(
    bench: Bench, column: str, value: object
) -> None:
    batch = run_part(bench, 4)
    assert violated(bench, batch) == set()
    with bench.db.transaction() as tx:
        tx.execute(
            sa.update(shards_table)
            .where(shards_table.c.batch_id == batch.id, shards_table.c.ordinal == 0)
            .values({column: value})
        )
    assert "counts" in violated(bench, batch)


@pytest.mark.parametrize("values", [{"first_index": 1}, {"num_lines": 2}])
def test_shards_that_leave_lines_out_fail(bench: Bench, values: dict[str, int]) -> None:
    batch = run_part(bench, 0)
    with bench.db.transaction() as tx:
        tx.execute(
            sa.update(shards_table)
            .where(shards_table.c.batch_id == batch.id, shards_table.c.ordinal == 0)
            .values(values)
        )
    assert "shards" in violated(bench, batch)


def test_segment_row_that_is_gone_fails(bench: Bench) -> None:
    batch = run_part(bench, 4)
    delete_first_segment(bench, batch)
    assert violated(bench, batch) >= {"complete", "counts"}


def delete_first_segment(bench: Bench, batch: Batch) -> None:
    key = next(iter(bench.blobs.list_keys(segments_prefix(batch.id))))
    with bench.db.transaction() as tx:
        tx.execute(sa.delete(segments_table).where(segments_table.c.blob_key == key))


@pytest.mark.parametrize("status", ["running", "finished"])
def test_segment_row_that_says_too_much_fails(bench: Bench, status: str) -> None:
    batch = run(bench) if status == "finished" else run_part(bench, 4)
    with bench.db.transaction() as tx:
        tx.execute(sa.update(segments_table).values(completion_tokens=999))
    assert "counts" in violated(bench, batch)


def test_lease_that_nobody_reaped_fails(bench: Bench) -> None:
    batch = run_part(bench, 1)
    bench.claim(UnitKind.SHARD)
    assert violated(bench, batch) == set()
    bench.clock.advance(60 + 61)
    assert violated(bench, batch) == {"leases"}
    assert audit(bench, batch, grace_seconds=None).violated == ()


@pytest.mark.parametrize("file", ["output", "error"])
def test_file_row_with_another_hash_fails(bench: Bench, file: str) -> None:
    batch = run(bench)
    file_id = batch.output_file_id if file == "output" else batch.error_file_id
    with bench.db.transaction() as tx:
        tx.execute(
            sa.update(files_table).where(files_table.c.id == file_id).values(sha256="0" * 64)
        )
    assert violated(bench, batch) == {"files"}


# --- blobs that are wrong ---


@pytest.mark.parametrize("status", ["running", "finished"])
def test_segment_with_a_flipped_byte_fails(bench: Bench, status: str) -> None:
    batch = run(bench) if status == "finished" else run_part(bench, 4)
    key = next(iter(bench.blobs.list_keys(segments_prefix(batch.id))))
    bench.blobs.put(key, bench.blobs.get(key)[:-1] + b"?")
    assert violated(bench, batch) == {"segments", "complete"}
    assert key in told(audit(bench, batch))


def test_segment_that_is_gone_fails(bench: Bench) -> None:
    batch = run_part(bench, 4)
    bench.blobs.delete(next(iter(bench.blobs.list_keys(segments_prefix(batch.id)))))
    assert violated(bench, batch) == {"segments", "complete"}


def rewrite_segment(bench: Bench, batch: Batch, change: Callable[[list[Any]], list[Any]]) -> None:
    """Write other results into the first segment, and their hash into its row."""
    key = next(iter(bench.blobs.list_keys(segments_prefix(batch.id))))
    data = encode_segment(change(decode_segment(bench.blobs.get(key))))
    bench.blobs.put(key, data)
    with bench.db.transaction() as tx:
        tx.execute(
            sa.update(segments_table)
            .where(segments_table.c.blob_key == key)
            .values(sha256=hash_bytes(data), num_bytes=len(data))
        )


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda entries: entries[:-1], "segments"),
        (lambda entries: [entries[0], entries[0]], "unique"),
        (lambda entries: [(99, *entries[0][1:]), entries[1]], "segments"),
        (lambda entries: [(entries[0][0], 1, entries[0][2]), entries[1]], "counts"),
        (lambda entries: [(*entries[0][:2], b"{"), entries[1]], "segments"),
        (lambda entries: [(*entries[0][:2], entries[1][2]), entries[1]], "order"),
    ],
    ids=["fewer", "twice", "of another shard", "as an error", "no json", "of another line"],
)
def test_segment_with_other_results_fails(
    bench: Bench, change: Callable[[list[Any]], list[Any]], check: str
) -> None:
    batch = run_part(bench, 4)
    rewrite_segment(bench, batch, change)
    assert check in violated(bench, batch)


def rewrite_output(
    bench: Bench, batch: Batch, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    """Write other lines into the output file, and their hash into its row."""
    assert batch.output_file_id is not None
    file = files.get(bench.db, batch.output_file_id)
    data = b"".join(line + b"\n" for line in change(bench.blobs.get(file.blob_key).splitlines()))
    bench.blobs.put(file.blob_key, data)
    with bench.db.transaction() as tx:
        tx.execute(
            sa.update(files_table)
            .where(files_table.c.id == file.id)
            .values(sha256=hash_bytes(data), num_bytes=len(data))
        )


def rename(line: bytes) -> bytes:
    return json.dumps({**json.loads(line), "custom_id": "nobody's"}).encode()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: lines[1:], {"complete": 1}),
        (lambda lines: lines[:-1], {"complete": 1}),
        (lambda lines: [lines[0], *lines], {"unique": 1}),
        (lambda lines: [*lines, lines[0]], {"unique": 1}),
        (lambda lines: [*lines[1:3], lines[0], *lines[3:], lines[0]], {"unique": 1}),
        (lambda lines: [*lines[:2], rename(lines[2]), *lines[3:]], {"complete": 1, "order": 1}),
        (lambda lines: [*lines, rename(lines[0])], {"order": 1}),
        (lambda lines: [lines[1], lines[0], *lines[2:]], {"order": 1}),
        (lambda _lines: [], {"complete": NUM_LINES - 1}),
    ],
    ids=[
        *("first missing", "last missing", "first doubled", "first again at the end"),
        *("moved and doubled", "renamed", "one of nobody", "swapped", "empty"),
    ],
)
def test_output_file_with_other_lines_fails(
    bench: Bench, change: Callable[[list[bytes]], list[bytes]], expected: dict[str, int]
) -> None:
    batch = run(bench)
    rewrite_output(bench, batch, change)
    found = {check.name: check.num_problems for check in audit(bench, batch).checks if not check.ok}
    found.pop("counts", None)
    assert found == expected


def test_output_file_with_a_flipped_byte_fails(bench: Bench) -> None:
    batch = run(bench)
    assert batch.output_file_id is not None
    key = files.get(bench.db, batch.output_file_id).blob_key
    bench.blobs.put(key, bench.blobs.get(key)[:-2] + b"?\n")
    assert violated(bench, batch) == {"files"}


def test_output_file_that_is_gone_fails(bench: Bench) -> None:
    batch = run(bench)
    assert batch.output_file_id is not None
    bench.blobs.delete(files.get(bench.db, batch.output_file_id).blob_key)
    assert violated(bench, batch) == {"files"}


def test_input_that_changed_fails(bench: Bench) -> None:
    batch = run_part(bench, 4)
    key = input_key(batch.input_file_id)
    bench.blobs.put(key, bench.blobs.get(key).replace(b"hello 5", b"jello 5"))
    assert violated(bench, batch) == {"input"}


def test_report_holds_nothing_of_what_is_in_a_line(bench: Bench) -> None:
    batch = run(bench)
    rewrite_output(bench, batch, lambda lines: [rename(line) for line in lines])
    report = told(audit(bench, batch))
    assert report
    for word in ("hello", "re:", "nobody", "r0"):
        assert word not in report
