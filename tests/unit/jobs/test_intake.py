import json
from typing import Any

import pytest

from jobs import intake
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import EngineMisconfigured, InvalidInput, LeaseLost
from jobs.domain.request import CHAT, COMPLETIONS, PARAMETERS, Capabilities
from jobs.domain.shard import UnitKind
from jobs.intake import PlanLimits
from storage import batches, shards, units
from storage.jsonl import UNLIMITED, read_lines
from tests.builders import Bench, describe, make_line, make_lines

GOOD = make_line("good")


def faults(batch: Batch) -> list[tuple[int | None, str, str | None]]:
    assert batch.status is BatchStatus.FAILED, batch.status
    return [(problem.line, problem.code, problem.param) for problem in batch.errors]


def refuse(bench: Bench, content: bytes | None, **changes: Any) -> Batch:  # noqa: ANN401
    bench.submit(content, **changes)
    batch = bench.plan()
    assert batch.status is BatchStatus.FAILED
    assert batch.request_counts.total == 0, "contract: 0/0/0 for an invalid input"
    return batch


def lines(*parts: bytes) -> bytes:
    return b"\n".join(parts) + b"\n"


def shards_of(bench: Bench, batch: Batch) -> list[list[tuple[int, int, str]]]:
    """Return (index, physical line, custom_id) of each line of each shard, as a worker reads it."""
    found = []
    for shard, _ in shards.list_for_batch(bench.db, batch.id):
        read = read_lines(bench.blobs, shard, max_line_bytes=UNLIMITED)
        found.append(
            [
                (shard.first_index + p, number, json.loads(line)["custom_id"])
                for p, number, line in read
            ]
        )
    return found


# --- good files ---


def test_good_file_is_cut_into_shards_that_hold_every_line(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(10), shard_lines=4)
    assert (batch.model, batch.request_counts.total) == ("simulated", 10)
    assert batch.in_progress_at is not None
    assert shards_of(bench, batch) == [
        [(n, n + 1, f"r{n}") for n in range(first, min(10, first + 4))] for first in (0, 4, 8)
    ]


def test_shards_are_bounded_in_bytes(bench: Bench) -> None:
    size = len(make_line("r0", "hello 0")) + 1
    batch = bench.submit_planned(make_lines(5), shard_bytes=2 * size)
    assert [len(shard) for shard in shards_of(bench, batch)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (make_line("a"), [(0, 1, "a")]),
        (b"\xef\xbb\xbf" + lines(make_line("a")), [(0, 1, "a")]),
        (make_line("a") + b"\r\n" + make_line("b") + b"\r\n", [(0, 1, "a"), (1, 2, "b")]),
        (b"\n \t\r\n" + lines(make_line("a"), b"", make_line("b")), [(0, 3, "a"), (1, 5, "b")]),
        (lines(make_line("a")) + b"\n\n\n", [(0, 1, "a")]),
        (b"\xef\xbb\xbf\r\n" + make_line("a"), [(0, 2, "a")]),
    ],
    ids=["no last newline", "BOM", "CRLF", "blank lines", "blank end", "BOM on a line of its own"],
)
def test_ways_to_write_a_file_are_understood(
    bench: Bench, content: bytes, expected: list[tuple[int, int, str]]
) -> None:
    batch = bench.submit_planned(content)
    (shard,) = shards_of(bench, batch)
    assert shard == expected


def test_blank_lines_between_shards_belong_to_none(bench: Bench) -> None:
    content = b"\n\n".join(make_line(f"r{n}") for n in range(4))
    batch = bench.submit_planned(content, shard_lines=2)
    assert shards_of(bench, batch) == [
        [(0, 1, "r0"), (1, 3, "r1")],
        [(2, 5, "r2"), (3, 7, "r3")],
    ]


