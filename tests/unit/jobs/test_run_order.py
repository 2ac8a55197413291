"""Batches that run in another order than their file, from planning to the files."""

import hashlib
import json
import random
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select, update

from jobs import finalizer
from jobs.audit import audit
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import BlobCorrupt
from jobs.domain.shard import RUN_ORDER_FORMAT, UnitKind, count_bits
from jobs.domain.suspects import CAREFUL_STALLS
from jobs.feed import FeedSettings
from storage import batches, files, references, segments, shards, units
from storage.blobs.base import hash_bytes
from storage.jsonl import decode_segment, encode_segment
from storage.tables import segments as segments_table
from storage.tables import units as units_table
from tests.builders import (
    Bench,
    ScriptedEngine,
    Worker,
    await_set,
    await_true,
    ids_of,
    make_line,
    make_lines,
)

GREEDY: dict[str, Any] = {"temperature": 0}
FLUSH_EACH = FeedSettings(flush_results=1, flush_bytes=1, flush_seconds=0, poll_seconds=0.02)


def beginning(group: int) -> str:
    return hashlib.sha256(str(group).encode()).hexdigest() * 10


def shuffled_groups(num_groups: int, size: int) -> list[bytes]:
    """Return lines of groups that share 640 characters, in a random order."""
    lines = [
        make_line(f"g{group}-{n}", f"{beginning(group)} {group} {n}")
        for group in range(num_groups)
        for n in range(size)
    ]
    random.Random(3).shuffle(lines)
    return lines


def with_repeats(num_lines: int, **body: object) -> list[bytes]:
    """Return lines of which each second one repeats the one before."""
    return [make_line(f"r{n}", f"hello {n // 2}", **{**GREEDY, **body}) for n in range(num_lines)]


def ids_in(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines]


def contents_of(lines: list[dict[str, Any]]) -> list[str]:
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


def join(lines: list[bytes]) -> bytes:
    return b"\n".join(lines) + b"\n"


def is_run_order(bench: Bench, batch: Batch) -> bool:
    return any(shard.is_run_order for shard, _ in shards.list_for_batch(bench.db, batch.id))


def test_nothing_is_written_where_nothing_is_gained(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(50))
    assert not is_run_order(bench, batch)
    assert list(bench.blobs.list_keys("plans/")) == []


def test_groups_run_together_and_answers_come_back_in_the_order_of_the_file(
    bench: Bench,
) -> None:
    lines = shuffled_groups(6, 5)
    batch = bench.submit_planned(b"\n\n" + join(lines), shard_lines=7)
    assert is_run_order(bench, batch)
    engine = ScriptedEngine(slots=4, seed=1)
    with Worker(bench, engine) as worker:
        assert worker.result() == 30
    groups = [text.split(" ")[1] for text in engine.asked]
    assert len([1 for a, b in pairwise(groups) if a != b]) == 5
    batch = bench.finalize()
    assert (batch.status, batch.error_file_id) == (BatchStatus.COMPLETED, None)
    output = bench.output_of(batch)
    assert ids_of(output) == ids_in(lines)
    for line, content in zip(lines, contents_of(output), strict=True):
        assert content == "re: " + json.loads(line)["body"]["messages"][0]["content"]


def test_equal_requests_run_once_and_each_gets_its_answer(bench: Bench) -> None:
    lines = with_repeats(20)
    batch = bench.submit_planned(join(lines), shard_lines=3)
    assert batches.get(bench.db, batch.id).request_counts.total == 20
    engine = ScriptedEngine(slots=4, seed=2)
    with Worker(bench, engine) as worker:
        assert worker.result() == 10
    assert sorted(engine.asked) == sorted(f"hello {n}" for n in range(10))
    batch = bench.finalize()
    output = bench.output_of(batch)
    assert ids_of(output) == [f"r{n}" for n in range(20)]
    assert contents_of(output) == [f"re: hello {n // 2}" for n in range(20)]
    assert len({line["id"] for line in output}) == 20
    assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 0)
    for leader, follower in zip(output[::2], output[1::2], strict=True):
        body = follower["response"]["body"]
        assert body["batchctl"]["same_as"] == leader["custom_id"]
        assert body["usage"]["total_tokens"] == 0
        assert "batchctl" not in leader["response"]["body"]
    spent = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in output)
    assert batch.usage.completion_tokens == spent, "what was computed, once"


