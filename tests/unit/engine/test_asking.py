from collections.abc import Callable, Generator

import msgspec
import pytest
from typing_extensions import override

from engine.asking import Asking
from engine.base import Source
from engine.config import AskingConfig
from engine.sampling import OPENAI_DEFAULTS
from jobs.domain.request import Capabilities, Constraint, Message, Request, SamplingParams
from jobs.domain.result import FinishReason, LineError, Result, Usage
from jobs.domain.tools import ToolCall, Tools
from tests.sources import ListSource

Ask = Callable[..., dict[int, Result]]
DIGITS = Constraint("regex", r"\d+")


class Parrot:
    """An engine that answers each request with its next prepared text, a few at a time."""

    num_slots = 2
    tuning = None
    capabilities = Capabilities(model="parrot", engine="parrot")

    def __init__(
        self, *texts: str, reason: FinishReason = "stop", error: LineError | None = None
    ) -> None:
        self._texts = texts
        self._reason: FinishReason = reason
        self._error = error
        self.heard: list[Request] = []

    def generate(self, source: Source) -> Generator[Result]:
        while (taken := source.take(2)) is not None:
            for request in taken:
                times = sum(heard.id == request.id for heard in self.heard)
                self.heard.append(request)
                yield Result(
                    id=request.id,
                    text=self._texts[min(times, len(self._texts) - 1)],
                    finish_reason=self._reason,
                    usage=Usage(prompt_tokens=10, completion_tokens=2),
                    constraint="enforced" if request.constraint else None,
                    error=self._error,
                )

    def count_tokens(self, request: Request) -> int:
        return len(str(request.prompt))

    def progress(self) -> int:
        return len(self.heard)

    def resolve_sampling(self, request: Request) -> SamplingParams:
        temperature = request.sampling.temperature
        return msgspec.structs.replace(
            OPENAI_DEFAULTS,
            temperature=1.0 if temperature is None else temperature,
            seed=request.sampling.seed,
        )

    def close(self) -> None:
        self.heard.clear()


def question(request_id: int = 1, **sampling: object) -> Request:
    return Request(
        id=request_id,
        prompt="?",
        constraint=DIGITS,
        sampling=msgspec.convert(sampling, SamplingParams),
    )


def test_valid_answer_is_asked_for_once(ask: Ask) -> None:
    parrot = Parrot("42")
    result = ask(Asking(parrot, AskingConfig()), [question()])[1]
    assert result.text == "42"
    assert result.attempts == 1
    assert result.constraint == "enforced"
    assert len(parrot.heard) == 1


def test_invalid_answer_is_asked_for_again_with_other_seeds_and_summed_usage(ask: Ask) -> None:
    parrot = Parrot("no", "nope", "42")
    result = ask(Asking(parrot, AskingConfig()), [question(seed=5)])[1]
    assert result.error is None
    assert result.text == "42"
    assert result.attempts == 3
    assert result.usage == Usage(prompt_tokens=30, completion_tokens=6)
    seeds = [request.sampling.seed for request in parrot.heard]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    again = Parrot("no", "nope", "42")
    ask(Asking(again, AskingConfig()), [question(seed=5)])
    assert [request.sampling.seed for request in again.heard] == seeds


def test_answer_that_stays_invalid_is_an_error_with_the_raw_text(ask: Ask) -> None:
    result = ask(Asking(Parrot("no", "nope"), AskingConfig(max_asks=2)), [question()])[1]
    assert result.error is not None
    assert result.error.code == "schema_mismatch"
    assert result.error.status_code == 500
    assert result.error.param is None
    assert "nope" not in result.error.message
    assert result.text == "nope"
    assert result.attempts == 2


def test_answer_cut_off_is_told_apart(ask: Ask) -> None:
    parrot = Parrot("no", reason="length")
    result = ask(Asking(parrot, AskingConfig(max_asks=1)), [question()])[1]
    assert result.error is not None
    assert result.error.code == "truncated"


def test_cut_off_answer_that_is_valid_all_the_same_is_an_answer(ask: Ask) -> None:
    assert ask(Asking(Parrot("42", reason="length"), AskingConfig()), [question()])[1].error is None


def object_question(temperature: float = 1.0) -> Request:
    asked = question(temperature=temperature)
    return msgspec.structs.replace(asked, constraint=Constraint("json_object"))


def test_valid_object_that_ended_early_is_asked_for_again_and_kept_where_none_is_better(
    ask: Ask,
) -> None:
    parrot = Parrot('{"a": ""}', "{", "{", reason="length")
    result = ask(Asking(parrot, AskingConfig()), [object_question()])[1]
    assert result.error is None
    assert result.text == '{"a": ""}'
    assert result.finish_reason == "length"
    assert result.attempts == 3
    assert result.usage == Usage(prompt_tokens=30, completion_tokens=6)


def test_greedy_object_that_ended_early_is_asked_for_once(ask: Ask) -> None:
    parrot = Parrot('{"a": ""}', reason="length")
    result = ask(Asking(parrot, AskingConfig()), [object_question(temperature=0)])[1]
    assert result.error is None
    assert len(parrot.heard) == 1


def test_greedy_question_is_asked_once_since_its_answer_would_not_change(ask: Ask) -> None:
    parrot = Parrot("no", "42")
    result = ask(Asking(parrot, AskingConfig()), [question(temperature=0)])[1]
    assert result.error is not None
    assert result.error.code == "schema_mismatch"
    assert len(parrot.heard) == 1