# --- what is wrong with a line, and where ---


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff", "invalid_utf8", None),
        (b"[" * 4000, "nesting_too_deep", None),
        (b'{"method":"POST"}', "missing_required_parameter", "custom_id"),
        (GOOD.replace(b'"good"', b"null"), "missing_required_parameter", "custom_id"),
        (GOOD.replace(b'"method": "POST", ', b""), "missing_required_parameter", "method"),
        (GOOD.replace(b'"url"', b'"uri"'), "missing_required_parameter", "url"),
        (GOOD.replace(b'"body"', b'"bode"'), "missing_required_parameter", "body"),
        (make_line("x", messages=None), "missing_required_parameter", "body.messages"),
        (make_line("x", model=None), "missing_required_parameter", "body.model"),
        (GOOD.replace(CHAT.encode(), COMPLETIONS.encode()), "invalid_url", "url"),
        (GOOD.replace(b'"POST"', b'"GET"'), "invalid_method", "method"),
        (make_line("x", model="nobody"), "model_not_found", "body.model"),
        (make_line("x", stream=True), "streaming_unsupported", "body.stream"),
        (make_line("x", best_of=3), "unsupported_parameter", "body.best_of"),
        (make_line("x", temperature="hot"), "invalid_type", "body.temperature"),
        (make_line("x", temperature=9), "invalid_value", "body.temperature"),
        (make_line("first"), "duplicate_custom_id", "custom_id"),
        (make_line("x", guided_regex="("), "invalid_regex", "body.structured_outputs"),
        (make_line("x", guided_grammar="start: a"), "invalid_grammar", "body.structured_outputs"),
        (make_line("x", guided_json={"type": "nothing"}), "invalid_schema", "body.response_format"),
        (make_line("x" * 600), "invalid_value", "custom_id"),
        (b"x" * 5000, "line_too_long", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["plain", "strange"])
def test_fault_is_reported_at_its_physical_line(
    bench: Bench, line: bytes, code: str, param: str | None, form: str
) -> None:
    first = make_line("first")
    if form == "plain":
        content, at = lines(first, line, make_line("last")), 2
    else:  # a byte order mark, CRLF, blank lines, and the fault last without a newline
        content, at = b"\xef\xbb\xbf\r\n" + first + b"\r\n\r\n  \r\n" + line, 5
    bench.submit(content)
    batch = bench.plan(max_line_bytes=4096)
    assert faults(batch) == [(at, code, param)]
    (problem,) = batch.errors
    assert problem.message
    assert "\n" not in problem.message
    assert batch.num_errors == 1


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n", b"\xef\xbb\xbf"])
def test_file_without_a_request_is_empty(bench: Bench, content: bytes) -> None:
    assert faults(refuse(bench, content)) == [(None, "empty_file", None)]


def test_every_fault_is_reported_in_the_order_of_lines(bench: Bench) -> None:
    content = lines(
        GOOD,
        b"{",
        GOOD,
        make_line("b", model=None),
        make_line("c", guided_json={"type": 5}),
        make_line("d", stream=True),
        GOOD,
        make_line("e", model="nobody"),
    )
    assert faults(refuse(bench, content)) == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "missing_required_parameter", "body.model"),
        (5, "invalid_schema", "body.response_format"),
        (6, "streaming_unsupported", "body.stream"),
        (7, "duplicate_custom_id", "custom_id"),
        (8, "model_not_found", "body.model"),
    ]


def test_only_the_first_faults_are_listed_and_all_are_counted(bench: Bench) -> None:
    content = lines(*[b"{"] * 700, make_line("a"), make_line("a"))
    bench.submit(content)
    batch = bench.plan(max_reported_errors=3)
    assert [problem.line for problem in batch.errors] == [1, 2, 3]
    assert batch.num_errors == 701


def test_duplicate_found_late_is_listed_before_later_faults(bench: Bench) -> None:
    bench.submit(lines(make_line("a"), make_line("a"), b"{", b"{"))
    batch = bench.plan(max_reported_errors=2)
    assert faults(batch) == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "invalid_json_line", None),
    ]


@pytest.mark.parametrize("spill_bytes", [16, 100, 1 << 20])
def test_duplicates_are_found_in_memory_and_on_disk(bench: Bench, spill_bytes: int) -> None:
    content = make_lines(300) + make_lines(3, first=100) + make_lines(1, first=299)
    bench.submit(content)
    batch = bench.plan(spill_bytes=spill_bytes)
    assert faults(batch) == [
        (line, "duplicate_custom_id", "custom_id") for line in (301, 302, 303, 304)
    ]
    assert "line 101" in batch.errors[0].message, "it says which line has the custom_id first"


def test_unlike_custom_ids_are_never_duplicates(bench: Bench) -> None:
    assert bench.submit_planned(make_lines(300), spill_bytes=16).request_counts.total == 300


def test_file_with_too_many_lines_is_refused(bench: Bench) -> None:
    bench.submit(make_lines(4))
    batch = bench.plan(max_lines=3)
    assert faults(batch) == [(None, "too_many_tasks", None)]
    assert "3" in batch.errors[0].message
    assert "4" in batch.errors[0].message
    bench.submit(make_lines(3))
    assert bench.plan(max_lines=3).status is BatchStatus.IN_PROGRESS


