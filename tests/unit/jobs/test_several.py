"""Batches whose lines run on several models, or are of several kinds."""

import json
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from jobs.audit import audit
from jobs.domain.batch import Batch, BatchStatus, LineProblem
from jobs.domain.mixed import MIXED
from jobs.domain.pooling import EMBEDDINGS
from jobs.domain.request import CHAT, COMPLETIONS, TEXT_ENDPOINTS, Capabilities
from jobs.domain.responses import RESPONSES
from jobs.domain.shard import MIXED_FORMAT, UnitKind, UnitState
from storage import batches, shards, units
from storage.jsonl import read_requests
from storage.tables import units as units_table
from tests.builders import MODEL, Bench, ScriptedEngine, Worker, describe, ids_of, make_line
from tests.reusing import Reusing

OTHER = "other"
EMBEDDER = "embedder"


def describe_all(name: str) -> Capabilities:
    """Return what two models that chat can do, one that embeds, and any named model-N."""
    found = describe(MODEL if name == EMBEDDER or name.startswith("model-") else name)
    endpoints = (EMBEDDINGS,) if name == EMBEDDER else TEXT_ENDPOINTS
    return msgspec.structs.replace(found, model=name, endpoints=endpoints)


def completion(custom_id: str, *, model: str = MODEL) -> bytes:
    return line_for(COMPLETIONS, custom_id, {"model": model, "prompt": f"say {custom_id}"})


def embedding(custom_id: str, *, model: str = EMBEDDER) -> bytes:
    return line_for(EMBEDDINGS, custom_id, {"model": model, "input": custom_id})


def line_for(url: object, custom_id: str, body: dict[str, object]) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode()


def chats(num_lines: int, *, model: str = MODEL, first: int = 0) -> list[bytes]:
    return [make_line(f"r{n}", f"hello {n}", model=model) for n in range(first, first + num_lines)]


def plan(
    bench: Bench,
    lines: list[bytes],
    *,
    endpoint: str = CHAT,
    override: str | None = None,
    **limits: Any,  # noqa: ANN401
) -> Batch:
    bench.submit(b"\n".join(lines), endpoint=endpoint, model_override=override)
    return bench.plan(describe=describe_all, **limits)


def faults(batch: Batch) -> list[tuple[int | None, str, str | None]]:
    assert batch.status is BatchStatus.FAILED, batch.status
    return [(problem.line, problem.code, problem.param) for problem in batch.errors]


def shards_of(bench: Bench, batch: Batch) -> list[tuple[str, list[str]]]:
    """Return each shard's model, and the custom_ids of its lines."""
    found = []
    with bench.db.read() as tx:
        models = {
            row.id: row.model_key
            for row in tx.execute(select(units_table.c.id, units_table.c.model_key))
        }
    for shard, _ in shards.list_for_batch(bench.db, batch.id):
        ids = [json.loads(line.data)["custom_id"] for line in read_requests(bench.blobs, shard)]
        found.append((models[shard.unit_id], ids))
    return found


def is_run_order(bench: Bench, batch: Batch) -> bool:
    return any(shard.is_run_order for shard, _ in shards.list_for_batch(bench.db, batch.id))


# --- several models ---


def test_a_file_that_has_its_models_in_turn_runs_as_it_is(bench: Bench) -> None:
    lines = [*chats(5), *chats(3, model=OTHER, first=5)]
    batch = plan(bench, lines, shard_lines=4)
    assert batch.status is BatchStatus.IN_PROGRESS, batch.errors
    assert (batch.model, batch.models) == (None, (MODEL, OTHER))
    assert not is_run_order(bench, batch)
    assert shards_of(bench, batch) == [
        (MODEL, ["r0", "r1", "r2", "r3"]),
        (MODEL, ["r4"]),
        (OTHER, ["r5", "r6", "r7"]),
    ]


