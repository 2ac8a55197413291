"""What is made ready in a thread beside the engine's: in order, bounded, and never waited for."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engine.ahead import Ahead, Failure, drain
from engine.base import Source
from engine.config import AskingConfig, HfConfig
from engine.hf.engine import HfEngine
from engine.process import ProcessEngine
from jobs.domain.errors import EngineDied, EngineMisconfigured, EngineTimedOut
from jobs.domain.request import Constraint, Message, Request, SamplingParams
from jobs.domain.result import Result
from tests.builders import await_true
from tests.sources import ListSource

Ask = Callable[..., dict[int, Result]]
SECONDS = 60.0
NUM_TOKENS = 24
SLOTS = 4


def threads_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engine-ahead"]


def requests_of(sizes: Iterable[int], first: int = 0) -> list[Request]:
    return [Request(id=first + n, prompt="x" * size) for n, size in enumerate(sizes)]


# --- by itself ---


def test_requests_come_ready_in_the_order_they_were_handed_over() -> None:
    ready: queue.SimpleQueue[int | Failure] = queue.SimpleQueue()
    with Ahead(lambda request: -request.id, ready.put, num_slots=2) as ahead:
        ahead.hand_over(requests_of([1, 1]))
        ahead.hand_over(requests_of([1], first=2))
        assert ahead.pending == {0, 1, 2}
        assert [ready.get(timeout=SECONDS) for _ in range(3)] == [0, -1, -2]
        ahead.receive(0)
        assert ahead.pending == {1, 2}
    assert threads_ahead() == []


def test_leaving_does_not_wait_for_a_preparation_that_never_ends() -> None:
    never = threading.Event()
    begun = threading.Event()
    prepared: list[int] = []

    def hang(request: Request) -> int:
        begun.set()
        never.wait(SECONDS)
        prepared.append(request.id)
        return request.id

    with Ahead(hang, lambda _: None, num_slots=2) as ahead:
        ahead.hand_over(requests_of([1, 1]))
        assert begun.wait(SECONDS)
    never.set()
    await_true(lambda: not threads_ahead())
    assert prepared == [0], "what waited behind it is dropped"


@pytest.mark.parametrize("error", [TypeError("canary"), BaseException("a panic: canary")])
def test_failure_names_the_request_that_it_came_of_and_quotes_nothing(
    error: BaseException,
) -> None:
    ready: queue.SimpleQueue[int | Failure] = queue.SimpleQueue()

    def fail(request: Request) -> int:
        if request.id == 1:
            raise error
        return request.id

    with Ahead(fail, ready.put, num_slots=3) as ahead:
        ahead.hand_over(requests_of([1, 1, 1]))
        assert ready.get(timeout=SECONDS) == 0
        failure = ready.get(timeout=SECONDS)
    assert isinstance(failure, Failure)
    with pytest.raises(EngineDied) as caught:
        failure.surface()
    assert caught.value.suspects == {1}
    assert "canary" not in caught.value.message


def test_error_of_ours_comes_through_as_it_is() -> None:
    with pytest.raises(EngineMisconfigured, match="no template"):
        Failure(1, EngineMisconfigured("no template")).surface()


def test_drain_returns_all_there_is_and_waits_for_the_first_only() -> None:
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    assert drain(waiting, 0) == []
    assert drain(waiting, 0.001) == []
    waiting.put(1)
    waiting.put(2)
    assert drain(waiting, SECONDS) == [1, 2]


def open_ahead(num_slots: int) -> Ahead[int]:
    return Ahead(lambda request: request.id, lambda _: None, num_slots=num_slots)


def test_an_engine_takes_three_times_its_slots_and_no_more() -> None:
    with open_ahead(8) as ahead:
        assert ahead.room == 8, "nobody knows yet how large they are"
        ahead.hand_over(requests_of([100] * 8))
        assert ahead.room == 16
        ahead.hand_over(requests_of([100] * 16, first=8))
        assert ahead.room == 0
        ahead.receive(3)  # ready is not ended
        assert ahead.room == 0
        ahead.forget(3)
        assert ahead.room == 1


def test_large_requests_fill_the_slots_and_hardly_more() -> None:
    with open_ahead(8) as ahead:
        ahead.hand_over(requests_of([5 << 20] * 4))
        assert ahead.room == 4, "32 MiB hold six of them, the slots eight"
        ahead.hand_over(requests_of([5 << 20] * 4, first=4))
        assert ahead.room == 0
        ahead.forget(0)
        assert ahead.room == 1


def test_messages_and_constraints_count_as_much_as_prompts() -> None:
    large = "x" * (5 << 20)
    with open_ahead(2) as ahead:
        ahead.hand_over([Request(id=0, messages=(Message("user", large), Message("user", large)))])
        ahead.hand_over(
            [Request(id=1, prompt="x", constraint=Constraint("grammar", large + large))]
        )
        assert ahead.room == 1, "20 of 32 MiB are held: another of their size, and not four"


# --- in the engine on transformers ---


def config_of(folder: Path, **changes: object) -> HfConfig:
    settings = {
        "model": str(folder),
        "device": "cpu",
        "compute_dtype": "float32",
        "slots": SLOTS,
        "batch_tokens": 64,
        "page_tokens": 16,
        "num_blocks": 96,
        **changes,
    }
    return HfConfig.model_validate(settings)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[HfEngine]:
    opened = HfEngine(config_of(tiny_model), model="tiny")
    yield opened
    opened.close()


class HeldUp:
    """Stands where a part of an engine is, and holds up what it does for one request."""

    def __init__(self, part: Any, *, names: str, marked: Callable[[Any], bool]) -> None:  # noqa: ANN401
        self._part = part
        self._names = names
        self._marked = marked
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.was_released = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        found = getattr(self._part, name)
        if name != self._names:
            return found

        def held(given: Any) -> Any:  # noqa: ANN401
            if self._marked(given):
                self.begun.set()
                self.was_released = self.go_on.wait(SECONDS)
            return found(given)

        return held


def ask_for(request_id: int, text: str = "Once", **how: Any) -> Request:  # noqa: ANN401
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return Request(id=request_id, prompt=f"{text} {request_id}", sampling=sampling, **how)


HELD = 5
COMPANY = [ask_for(i) for i in range(HELD)]


def hold_up(
    monkeypatch: pytest.MonkeyPatch, engine: HfEngine, part: str, request: Request
) -> HeldUp:
    """Hold up the encoding of a request, or the compilation of its constraint."""
    names, marked = {
        "_encoder": ("encode", lambda given: given.id == request.id),
        "_constraints": ("matcher", lambda given: given == request.constraint),
    }[part]
    held = HeldUp(getattr(engine, part), names=names, marked=marked)
    monkeypatch.setattr(engine, part, held)
    return held


@pytest.mark.parametrize("part", ["_encoder", "_constraints"])
def test_request_that_takes_long_to_prepare_holds_up_no_step_of_others(
    monkeypatch: pytest.MonkeyPatch, engine: HfEngine, part: str
) -> None:
    slow = ask_for(HELD, constraint=Constraint("regex", "[a-f]{40}"))
    held = hold_up(monkeypatch, engine, part, slow)
    before = engine.progress()
    results: list[int] = []
    steps_meanwhile = 0
    for result in engine.generate(ListSource([*COMPANY, slow])):
        results.append(result.id)
        if len(results) == len(COMPANY):
            steps_meanwhile = engine.progress() - before
            held.go_on.set()
    assert held.was_released, "the others ended while it was being prepared"
    assert results == [*range(HELD), HELD]
    assert steps_meanwhile == len(COMPANY) * NUM_TOKENS


def test_request_that_is_aborted_before_it_is_ready_never_starts(
    monkeypatch: pytest.MonkeyPatch, engine: HfEngine
) -> None:
    slow = ask_for(HELD)
    held = hold_up(monkeypatch, engine, "_encoder", slow)
    source = ListSource([*COMPANY, slow])
    before = engine.progress()
    results: list[int] = []
    for result in engine.generate(source):
        results.append(result.id)
        if len(results) == len(COMPANY):
            assert held.begun.wait(SECONDS)
            source.aborted.add(slow.id)
            held.go_on.set()
    assert sorted(results) == list(range(HELD))
    assert engine.progress() - before == len(COMPANY) * NUM_TOKENS


def test_closing_while_a_request_is_prepared_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, engine: HfEngine, ask: Ask
) -> None:
    held = hold_up(monkeypatch, engine, "_encoder", ask_for(HELD))
    with closing(engine.generate(ListSource([*COMPANY, ask_for(HELD)]))) as running:
        next(running)
        assert held.begun.wait(SECONDS)
        held.go_on.set()
    assert threads_ahead() == []
    monkeypatch.undo()
    assert set(ask(engine, COMPANY)) == set(range(HELD))


def test_request_that_breaks_the_tokenizer_is_the_only_suspect_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, engine: HfEngine, ask: Ask
) -> None:
    expected = ask(engine, COMPANY)

    def marked(request: Request) -> bool:
        if request.id == HELD:
            raise RuntimeError("the tokenizer stumbled over canaries")
        return False

    monkeypatch.setattr(
        engine,
        "_encoder",
        HeldUp(engine._encoder, names="encode", marked=marked),  # noqa: SLF001
    )
    with pytest.raises(EngineDied) as caught:
        ask(engine, [*COMPANY, ask_for(HELD)])
    assert caught.value.suspects == {HELD}
    assert "canaries" not in caught.value.message
    monkeypatch.undo()
    assert ask(engine, COMPANY) == expected


class WatchedSource:
    """Counts what is out, and notes which threads ask."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.num_out = 0
        self.most_out = 0
        self.threads: set[int] = set()

    def take(self, n: int) -> Sequence[Request] | None:
        self.threads.add(threading.get_ident())
        taken = self._inner.take(n)
        self.num_out += len(taken or ())
        self.most_out = max(self.most_out, self.num_out)
        return taken

    def is_aborted(self, request_id: int) -> bool:
        return self._inner.is_aborted(request_id)


def test_source_is_asked_in_the_engines_thread_for_three_times_its_slots(engine: HfEngine) -> None:
    source = WatchedSource(ListSource([ask_for(i) for i in range(10 * SLOTS)]))
    for _ in engine.generate(source):
        source.num_out -= 1
    assert source.most_out == 3 * SLOTS
    assert source.threads == {threading.get_ident()}


@pytest.mark.slow  # the process loads torch, and then stands still for ten seconds
def test_preparation_that_never_ends_is_found_once_what_runs_has_ended(
    tiny_model: Path, tmp_path: Path
) -> None:
    # Planning would refuse it: its automaton has 33 million states.
    endless = ask_for(HELD, constraint=Constraint("regex", "(a|b)*a(a|b){24}"))
    config = config_of(tiny_model, asking=AskingConfig(backend="outlines_core"))
    process = ProcessEngine(
        config, model="tiny", log_path=tmp_path / "engine.log", stall_seconds=10
    )
    results: list[int] = []
    with closing(process), pytest.raises(EngineTimedOut) as caught:
        # Those that come before it raises are kept.
        results.extend(result.id for result in process.generate(ListSource([*COMPANY, endless])))
    assert sorted(results) == list(range(HELD))
    assert caught.value.suspects == {HELD}
