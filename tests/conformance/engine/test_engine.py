"""What every engine does, whatever is behind it: one suite over all of them.

An engine joins by a fixture in `conftest.py` that opens it; see `ENGINES` there.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.base import Engine
from engine.constraints import validate
from jobs.domain.errors import InvalidLine
from jobs.domain.request import (
    COMPLETIONS,
    ENDPOINTS,
    PARAMETERS,
    TEXT_ENDPOINTS,
    Constraint,
    Message,
    Request,
    SamplingParams,
)
from tests.conformance.engine.behaviour import (
    ScriptedSource,
    check_aborted_while_running,
    check_over_long,
    collect,
)
from tests.conformance.engine.parameters import CHECKS, IGNORED, check_ignored, check_kept
from tests.conformance.engine.talking import Talk

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 30},
        },
        "required": ["kind", "age"],
        "additionalProperties": False,
    }
)
CONSTRAINTS = [
    Constraint("json_schema", SCHEMA),
    Constraint("regex", r"[a-f]{3}-\d{2}"),
    Constraint("choice", '["yes", "no", "say \\"maybe\\""]'),
    Constraint("grammar", 'start: "a" | "b" "c"'),
    Constraint("grammar", 'root ::= "a" | "b" "c"'),
]


@pytest.fixture(scope="module")
def engine(open_conformant: Callable[[], Engine]) -> Iterator[Engine]:
    opened = open_conformant()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def talk(engine: Engine, model_folder: Path | None, enforces: Callable[[Constraint], bool]) -> Talk:
    if model_folder is None:
        return Talk(engine=engine, enforces=enforces)
    described = json.loads((model_folder / "generation_config.json").read_text("utf-8"))
    ends = described["eos_token_id"]
    return Talk(
        engine=engine,
        enforces=enforces,
        tokenizer=Tokenizer.from_file(str(model_folder / "tokenizer.json")),
        end=ends if isinstance(ends, int) else ends[0],
    )


def chat(request_id: int, text: str, *, constraint: Constraint | None = None) -> Request:
    return Request(
        id=request_id,
        messages=(Message("system", "Be brief."), Message("user", text)),
        sampling=SamplingParams(max_tokens=12, temperature=1.0, seed=request_id),
        constraint=constraint,
    )


def test_capabilities_are_said(engine: Engine) -> None:
    capabilities = engine.capabilities
    assert set(TEXT_ENDPOINTS) <= set(capabilities.endpoints) <= set(ENDPOINTS)
    assert capabilities.context_tokens > 0
    assert capabilities.fingerprint
    assert engine.num_slots > 0


def test_chats_and_completions_are_answered(engine: Engine) -> None:
    requests = [
        chat(1, "Hello"),
        chat(2, "Hello again"),
        Request(id=3, prompt="Once upon a time", sampling=SamplingParams(max_tokens=5)),
        Request(id=4, prompt=(40, 41, 42), sampling=SamplingParams(max_tokens=5)),
    ]
    results = collect(engine, ScriptedSource(requests))
    assert set(results) == {1, 2, 3, 4}
    for request in requests:
        result = results[request.id]
        assert result.error is None
        assert result.attempts == 1
        assert result.constraint is None
        assert result.usage.prompt_tokens == engine.count_tokens(request)
        assert 0 < result.usage.completion_tokens <= (request.sampling.max_tokens or 0)


def test_every_parameter_has_a_check() -> None:
    assert CHECKS.keys() == set(PARAMETERS)


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_claimed_parameter_does_what_it_says(talk: Talk, parameter: str) -> None:
    if parameter not in talk.engine.capabilities.parameters:
        refused = {"tools": [{"type": "function", "function": {"name": "clock"}}]}[parameter]
        with pytest.raises(InvalidLine, match=parameter):
            talk.chat(**{parameter: refused})
    elif talk.tokenizer is None and parameter in IGNORED:
        check_ignored(talk, parameter)
    else:
        CHECKS[parameter](talk)


def test_no_answer_is_longer_than_the_context(engine: Engine, talk: Talk) -> None:
    body = {"prompt": "Once", "max_tokens": 10_000_000}
    short = {"prompt": "Once", "max_tokens": 2}
    results = talk.ask([talk.request(1, COMPLETIONS, body), talk.request(2, COMPLETIONS, short)])
    assert results[2].error is None
    usage, error = results[1].usage, results[1].error
    if error is None:
        assert usage.prompt_tokens + usage.completion_tokens <= engine.capabilities.context_tokens
    else:
        assert error.status_code == 400


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)
def test_structured_answers_fit_or_say_why_not(talk: Talk, constraint: Constraint) -> None:
    requests = [
        Request(
            id=i,
            messages=(Message("user", f"Question {i}"),),
            constraint=constraint,
            sampling=SamplingParams(max_tokens=60, temperature=1.0, seed=i),
        )
        for i in range(6)
    ]
    results = collect(talk.engine, ScriptedSource(requests))
    assert set(results) == set(range(6))
    for result in results.values():
        check_kept(talk, constraint, result)


def test_any_json_object_is_an_object_or_cut_off(engine: Engine) -> None:
    constraint = Constraint("json_object")
    results = collect(
        engine, ScriptedSource([chat(i, "An object", constraint=constraint) for i in range(4)])
    )
    assert set(results) == set(range(4))
    for result in results.values():
        if result.error is None:
            assert validate(constraint, result.text) is None
        else:
            assert result.error.code == "truncated"
            assert result.text


def test_over_long_prompts_are_errors_among_answers(engine: Engine) -> None:
    check_over_long(engine)


def test_every_request_gets_one_result_and_its_own(engine: Engine) -> None:
    count = 3 * engine.num_slots + 5
    requests = [
        chat(i, f"Question {i}", constraint=CONSTRAINTS[2] if i % 3 == 0 else None)
        for i in range(count)
    ]
    results = collect(engine, ScriptedSource(requests, bite=7))
    assert set(results) == set(range(count))
    for request in requests:
        if results[request.id].attempts == 1:
            counted = engine.count_tokens(request)
            assert results[request.id].usage.prompt_tokens == counted


def test_progress_grows_with_work(engine: Engine) -> None:
    before = engine.progress()
    collect(engine, ScriptedSource([chat(1, "Hello")]))
    assert engine.progress() > before


def test_aborted_requests_end_the_run_without_them(engine: Engine) -> None:
    long = SamplingParams(max_tokens=engine.capabilities.context_tokens // 2, ignore_eos=True)
    requests = [Request(id=i, prompt="Once", sampling=long) for i in range(4)]
    source = ScriptedSource([*requests, chat(9, "Hello")], bite=8)
    source.aborted.update(range(4))
    results = collect(engine, source)
    assert results[9].error is None
    assert set(results) == {9}


def test_aborting_requests_while_they_run_harms_no_other(engine: Engine) -> None:
    check_aborted_while_running(engine)


def test_closed_run_leaves_the_engine_ready_for_another(engine: Engine) -> None:
    running = engine.generate(ScriptedSource([chat(i, "Hello") for i in range(8)]))
    next(running)
    running.close()
    assert set(collect(engine, ScriptedSource([chat(99, "Hello")]))) == {99}


def test_empty_source_ends_at_once(engine: Engine) -> None:
    assert collect(engine, ScriptedSource([])) == {}
