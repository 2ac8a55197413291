"""Every check of the suite fails where what it is about is taken out.

Each runs against a model in float32 whose engine never hears of one thing: once as the line loses
it on its way, once as the engine ignores it, with everything around it as it is.
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tokenizers import Tokenizer
from typing_extensions import override

from engine.asking import Asking
from engine.base import Engine, Source
from engine.config import AskingConfig, HfConfig
from engine.hf.engine import HfEngine
from jobs.domain.request import PARAMETERS, Constraint, Request, SamplingParams
from jobs.domain.result import Result
from jobs.domain.tools import forced_schema
from tests.conformance.engine.behaviour import check_aborted_while_running, check_over_long
from tests.conformance.engine.parameters import CHECKS, IGNORED, check_ignored
from tests.conformance.engine.talking import Talk, every_constraint

FAILURE = (AssertionError, pytest.fail.Exception)
ASKING = AskingConfig(max_asks=2)


def _same(request: Request) -> Request:
    return request


def _kept(result: Result) -> Result:
    return result


class Deaf:
    """An engine that never hears of something: what it is asked is changed on the way to it."""

    def __init__(
        self,
        engine: HfEngine,
        *,
        change: Callable[[Request], Request] = _same,
        tell: Callable[[Result], Result] = _kept,
        hears_aborts: bool = True,
    ) -> None:
        self._engine = engine
        self._change = change
        self._tell = tell
        self._hears_aborts = hears_aborts

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def generate(self, source: Source) -> Generator[Result]:
        changed = Changed(source, self._change, hears_aborts=self._hears_aborts)
        for result in self._engine.generate(changed):
            yield self._tell(result)

    def close(self) -> None:
        """Stay open: others borrow it as well."""


class Changed:
    """Requests that are changed as they are taken."""

    def __init__(
        self, source: Source, change: Callable[[Request], Request], *, hears_aborts: bool
    ) -> None:
        self._source = source
        self._change = change
        self._hears_aborts = hears_aborts

    def take(self, n: int) -> Sequence[Request] | None:
        taken = self._source.take(n)
        return None if taken is None else [self._change(request) for request in taken]

    def is_aborted(self, request_id: int) -> bool:
        return self._hears_aborts and self._source.is_aborted(request_id)


@dataclass(frozen=True, kw_only=True)
class Forgetful(Talk):
    """Somebody whose lines lose some fields on their way."""

    forgets: frozenset[str]

    @override
    def request(self, request_id: int, endpoint: str, body: Mapping[str, Any]) -> Request:
        kept = {name: value for name, value in body.items() if name not in self.forgets}
        return super().request(request_id, endpoint, kept)


def _without(**defaults: Any) -> Callable[[Request], Request]:  # noqa: ANN401 -- sampling fields
    def change(request: Request) -> Request:
        sampling = msgspec.structs.replace(request.sampling, **defaults)
        return msgspec.structs.replace(request, sampling=sampling)

    return change


def _unconstrained(request: Request) -> Request:
    return msgspec.structs.replace(request, constraint=None)


def _without_tools(request: Request) -> Request:
    return msgspec.structs.replace(request, tools=None)


def _parallel(request: Request) -> Request:
    if request.tools is None or not request.tools.is_forced:
        return request
    tools = msgspec.structs.replace(request.tools, is_parallel=True)
    return msgspec.structs.replace(
        request, constraint=Constraint("json_schema", forced_schema(tools))
    )


def _at_most_chosen(request: Request) -> Request:
    told = request.sampling.logprobs
    return _without(logprobs=None if told is None else 0)(request)


def _cut(request: Request) -> Request:
    """Make a prompt short, as an engine does that cuts what is too long."""
    if request.messages is not None:
        last = request.messages[-1]
        short = msgspec.structs.replace(last, content=last.content[:100])
        return msgspec.structs.replace(request, messages=(*request.messages[:-1], short))
    return msgspec.structs.replace(request, prompt=(request.prompt or "")[:100])


_NO_PARAMETERS = SamplingParams()
IGNORING: dict[str, Callable[[Request], Request]] = {
    **{
        name: _without(**{name: getattr(_NO_PARAMETERS, name)})
        for name in SamplingParams.__struct_fields__
        if name != "n"  # which never reaches an engine: see engine.asking
    },
    **{
        name: _unconstrained
        for name in PARAMETERS
        if name.startswith("guided_") or name in {"response_format", "structured_outputs"}
    },
    "max_completion_tokens": _without(max_tokens=None),
    "parallel_tool_calls": _parallel,
    "tool_choice": _unconstrained,
    "tools": _without_tools,
    "top_logprobs": _at_most_chosen,
}
NOTHING_WITHOUT = {"logprobs": ("top_logprobs",), "tools": ("tool_choice",)}
"""Parameters that are refused where another one is missing."""
CONSTRAINTS = sorted(name for name, change in IGNORING.items() if change is _unconstrained)


@pytest.fixture(scope="module")
def inner(tiny_model: Path) -> Iterator[HfEngine]:
    config = HfConfig(
        model=str(tiny_model), device="cpu", compute_dtype="float32", slots=4, asking=ASKING
    )
    with closing(HfEngine(config, model="tiny")) as engine:
        yield engine


@pytest.fixture(scope="module")
def talk_to(tiny_model: Path) -> Callable[[Engine], Talk]:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    described = json.loads((tiny_model / "generation_config.json").read_text("utf-8"))

    def open_talk(engine: Engine) -> Talk:
        return Talk(
            engine=engine,
            enforces=every_constraint,
            tokenizer=tokenizer,
            end=described["eos_token_id"],
        )

    return open_talk


@pytest.fixture
def deafened(inner: HfEngine) -> Iterator[Callable[..., Engine]]:
    """Return a function that gives the engine, deaf as its arguments say."""
    opened: list[Engine] = []

    def deafen(**how: Any) -> Engine:  # noqa: ANN401 -- those of Deaf
        opened.append(Asking(cast("Engine", Deaf(inner, **how)), ASKING))
        return opened[-1]

    yield deafen
    for engine in opened:
        engine.close()


Deafened = Callable[..., Engine]
TalkTo = Callable[[Engine], Talk]


def test_each_parameter_can_be_ignored() -> None:
    assert IGNORING.keys() == set(PARAMETERS) - {"n", "stream", "user"}


@pytest.mark.parametrize("parameter", [name for name in PARAMETERS if name != "user"])
def test_check_fails_where_a_line_loses_the_parameter(
    deafened: Deafened, talk_to: TalkTo, parameter: str
) -> None:
    talk = talk_to(deafened())
    lost = {parameter, *NOTHING_WITHOUT.get(parameter, ())}
    told = {field.name: getattr(talk, field.name) for field in fields(talk)}
    with pytest.raises(FAILURE):
        CHECKS[parameter](Forgetful(**told, forgets=frozenset(lost)))


@pytest.mark.parametrize("parameter", IGNORING)
def test_check_fails_where_the_engine_ignores_the_parameter(
    deafened: Deafened, talk_to: TalkTo, parameter: str
) -> None:
    talk = talk_to(deafened(change=IGNORING[parameter]))
    with pytest.raises(FAILURE):
        CHECKS[parameter](talk)


@pytest.mark.parametrize("parameter", CONSTRAINTS)
def test_check_fails_where_the_engine_only_says_that_it_keeps_a_constraint(
    deafened: Deafened, talk_to: TalkTo, parameter: str
) -> None:
    def boast(result: Result) -> Result:
        return msgspec.structs.replace(result, constraint="enforced")

    with pytest.raises(FAILURE):
        CHECKS[parameter](talk_to(deafened(change=_unconstrained, tell=boast)))


@pytest.mark.parametrize("parameter", CONSTRAINTS)
def test_check_fails_where_the_engine_leaves_a_constraint_to_validation(
    deafened: Deafened, talk_to: TalkTo, parameter: str
) -> None:
    def admit(result: Result) -> Result:
        kept = None if result.constraint is None else "validated"
        return msgspec.structs.replace(result, constraint=kept)

    with pytest.raises(FAILURE):
        CHECKS[parameter](talk_to(deafened(tell=admit)))


@pytest.mark.parametrize("parameter", sorted(IGNORED))
def test_parameter_that_does_something_is_not_taken_for_one_that_is_ignored(
    deafened: Deafened, talk_to: TalkTo, parameter: str
) -> None:
    with pytest.raises(FAILURE):
        check_ignored(talk_to(deafened()), parameter)


def test_check_of_cancellation_fails_where_the_engine_goes_on(deafened: Deafened) -> None:
    with pytest.raises(FAILURE):
        check_aborted_while_running(deafened(hears_aborts=False))


def test_check_of_long_prompts_fails_where_the_engine_cuts_them(deafened: Deafened) -> None:
    with pytest.raises(FAILURE):
        check_over_long(deafened(change=_cut))


def test_all_checks_pass_where_the_engine_hears_everything(
    deafened: Deafened, talk_to: TalkTo
) -> None:
    engine = deafened()
    talk = talk_to(engine)
    for check in CHECKS.values():
        check(talk)
    check_aborted_while_running(engine)
    check_over_long(engine)