def test_errors_and_free_answers_pass_through(ask: Ask) -> None:
    error = LineError(code="numerical_error", message="x", status_code=500)
    result = ask(Asking(Parrot("no", error=error), AskingConfig()), [question()])[1]
    assert result.error == error
    free = ask(Asking(Parrot("no"), AskingConfig()), [Request(id=1, prompt="?")])[1]
    assert free.error is None
    assert free.constraint is None


class Seeded(Parrot):
    """Its model's defaults have a seed."""

    @override
    def resolve_sampling(self, request: Request) -> SamplingParams:
        resolved = super().resolve_sampling(request)
        return msgspec.structs.replace(resolved, seed=7 if resolved.seed is None else resolved.seed)


def test_several_answers_to_one_request_differ_by_their_seeds_whoever_set_it(ask: Ask) -> None:
    parrot = Seeded("no", "42")
    result = ask(Asking(parrot, AskingConfig()), [question(n=3)])[1]
    assert result.error is None
    asked = [parrot.resolve_sampling(request).seed for request in parrot.heard]
    assert len(asked) == len(set(asked)) == 6, "three, and each of them once more"


def test_a_good_answer_is_kept_when_asking_again_brings_an_error(ask: Ask) -> None:
    class Tires(Parrot):
        @override
        def generate(self, source: Source) -> Generator[Result]:
            for result in super().generate(source):
                if len(self.heard) > 1:
                    error = LineError(code="out_of_memory", message="It is full.")
                    yield msgspec.structs.replace(result, error=error)
                else:
                    yield result

    request = msgspec.structs.replace(question(), constraint=Constraint("json_object"))
    result = ask(Asking(Tires("{}", reason="length"), AskingConfig()), [request])[1]
    assert (result.text, result.error, result.attempts) == ("{}", None, 2)


def test_a_part_that_was_given_up_stays_given_up() -> None:
    seen: list[bool] = []
    aborted: set[int] = set()

    class Slow(Parrot):
        @override
        def generate(self, source: Source) -> Generator[Result]:
            taken = source.take(2) or ()
            aborted.add(1)
            for _ in range(2):
                source.take(1)
                seen.extend(source.is_aborted(request.id) for request in taken)
            yield from ()

    class Aborting(ListSource):
        @override
        def is_aborted(self, request_id: int) -> bool:
            return request_id in aborted

    list(Asking(Slow("no"), AskingConfig()).generate(Aborting([question(n=2)])))
    assert seen == [True] * 4


def test_every_request_gets_one_result_when_many_are_asked_again(ask: Ask) -> None:
    parrot = Parrot("no", "42")
    results = ask(Asking(parrot, AskingConfig()), [question(i) for i in range(50)])
    assert set(results) == set(range(50))
    assert all(result.attempts == 2 for result in results.values())


def test_aborted_question_is_not_asked_again_and_does_not_keep_the_engine(ask: Ask) -> None:
    parrot = Parrot("no", "no", "no")
    results = ask(Asking(parrot, AskingConfig()), [question(1), question(2)], aborted={1})
    assert 1 not in results or results[1].error is not None
    assert results[2].attempts == 3
    assert sum(request.id == 1 for request in parrot.heard) <= 1


WEATHER = Tools(
    '[{"type":"function","function":{"name":"get_weather","parameters":{"type":"object",'
    '"properties":{"city":{"type":"string"}},"required":["city"]}}}]'
)
GOOD_CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'


def offering(choice: str = "auto", **sampling: object) -> Request:
    return Request(
        id=1,
        messages=(Message("user", "?"),),
        tools=msgspec.structs.replace(WEATHER, choice=choice),
        sampling=msgspec.convert(sampling, SamplingParams),
    )


def test_a_call_is_told_apart_from_the_words_around_it(ask: Ask) -> None:
    parrot = Parrot(f"<think>Hm.</think>I look.\n{GOOD_CALL}")
    result = ask(Asking(parrot, AskingConfig()), [offering()])[1]
    assert result.tool_calls == (ToolCall("get_weather", '{"city": "Bern"}'),)
    assert (result.text, result.reasoning, result.error) == ("I look.", "Hm.", None)
    assert result.constraint is None


def test_a_model_may_answer_without_calling_anything(ask: Ask) -> None:
    result = ask(Asking(Parrot("Sunny."), AskingConfig()), [offering()])[1]
    assert (result.text, result.tool_calls, result.attempts) == ("Sunny.", (), 1)


@pytest.mark.parametrize(
    ("bad", "choice"),
    [
        ('<tool_call>{"name": "get_weather", "arguments": {"town": "Bern"}}</tool_call>', "auto"),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "auto"),
        ("<tool_call>{", "auto"),
        ("Sunny.", "required"),
        ("Sunny.", "get_weather"),
        (GOOD_CALL + GOOD_CALL, "get_weather"),
    ],
)
def test_a_bad_call_is_asked_for_again(ask: Ask, bad: str, choice: str) -> None:
    result = ask(Asking(Parrot(bad, GOOD_CALL), AskingConfig()), [offering(choice)])[1]
    assert (result.attempts, len(result.tool_calls), result.error) == (2, 1, None)


def test_a_call_that_stays_bad_is_an_error_that_keeps_the_text(ask: Ask) -> None:
    bad = '<tool_call>{"name": "get_weather", "arguments": {"city": 3}}</tool_call>'
    result = ask(Asking(Parrot(bad), AskingConfig(max_asks=2)), [offering()])[1]
    assert result.error is not None
    assert result.error.code == "schema_mismatch"
    assert "arguments of a tool call" in result.error.message
    assert (result.text, result.tool_calls, result.attempts) == (bad, (), 2)