def test_counts_are_right_while_leaders_are_done(bench: Bench) -> None:
    batch = bench.submit_planned(join(with_repeats(20)))
    engine = ScriptedEngine()
    engine.pause_after(4)
    with Worker(bench, engine, settings=FLUSH_EACH) as worker:
        await_true(lambda: batches.get(bench.db, batch.id).request_counts.completed == 8)
        engine.go_on()
        worker.result()
    assert bench.finalize().request_counts.completed == 20


@pytest.mark.parametrize(
    ("body", "num_run"),
    [
        ({}, 10),
        ({"temperature": None, "seed": 7}, 10),
        ({"temperature": None}, 20),
        ({"temperature": 0.7}, 20),
    ],
    ids=["greedy", "seeded", "default", "sampled"],
)
def test_only_answers_that_are_determined_are_shared(
    bench: Bench, body: dict[str, Any], num_run: int
) -> None:
    bench.submit_planned(join(with_repeats(20, **body)))
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == num_run


@pytest.mark.parametrize(("fold", "num_run"), [("all", 10), ("none", 20)])
def test_an_operator_may_share_all_answers_or_none(bench: Bench, fold: str, num_run: int) -> None:
    body = {"temperature": 0.7} if fold == "all" else {}
    bench.submit_planned(join(with_repeats(20, **body)), fold=fold)
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == num_run


def test_requests_that_differ_in_anything_are_not_equal(bench: Bench) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    lines = [
        make_line("a", **GREEDY),
        make_line("b", **GREEDY, max_tokens=5),
        make_line("c", **GREEDY, stop="x"),
        make_line("d", temperature=0, top_k=1),
        make_line("e", "hello ", **GREEDY),
        make_line("f", **GREEDY, response_format=schema),
    ]
    batch = bench.submit_planned(join(lines))
    assert not is_run_order(bench, batch)


def test_errors_are_shared_as_answers_are(bench: Bench) -> None:
    lines = [make_line(f"r{n}", "refuse", **GREEDY) for n in range(3)] + with_repeats(4)
    bench.submit_planned(join([*lines[:3], *(make_line(f"s{n}", **GREEDY) for n in range(2))]))
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 2
    batch = bench.finalize()
    assert ids_of(bench.errors_of(batch)) == ["r0", "r1", "r2"]
    assert ids_of(bench.output_of(batch)) == ["s0", "s1"]
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 3)


def test_a_poison_line_takes_its_equals_with_it_and_nobody_else(bench: Bench) -> None:
    lines = [make_line(f"r{n}", "poison", **GREEDY) for n in range(2)] + [
        make_line(f"s{n}", f"hello {n}", **GREEDY) for n in range(6)
    ]
    bench.submit_planned(join(lines))
    with Worker(bench, ScriptedEngine(slots=8, total=7)) as worker:
        worker.result()
    batch = bench.finalize()
    assert ids_of(bench.errors_of(batch)) == ["r0", "r1"]
    assert ids_of(bench.output_of(batch)) == [f"s{n}" for n in range(6)]


def test_cancelled_batch_names_every_line_that_did_not_run(bench: Bench) -> None:
    batch = bench.submit_planned(join(with_repeats(20)), shard_lines=4)
    engine = ScriptedEngine(slots=2)
    engine.pause_after(3)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        batches.request_cancel(bench.db, batch.id)
        await_set(engine.dropped)
        worker.result()
    batch = bench.finalize()
    assert batch.status is BatchStatus.CANCELLED
    assert (batch.request_counts.completed, batch.request_counts.failed) == (6, 14)
    output, errors = bench.output_of(batch), bench.errors_of(batch)
    assert ids_of(output) == [f"r{n}" for n in range(6)]
    assert ids_of(errors) == [f"r{n}" for n in range(6, 20)]
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}