def test_line_at_the_limit_passes_and_one_byte_more_does_not(bench: Bench) -> None:
    limit = len(GOOD)
    bench.submit(lines(GOOD))
    assert bench.plan(max_line_bytes=limit).status is BatchStatus.IN_PROGRESS
    bench.submit(lines(GOOD))
    assert faults(bench.plan(max_line_bytes=limit - 1)) == [(1, "line_too_long", None)]


def test_missing_content_says_to_upload_again(bench: Bench) -> None:
    batch = refuse(bench, None)
    assert faults(batch) == [(None, "invalid_request", "file_id")]
    assert "upload" in batch.errors[0].message


def test_endpoint_that_is_not_served_is_refused(bench: Bench) -> None:
    batch = refuse(bench, lines(GOOD), endpoint="/v1/moderations")
    assert faults(batch) == [(None, "invalid_value", "endpoint")]
    assert CHAT in batch.errors[0].message


# --- models ---


def test_chosen_model_stands_in_for_the_one_the_file_names(bench: Bench) -> None:
    content = lines(make_line("a", model="gpt-5"), make_line("b", model="gpt-5"))
    bench.submit(content, model_override="simulated")
    batch = bench.plan()
    assert (batch.status, batch.model) == (BatchStatus.IN_PROGRESS, "simulated")


def test_chosen_model_serves_lines_that_name_none(bench: Bench) -> None:
    bench.submit(lines(make_line("a", model=None)), model_override="simulated")
    assert bench.plan().model == "simulated"


def test_chosen_model_does_not_stand_in_for_two(bench: Bench) -> None:
    content = lines(make_line("a", model="x"), make_line("b", model="y"), make_line("c", model="x"))
    batch = refuse(bench, content, model_override="simulated")
    assert faults(batch) == [(2, "mismatched_model", "body.model")]


def test_chosen_model_that_the_file_names_too_is_the_one_that_is_meant(bench: Bench) -> None:
    content = lines(make_line("a", model="x"), make_line("b", model="simulated"))
    batch = refuse(bench, content, model_override="simulated")
    assert faults(batch) == [(1, "mismatched_model", "body.model")]


def test_chosen_model_that_does_not_exist_is_said_once(bench: Bench) -> None:
    batch = refuse(bench, make_lines(3), model_override="nobody")
    assert faults(batch) == [(None, "model_not_found", "model")]


@pytest.mark.parametrize("kind", [EngineMisconfigured, InvalidInput])
def test_model_that_cannot_be_used_says_why(
    bench: Bench, kind: type[EngineMisconfigured | InvalidInput]
) -> None:
    def broken(_name: str) -> Capabilities:
        raise kind("There is no config.json.")

    bench.submit(lines(GOOD, make_line("b")))
    batch = bench.plan(describe=broken)
    assert faults(batch) == [(n, "model_not_found", "body.model") for n in (1, 2)]
    assert "config.json" in batch.errors[0].message


def test_model_is_looked_up_once_for_all_its_lines(bench: Bench) -> None:
    asked: list[str] = []

    def counted(name: str) -> Capabilities:
        asked.append(name)
        return describe(name)

    content = make_lines(20) + b"".join(
        make_line(f"x{n}", model="nobody") + b"\n" for n in range(20)
    )
    bench.submit(content)
    assert bench.plan(describe=counted).num_errors == 20
    assert asked == ["simulated", "nobody"]


def test_model_without_a_chat_template_serves_no_chat(bench: Bench) -> None:
    def completions_only(name: str) -> Capabilities:
        return Capabilities(
            model=name, engine="hf", endpoints=(COMPLETIONS,), parameters=PARAMETERS
        )

    bench.submit(lines(GOOD))
    batch = bench.plan(describe=completions_only)
    assert faults(batch) == [(1, "unsupported_endpoint", "url")]
    assert "chat template" in batch.errors[0].message


def test_parameter_that_the_model_cannot_obey_is_refused_on_its_line(bench: Bench) -> None:
    def plain(name: str) -> Capabilities:
        return Capabilities(model=name, engine="plain", parameters=("max_tokens",))

    bench.submit(lines(make_line("a", max_tokens=5), make_line("b", top_k=5)))
    assert faults(bench.plan(describe=plain)) == [(2, "unsupported_parameter", "body.top_k")]


# --- schemas ---