def test_a_shard_has_lines_of_one_model_in_the_order_of_the_file(bench: Bench) -> None:
    names = [MODEL, OTHER, "model-3"]
    lines = [make_line(f"r{n}", f"hello {n}", model=names[n % 3]) for n in range(30)]
    batch = plan(bench, lines, shard_lines=7)
    assert is_run_order(bench, batch)
    found = shards_of(bench, batch)
    assert [model for model, _ in found] == [name for name in names for _ in range(2)]
    for number, name in enumerate(names):
        ids = [custom_id for model, some in found if model == name for custom_id in some]
        assert ids == [f"r{n}" for n in range(number, 30, 3)]


def test_order_within_a_model_is_what_it_would_be_alone(bench: Bench) -> None:
    """Long answers go first, each model's by themselves."""
    names = [MODEL, OTHER]
    lines = [
        make_line(f"r{n}", f"hello {n}", model=names[n % 2], max_tokens=2000 if n >= 20 else 8)
        for n in range(30)
    ]
    batch = plan(bench, lines)
    assert shards_of(bench, batch) == [
        (name, [f"r{n}" for n in (*range(20 + at, 30, 2), *range(at, 20, 2))])
        for at, name in enumerate(names)
    ]


def test_equal_requests_to_two_models_are_not_each_others_answer(bench: Bench) -> None:
    lines = [
        make_line(f"r{n}", "hello", model=(MODEL, OTHER)[n % 2], temperature=0) for n in range(6)
    ]
    batch = plan(bench, lines)
    assert shards_of(bench, batch) == [(MODEL, ["r0"]), (OTHER, ["r1"])]


def test_each_model_gives_its_own_lines_answers_in_the_order_of_the_file(bench: Bench) -> None:
    names = [MODEL, OTHER]
    lines = [
        make_line(f"r{n}", f"hello {n // 4}", model=names[n % 2], temperature=0) for n in range(24)
    ]
    batch = plan(bench, lines, shard_lines=5)
    assert set(units.list_waiting_models(bench.db)) == {MODEL, OTHER}
    for name in names:
        with Worker(bench, ScriptedEngine(seed=3), model=name) as worker:
            assert worker.result() == 6, "and what repeats it ran with it"
    assert units.list_waiting_models(bench.db) == {}
    batch = bench.finalize()
    assert (batch.status, batch.models) == (BatchStatus.COMPLETED, (MODEL, OTHER))
    assert audit(bench.db, bench.blobs, batch.id).violated == ()
    output = bench.output_of(batch)
    assert ids_of(output) == [f"r{n}" for n in range(24)]
    bodies = [line["response"]["body"] for line in output]
    assert [body["model"] for body in bodies] == names * 12
    assert [body["choices"][0]["message"]["content"] for body in bodies] == [
        f"re: hello {n // 4}" for n in range(24)
    ]


def test_a_cancelled_batch_names_the_lines_of_models_that_never_ran(bench: Bench) -> None:
    batch = plan(bench, [*chats(3), *chats(3, model=OTHER, first=3), *chats(2, first=6)])
    with Worker(bench, ScriptedEngine(), model=MODEL) as worker:
        assert worker.result() == 5
    batches.request_cancel(bench.db, batch.id)
    batch = bench.finalize()
    assert batch.status is BatchStatus.CANCELLED
    assert ids_of(bench.output_of(batch)) == ["r0", "r1", "r2", "r6", "r7"]
    assert ids_of(bench.errors_of(batch)) == ["r3", "r4", "r5"]


def test_more_models_than_may_be_are_refused_where_they_come_up(bench: Bench) -> None:
    lines = [make_line(f"r{n}", model=f"model-{n % 4}") for n in range(8)]
    batch = plan(bench, lines, max_models=3)
    assert faults(batch) == [
        (4, "too_many_models", "body.model"),
        (8, "too_many_models", "body.model"),
    ]
    assert "limits.max_models" in batch.errors[0].message


def test_a_model_that_is_not_there_is_said_at_its_lines(bench: Bench) -> None:
    lines = [*chats(2), make_line("x", model="nobody"), make_line("y", model=OTHER)]
    assert faults(plan(bench, lines)) == [(3, "model_not_found", "body.model")]