def test_worker_that_dies_leaves_what_is_done_and_another_goes_on(bench: Bench) -> None:
    batch = bench.submit_planned(join(with_repeats(40)), shard_lines=50)
    engine = ScriptedEngine(slots=2)
    engine.pause_after(7)
    with Worker(bench, engine, settings=FLUSH_EACH) as worker:
        await_true(lambda: batches.get(bench.db, batch.id).request_counts.completed == 14)
        units.reap(bench.db, now=bench.db.now() + timedelta(hours=1))
        await_set(engine.dropped)
        worker.result()
    bench.clock.advance(2 * 3600)
    again = ScriptedEngine(slots=2)
    with Worker(bench, again) as worker:
        assert worker.result() == 13
    assert not set(again.asked) & {f"hello {n}" for n in range(7)}
    batch = bench.finalize()
    assert ids_of(bench.output_of(batch)) == [f"r{n}" for n in range(40)]


def test_workers_that_die_lead_to_a_trial_in_the_run_order_too(bench: Bench) -> None:
    bench.submit_planned(join(with_repeats(40)))
    for _ in range(CAREFUL_STALLS):
        bench.claim(UnitKind.SHARD)
        units.reap(bench.db, now=bench.db.now() + timedelta(hours=1))
        bench.clock.advance(2 * 3600)
    with Worker(bench, ScriptedEngine(slots=64)) as worker:
        assert worker.result() == 20
    assert ids_of(bench.output_of(bench.finalize())) == [f"r{n}" for n in range(40)]


def test_input_that_is_gone_does_not_stop_a_batch_whose_lines_are_written_again(
    bench: Bench,
) -> None:
    batch = bench.submit_planned(join(with_repeats(6)))
    bench.blobs.delete(files.get(bench.db, batch.input_file_id).blob_key)
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 3
    assert len(bench.output_of(bench.finalize())) == 6


def test_older_workers_leave_such_batches_alone(bench: Bench) -> None:
    bench.submit_planned(join(with_repeats(4)))
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    bench.submit_planned(make_lines(2))
    with bench.db.read() as tx:
        found = tx.execute(select(units_table.c.kind, units_table.c.format_version)).all()
    assert {(row.kind, row.format_version) for row in found} == {
        ("plan", 1),
        ("shard", RUN_ORDER_FORMAT),
        ("finalize", RUN_ORDER_FORMAT),
        ("shard", 1),
    }


# --- what looks after batches ---


def run(bench: Bench, lines: list[bytes], **limits: Any) -> Batch:  # noqa: ANN401
    bench.submit_planned(join(lines), **limits)
    with Worker(bench, ScriptedEngine(), settings=FLUSH_EACH) as worker:
        worker.result()
    return bench.finalize()


def test_audit_follows_the_run_order(bench: Bench) -> None:
    lines = with_repeats(12) + shuffled_groups(4, 4)
    running = bench.submit_planned(join(lines), shard_lines=5)
    engine = ScriptedEngine()
    engine.pause_after(6)
    with Worker(bench, engine, settings=FLUSH_EACH) as worker:
        await_true(lambda: batches.get(bench.db, running.id).request_counts.completed >= 6)
        assert audit(bench.db, bench.blobs, running.id).violated == ()
        engine.go_on()
        worker.result()
    ended = bench.finalize()
    report = audit(bench.db, bench.blobs, ended.id)
    assert report.violated == ()
    assert {check.name for check in report.checks if check.skipped} == set()


def test_audit_misses_a_line_that_another_one_answers_for(bench: Bench) -> None:
    batch = bench.submit_planned(join(with_repeats(8)))
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    (segment,) = segments.iterate_for_batch(bench.db, batch.id)
    entries = decode_segment(bench.blobs.get(segment.blob_key))
    content = encode_segment(entries[:-1])
    bench.blobs.put(segment.blob_key, content)
    with bench.db.transaction() as tx:
        tx.execute(
            update(segments_table).values(
                sha256=hash_bytes(content), num_bytes=len(content), num_completed=7
            )
        )
    violated = audit(bench.db, bench.blobs, batch.id).violated
    assert {"complete", "counts"} <= set(violated)


