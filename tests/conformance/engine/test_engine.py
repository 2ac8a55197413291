"""What every engine does, whatever is behind it: one suite over all of them.

An engine joins by a fixture in `conftest.py` that opens it; see `ENGINES` there.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
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
from jobs.domain.result import Result
from tests.conformance.engine.parameters import CHECKS, CHOICE_OF_TOKENS, Talk

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


class ScriptedSource:
    """Hands out requests in bites, with pauses between them, and can abort."""

    def __init__(self, requests: Sequence[Request], *, bite: int = 3) -> None:
        self._waiting = list(requests)
        self._bite = bite
        self._hungry = False
        self._lock = threading.Lock()
        self.aborted: set[int] = set()
        self.taken: set[int] = set()

    def take(self, n: int) -> Sequence[Request] | None:
        with self._lock:
            if not self._waiting:
                return None
            self._hungry = not self._hungry
            if not self._hungry:
                return ()
            bite = min(n, self._bite)
            taken, self._waiting = self._waiting[:bite], self._waiting[bite:]
            self.taken.update(request.id for request in taken)
            return taken

    def is_aborted(self, request_id: int) -> bool:
        return request_id in self.aborted


@pytest.fixture(scope="module")
def engine(open_conformant: Callable[[], Engine]) -> Iterator[Engine]:
    opened = open_conformant()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def talk(engine: Engine, model_folder: Path | None) -> Talk:
    if model_folder is None:
        return Talk(engine=engine)
    described = json.loads((model_folder / "generation_config.json").read_text("utf-8"))
    ends = described["eos_token_id"]
    return Talk(
        engine=engine,
        tokenizer=Tokenizer.from_file(str(model_folder / "tokenizer.json")),
        end=ends if isinstance(ends, int) else ends[0],
    )


def collect(engine: Engine, source: ScriptedSource) -> dict[int, Result]:
    found: dict[int, Result] = {}
    for result in engine.generate(source):
        assert result.id not in found, "two results for one request"
        found[result.id] = result
    return found


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
    elif talk.tokenizer is None and parameter in CHOICE_OF_TOKENS:
        assert talk.say(seed=1, temperature=1).usage.completion_tokens > 0
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
def test_structured_answers_fit_or_say_why_not(engine: Engine, constraint: Constraint) -> None:
    requests = [
        Request(
            id=i,
            messages=(Message("user", f"Question {i}"),),
            constraint=constraint,
            sampling=SamplingParams(max_tokens=60, temperature=1.0, seed=i),
        )
        for i in range(6)
    ]
    results = collect(engine, ScriptedSource(requests))
    assert set(results) == set(range(6))
    for result in results.values():
        if result.error is None:
            assert result.constraint in ("enforced", "validated")
            assert validate(constraint, result.text) is None
        else:
            # Only where the constraint could not be enforced: its breach is named.
            assert result.constraint == "validated"
            assert result.error.code in ("schema_mismatch", "truncated")
            assert validate(constraint, result.text) is not None


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


def test_over_long_prompt_is_one_error_among_answers(engine: Engine) -> None:
    too_long = "word " * (4 * engine.capabilities.context_tokens + 8)
    results = collect(engine, ScriptedSource([chat(1, too_long), chat(2, "short")]))
    error = results[1].error
    assert error is not None
    assert error.code == "context_length_exceeded"
    assert error.status_code == 400
    assert "word word" not in error.message
    assert results[2].error is None


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
    assert set(results) <= {0, 1, 2, 3, 9}


def test_aborting_requests_while_they_run_harms_no_other(engine: Engine) -> None:
    long = SamplingParams(max_tokens=engine.capabilities.context_tokens // 2, ignore_eos=True)
    source = ScriptedSource(
        [*(Request(id=i, prompt="Once", sampling=long) for i in range(2)), chat(9, "Hello")],
        bite=8,
    )
    found: set[int] = set()
    for result in engine.generate(source):
        found.add(result.id)
        source.aborted.update({0, 1} - found)
    assert 9 in found
    assert set(collect(engine, ScriptedSource([chat(1, "Hello")]))) == {1}


def test_closed_run_leaves_the_engine_ready_for_another(engine: Engine) -> None:
    running = engine.generate(ScriptedSource([chat(i, "Hello") for i in range(8)]))
    next(running)
    running.close()
    assert set(collect(engine, ScriptedSource([chat(1, "Hello")]))) == {1}


def test_empty_source_ends_at_once(engine: Engine) -> None:
    assert collect(engine, ScriptedSource([])) == {}