def test_each_line_is_held_against_its_own_model(bench: Bench) -> None:
    narrow = msgspec.structs.replace(describe(OTHER), parameters=("max_tokens",))

    def describe_both(name: str) -> Capabilities:
        return narrow if name == OTHER else describe(name)

    lines = [make_line(f"r{n}", model=(MODEL, OTHER)[n % 2], seed=1) for n in range(4)]
    bench.submit(b"\n".join(lines))
    assert faults(bench.plan(describe=describe_both)) == [
        (2, "unsupported_parameter", "body.seed"),
        (4, "unsupported_parameter", "body.seed"),
    ]


def test_a_schema_is_refused_for_the_model_that_refuses_it_alone(bench: Bench) -> None:
    strict = msgspec.structs.replace(describe(OTHER), refuses_unenforceable=True)

    def describe_both(name: str) -> Capabilities:
        return strict if name == OTHER else describe(name)

    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    lines = [make_line(f"r{n}", model=(MODEL, OTHER)[n % 2], guided_json=schema) for n in range(4)]
    bench.submit(b"\n".join(lines))
    assert faults(bench.plan(describe=describe_both)) == [
        (2, "schema_unsupported", "body.response_format"),
        (4, "schema_unsupported", "body.response_format"),
    ]


def test_a_worker_of_an_older_program_leaves_such_a_batch_alone(bench: Bench) -> None:
    several = plan(bench, [*chats(1), *chats(1, model=OTHER, first=1)])
    mixed = plan(bench, [completion("a")], endpoint=MIXED)
    one = plan(bench, chats(1))
    with bench.db.read() as tx:
        rows = tx.execute(select(units_table)).all()
    formats = {(row.batch_id, row.kind): row.format_version for row in rows}
    assert formats[several.id, UnitKind.SHARD] == MIXED_FORMAT
    assert formats[mixed.id, UnitKind.SHARD] == formats[mixed.id, UnitKind.PLAN] == MIXED_FORMAT
    assert formats[one.id, UnitKind.SHARD] < MIXED_FORMAT
    assert formats[one.id, UnitKind.PLAN] < MIXED_FORMAT


# --- several kinds ---


def test_each_line_of_a_mixed_batch_is_read_by_its_own_url(bench: Bench) -> None:
    lines = [
        make_line("a", "hello"),
        embedding("b"),
        completion("c"),
        make_line("d", "bye", model=OTHER),
        embedding("e"),
    ]
    batch = plan(bench, lines, endpoint=MIXED)
    assert batch.status is BatchStatus.IN_PROGRESS, batch.errors
    assert shards_of(bench, batch) == [
        (MODEL, ["a", "c"]),
        (EMBEDDER, ["b", "e"]),
        (OTHER, ["d"]),
    ]


def test_answers_are_written_as_the_url_of_their_line_wants_them(bench: Bench) -> None:
    plan(bench, [make_line("a", "hello"), completion("b")], endpoint=MIXED)
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 2
    chat, text = (line["response"]["body"] for line in bench.output_of(bench.finalize()))
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["content"] == "re: hello"
    assert text["object"] == "text_completion"
    assert "text" in text["choices"][0]