def test_lost_results_of_a_run_order_are_run_again(bench: Bench) -> None:
    batch = bench.submit_planned(join(with_repeats(20)), shard_lines=5)
    with Worker(bench, ScriptedEngine(), settings=FLUSH_EACH) as worker:
        worker.result()
    first = next(iter(segments.iterate_for_batch(bench.db, batch.id)))
    bench.blobs.put(first.blob_key, b"something else")
    lease = bench.claim(UnitKind.FINALIZE)
    with pytest.raises(BlobCorrupt):
        finalizer.finalize(bench.db, bench.blobs, lease)
    assert finalizer.run_lost_again(bench.db, bench.blobs, lease)
    lost = count_bits(first.positions)
    assert batches.get(bench.db, batch.id).request_counts.completed == 20 - 2 * lost
    engine = ScriptedEngine()
    with Worker(bench, engine) as worker:
        worker.result()
    assert len(engine.asked) == lost
    ended = bench.finalize()
    assert ids_of(bench.output_of(ended)) == [f"r{n}" for n in range(20)]
    assert audit(bench.db, bench.blobs, ended.id).violated == ()


def test_the_run_order_goes_when_the_segments_have_gone(bench: Bench) -> None:
    batch = bench.submit_planned(join(with_repeats(6)))
    (key,) = bench.blobs.list_keys("plans/")
    assert references.find_needed(bench.db, [key]) == {key}
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    bench.finalize()
    assert references.find_needed(bench.db, [key]) == {key}, "an audit may read it"
    references.forget_segments(bench.db, batch.id)
    assert references.find_needed(bench.db, [key]) == set()


def test_finalizer_refuses_a_batch_that_lacks_a_follower(bench: Bench) -> None:
    batch = bench.submit_planned(join(with_repeats(8)))
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    (segment,) = segments.iterate_for_batch(bench.db, batch.id)
    entries = decode_segment(bench.blobs.get(segment.blob_key))
    content = encode_segment(entries[:-1])
    bench.blobs.put(segment.blob_key, content)
    with bench.db.transaction() as tx:
        tx.execute(update(segments_table).values(sha256=hash_bytes(content)))
    lease = bench.claim(UnitKind.FINALIZE)
    with pytest.raises(finalizer.CountMismatch):
        finalizer.finalize(bench.db, bench.blobs, lease)
    assert batches.get(bench.db, batch.id).output_file_id is None


def normalised(lines: list[dict[str, Any]]) -> list[Any]:
    """Leave out what two runs may differ in: ids, times, and which of two equal ones ran."""
    for line in lines:
        line.pop("id")
        line["response"].pop("request_id")
        body = line["response"]["body"]
        for name in ("id", "created", "usage", "batchctl"):
            body.pop(name, None)
    return lines


def test_answers_are_the_same_in_any_order(bench: Bench) -> None:
    lines = with_repeats(12) + [
        make_line(f"g{n}", f"{beginning(n % 3)} {n}", **GREEDY, max_tokens=2 ** (n % 9 + 1))
        for n in range(30)
    ]
    planned = run(bench, lines, shard_lines=4)
    plain = run(bench, lines, shard_lines=4, fold="none", by_prefix=False, by_length=False)
    assert is_run_order(bench, planned)
    assert not is_run_order(bench, plain)
    assert normalised(bench.output_of(planned)) == normalised(bench.output_of(plain))


def test_audit_of_a_batch_whose_run_order_was_removed_after_its_end(bench: Bench) -> None:
    batch = run(bench, with_repeats(6))
    references.forget_segments(bench.db, batch.id)
    for key in list(bench.blobs.list_keys()):
        if key.startswith(("plans/", "segments/")):
            bench.blobs.delete(key)
    report = audit(bench.db, bench.blobs, batch.id)
    assert report.violated == ()
    assert [check.name for check in report.checks if check.skipped] == ["shards", "segments"]
