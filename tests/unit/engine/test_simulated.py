import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import GenerationDefaults, SimulatedConfig
from engine.constraints import validate
from engine.registry import open_engine
from engine.simulated import SimulatedEngine, constrained_reply, describe
from jobs.domain.errors import EngineMisconfigured, EngineOutOfMemory
from jobs.domain.request import CONSTRAINT_KINDS, Constraint, Request
from tests.builders import make_request
from tests.unit.engine.conftest import Ask

CONSTRAINTS = [
    Constraint("json_schema", '{"type":"object","properties":{"a":{"enum":["x","y"]}},'
    '"required":["a"],"additionalProperties":false}'),
    Constraint("json_object"),
    Constraint("regex", r"[a-f]{3}-\d{2}"),
    Constraint("choice", '["yes","no"]'),
    Constraint("grammar", 'start: "a" | "b" "c"'),
]  # fmt: skip


def make(**options: Any) -> SimulatedEngine:  # noqa: ANN401
    return SimulatedEngine(SimulatedConfig(step_seconds=0, **options), model="m")


def test_reply_has_the_tokens_that_were_asked_for(ask: Ask) -> None:
    engine = make(reply_tokens=5, defaults=GenerationDefaults(max_tokens=7))
    found = ask(
        engine,
        [
            make_request(1),
            make_request(2, max_tokens=3),
            make_request(3, "[[tokens=6]]"),
            make_request(4, "[[tokens=6]]", max_tokens=2),
            make_request(5, "[[tokens=60]]"),
        ],
    )
    tokens = {i: result.usage.completion_tokens for i, result in found.items()}
    assert tokens == {1: 5, 2: 3, 3: 6, 4: 2, 5: 7}
    for result in found.values():
        assert len(result.text.split()) == result.usage.completion_tokens
        assert result.usage.prompt_tokens == engine.count_tokens(make_request(1)) or result.id > 2


def test_short_replies_overtake_long_ones() -> None:
    engine = make(slots=3)
    asked = [make_request(n, f"[[tokens={t}]]") for n, t in ((1, 30), (2, 10), (3, 20))]
    assert [result.id for result in engine.generate(Given(asked))] == [2, 3, 1]


def test_no_more_run_at_once_than_there_are_slots() -> None:
    engine = make(slots=2)
    source = Given([make_request(n, "[[tokens=3]]") for n in range(10)])
    num_results = 0
    for _ in engine.generate(source):
        num_results += 1
        assert source.num_taken - num_results <= 2
    assert num_results == 10


def test_ledger_has_every_token_that_was_made(ask: Ask, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    engine = make(ledger=str(ledger), slots=3)
    found = ask(engine, [make_request(n, f"[[tokens={n + 1}]]") for n in range(9)])
    engine.close()
    engine.close()
    steps = struct.iter_unpack("<I", ledger.read_bytes())
    assert sum(step for (step,) in steps) == sum(r.usage.completion_tokens for r in found.values())
    assert engine.progress() == 45


def test_ledger_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(EngineMisconfigured, match="ledger"):
        make(ledger=str(tmp_path / "no" / "ledger"))


def test_reply_is_what_the_request_or_the_setting_says(ask: Ask) -> None:
    found = ask(make(reply="set"), [make_request(1), make_request(2, "[[reply=asked]]")])
    assert {i: result.text for i, result in found.items()} == {1: "set", 2: "asked"}


def test_reply_without_either_is_the_same_every_time(ask: Ask) -> None:
    first, second = (ask(make(), [make_request(1, "a"), make_request(2, "b")]) for _ in range(2))
    assert first == second
    assert first[1].text != first[2].text


@pytest.mark.parametrize(
    ("fault", "code"), [("error", "simulated_error"), ("nan", "numerical_error")]
)
def test_ordered_fault_is_the_result_of_its_request_alone(ask: Ask, fault: str, code: str) -> None:
    found = ask(make(), [make_request(1, f"[[fault={fault}]]"), make_request(2)])
    assert found[1].error is not None
    assert (found[1].error.code, found[1].error.status_code) == (code, 500)
    assert found[2].error is None


def test_ordered_lack_of_memory_ends_the_engine() -> None:
    with pytest.raises(EngineOutOfMemory):
        list(make().generate(Given([make_request(1, "[[fault=oom]]")])))


def test_prompt_longer_than_the_context_costs_its_own_line(ask: Ask) -> None:
    found = ask(make(context_tokens=50), [make_request(1, "x" * 400), make_request(2)])
    assert found[1].error is not None
    assert found[1].error.code == "context_length_exceeded"
    assert found[2].error is None


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=CONSTRAINT_KINDS)
def test_reply_keeps_its_constraint(ask: Ask, constraint: Constraint) -> None:
    assert validate(constraint, constrained_reply(constraint)) is None
    engine = open_engine(SimulatedConfig(step_seconds=0))
    request = msgspec.structs.replace(make_request(1), constraint=constraint)
    result = ask(engine, [request])[1]
    assert (result.error, result.constraint, result.attempts) == (None, "enforced", 1)


@pytest.mark.parametrize(
    ("fault", "code", "attempts"), [("invalid:2", None, 3), ("invalid", "schema_mismatch", 3)]
)
def test_ordered_break_of_a_constraint_is_asked_again(
    ask: Ask, fault: str, code: str | None, attempts: int
) -> None:
    engine = open_engine(SimulatedConfig(step_seconds=0))
    request = msgspec.structs.replace(
        make_request(1, f"[[fault={fault}]][[tokens=5]]"), constraint=Constraint("json_object")
    )
    result = ask(engine, [request])[1]
    assert (result.error.code if result.error else None) == code
    assert result.attempts == attempts
    assert result.usage.completion_tokens == 5 * attempts


def test_aborted_request_has_no_result() -> None:
    source = Given([make_request(1, "[[tokens=1000000000]]"), make_request(2)])
    source.aborted = {1}
    assert [result.id for result in make().generate(source)] == [2]


def test_fingerprint_changes_with_what_changes_answers() -> None:
    one, same, other = (
        describe(SimulatedConfig(reply_tokens=n), "m").fingerprint for n in (1, 1, 2)
    )
    assert one == same != other


class Given:
    def __init__(self, requests: Sequence[Request]) -> None:
        self._waiting = list(requests)
        self.aborted: set[int] = set()
        self.num_taken = 0

    def take(self, n: int) -> Sequence[Request] | None:
        if not self._waiting:
            return None
        taken, self._waiting = self._waiting[:n], self._waiting[n:]
        self.num_taken += len(taken)
        return taken

    def is_aborted(self, request_id: int) -> bool:
        return request_id in self.aborted