def test_a_chat_and_a_response_that_ask_for_the_same_are_answered_each_in_its_form(
    bench: Bench,
) -> None:
    asked = {"model": MODEL, "temperature": 0}
    chats = [
        line_for(CHAT, name, {**asked, "messages": [{"role": "user", "content": "hello"}]})
        for name in ("a", "c")
    ]
    response = line_for(RESPONSES, "b", {**asked, "input": "hello"})
    batch = plan(bench, [chats[0], response, chats[1]], endpoint=MIXED)
    assert batch.status is BatchStatus.IN_PROGRESS, batch.errors
    engine = ScriptedEngine()
    with Worker(bench, engine) as worker:
        worker.result()
    assert engine.asked == ["hello", "hello"], "the two chats are one"
    bodies = [line["response"]["body"] for line in bench.output_of(bench.finalize())]
    kinds = [body["object"] for body in bodies]
    assert kinds == ["chat.completion", "response", "chat.completion"]


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (embedding("x", model=MODEL), "unsupported_endpoint", "url"),
        (make_line("x", model=EMBEDDER), "unsupported_endpoint", "url"),
        (line_for("/v1/audio", "x", {}), "invalid_url", "url"),
        (line_for(7, "x", {}), "invalid_url", "url"),
        (line_for(None, "x", {}), "missing_required_parameter", "url"),
        (
            line_for(EMBEDDINGS, "x", {"model": EMBEDDER}),
            "missing_required_parameter",
            "body.input",
        ),
        (b"{", "invalid_json_line", None),
        (b"[" * 4000, "nesting_too_deep", None),
        (b"\xff", "invalid_utf8", None),
        (embedding("first"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_fault_of_a_mixed_batch_is_reported_at_its_line(
    bench: Bench, line: bytes, code: str, param: str | None
) -> None:
    lines = [make_line("first"), line, embedding("last")]
    assert faults(plan(bench, lines, endpoint=MIXED)) == [(2, code, param)]


def test_a_line_of_another_kind_says_how_lines_of_several_run(bench: Bench) -> None:
    batch = plan(bench, [make_line("a"), completion("b")])
    problem = batch.errors[0]
    assert isinstance(problem, LineProblem)
    assert (problem.line, problem.code) == (2, "invalid_url")
    assert 'endpoint "mixed"' in problem.message


def test_a_chosen_model_runs_all_kinds_that_it_can(bench: Bench) -> None:
    lines = [make_line("a", model="gpt-5"), completion("b", model="gpt-5")]
    batch = plan(bench, lines, endpoint=MIXED, override=MODEL)
    assert (batch.model, batch.models) == (MODEL, ())
    assert shards_of(bench, batch) == [(MODEL, ["a", "b"])]


def test_a_mixed_batch_expires_like_any(bench: Bench) -> None:
    batch = plan(bench, [make_line("a", model=OTHER), embedding("b")], endpoint=MIXED)
    bench.clock.advance(90_000)
    batches.expire_overdue(bench.db)
    assert bench.states(batch) == [UnitState.EXPIRED] * 2
    batch = bench.finalize()
    assert batch.status is BatchStatus.EXPIRED
    assert ids_of(bench.errors_of(batch)) == ["a", "b"]


# --- answers of earlier batches ---


def run_reusing(reusing: Reusing, lines: list[bytes]) -> Batch:
    reusing.submit(lines, endpoint=MIXED)
    reusing.plan()
    for name in (MODEL, OTHER):
        with Worker(reusing.bench, ScriptedEngine(), model=name) as worker:
            worker.result()
    return reusing.bench.finalize(reusing.cache)


def test_a_mixed_batch_of_one_model_takes_answers_of_every_kind(bench: Bench) -> None:
    reusing = Reusing(bench)
    prompt = {"model": MODEL, "prompt": "say", "temperature": 0}
    lines = [make_line("a", "hello", temperature=0), line_for(COMPLETIONS, "b", prompt)]
    first = run_reusing(reusing, lines)
    second = run_reusing(reusing, lines)
    assert (first.num_reused, second.num_reused) == (0, 2)
    bodies = [line["response"]["body"] for line in bench.output_of(second)]
    assert [body["object"] for body in bodies] == ["chat.completion", "text_completion"]
    assert [body["batchctl"]["reused_from"] for body in bodies] == [first.id] * 2


def test_a_batch_of_several_models_takes_and_gives_no_answers(bench: Bench) -> None:
    reusing = Reusing(bench)
    lines = [make_line(f"r{n}", "hello", model=(MODEL, OTHER)[n], temperature=0) for n in range(2)]
    for _ in range(2):
        batch = run_reusing(reusing, lines)
        assert (batch.status, batch.num_reused) == (BatchStatus.COMPLETED, 0)
    assert list(bench.blobs.list_keys("reuse/")) == []