UNENFORCEABLE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}


def test_schema_that_cannot_be_enforced_passes_when_answers_may_be_validated(bench: Bench) -> None:
    bench.submit(lines(make_line("a", guided_json=UNENFORCEABLE)))
    assert bench.plan().status is BatchStatus.IN_PROGRESS


def test_schema_that_cannot_be_enforced_is_refused_when_that_is_asked_for(bench: Bench) -> None:
    content = lines(
        make_line("a", guided_json={"type": "integer"}),
        make_line("b", guided_json=UNENFORCEABLE),
        make_line("c", guided_json=UNENFORCEABLE),
    )
    batch = refuse(bench, content, on_unsupported_schema="refuse")
    assert faults(batch) == [(n, "schema_unsupported", "body.response_format") for n in (2, 3)]


@pytest.mark.parametrize("policy", ["validate", "refuse"])
def test_schema_that_is_none_is_refused_whatever_the_policy(bench: Bench, policy: str) -> None:
    content = lines(make_line("a", guided_json={"type": "nothing"}))
    batch = refuse(bench, content, on_unsupported_schema=policy)
    assert faults(batch) == [(1, "invalid_schema", "body.response_format")]


@pytest.mark.parametrize("check_chunk", [1, 2, 100])
def test_every_line_with_a_bad_schema_is_named_however_they_are_grouped(
    bench: Bench, check_chunk: int
) -> None:
    bad = [make_line(f"b{n}", guided_json={"type": "nothing"}) for n in range(3)]
    good = [make_line(f"g{n}", guided_json={"maximum": n}) for n in range(3)]
    bench.submit(lines(*[line for pair in zip(good, bad, strict=True) for line in pair]))
    batch = bench.plan(check_chunk=check_chunk)
    assert [line for line, _, _ in faults(batch)] == [2, 4, 6]


# --- once, and by one worker ---


def test_planning_again_after_it_was_recorded_doubles_no_shard(bench: Bench) -> None:
    bench.submit(make_lines(5))
    lease = bench.claim(UnitKind.PLAN)
    first = bench.plan(lease, shard_lines=2)
    before = shards_of(bench, first)
    assert bench.plan(lease, shard_lines=3) == first
    assert shards_of(bench, first) == before


def test_planner_that_lost_its_lease_writes_nothing(bench: Bench) -> None:
    bench.submit(make_lines(5))
    old = bench.claim(UnitKind.PLAN)
    bench.clock.advance(100)
    units.reap(bench.db)
    bench.clock.advance(100)
    new = bench.claim(UnitKind.PLAN)
    with pytest.raises(LeaseLost):
        bench.plan(old)
    assert batches.get(bench.db, old.batch_id).status is BatchStatus.VALIDATING
    assert len(shards_of(bench, bench.plan(new, shard_lines=2))) == 3
    with pytest.raises(LeaseLost):
        bench.plan(old)


def test_bad_file_planned_by_a_worker_that_lost_its_lease_fails_nothing(bench: Bench) -> None:
    bench.submit(b"{\n")
    old = bench.claim(UnitKind.PLAN)
    bench.clock.advance(100)
    units.reap(bench.db)
    with pytest.raises(LeaseLost):
        bench.plan(old)
    assert batches.get(bench.db, old.batch_id).status is BatchStatus.VALIDATING


def test_batch_cancelled_while_it_is_planned_runs_nothing(bench: Bench) -> None:
    bench.submit(make_lines(3))
    lease = bench.claim(UnitKind.PLAN)
    batches.request_cancel(bench.db, lease.batch_id)
    batch = bench.plan(lease)
    assert shards_of(bench, batch) == []
    batch = bench.finalize()
    assert batch.status is BatchStatus.CANCELLED
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_submitting_rings_the_doorbell_and_repeats_by_its_key(bench: Bench) -> None:
    before = bench.doorbell.wait(0)
    first = bench.submit(make_lines(1), idempotency_key="k")
    assert bench.doorbell.wait(0, seen=before) == before + 1
    assert bench.submit(make_lines(1), idempotency_key="k") == first


def test_progress_is_told_as_lines_are_read(bench: Bench) -> None:
    bench.submit(make_lines(2500))
    told: list[int] = []
    intake.plan(
        bench.db,
        bench.blobs,
        bench.claim(UnitKind.PLAN),
        describe=describe,
        checker=bench.sandbox,
        limits=PlanLimits(),
        on_progress=told.append,
    )
    assert told == [1000, 2000]
