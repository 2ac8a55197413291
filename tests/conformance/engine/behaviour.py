"""What an engine does with requests that nobody waits for any more, and with those too long."""

import threading
import time
from collections.abc import Sequence

from engine.base import Engine
from jobs.domain.request import Message, Request, SamplingParams
from jobs.domain.result import Result

_LOOK_SECONDS = 0.5
"""Longer than any engine goes without asking who is aborted."""


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


def collect(engine: Engine, source: ScriptedSource) -> dict[int, Result]:
    found: dict[int, Result] = {}
    for result in engine.generate(source):
        assert result.id not in found, "two results for one request"
        found[result.id] = result
    return found


def hello(request_id: int) -> Request:
    return Request(
        id=request_id,
        messages=(Message("user", "Hello"),),
        sampling=SamplingParams(max_tokens=12, temperature=1.0, seed=request_id),
    )


def _abort_all(engine: Engine, count: int) -> tuple[set[int], dict[int, Result]]:
    """Abort so many requests once another has its result; return their ids and all results."""
    sampling = SamplingParams(
        max_tokens=engine.capabilities.context_tokens - 64, ignore_eos=True, temperature=0.0
    )
    # The words are an order for the simulated engine only.
    endless = [
        Request(id=i, prompt="Once [[fault=endless]]", sampling=sampling)
        for i in range(100, 100 + count)
    ]
    ids = {request.id for request in endless}
    source = ScriptedSource([hello(9), *endless], bite=count + 1)
    found: dict[int, Result] = {}
    for result in engine.generate(source):
        found[result.id] = result
        assert source.taken == {9} | ids, "the engine has them"
        source.aborted.update(ids)
        time.sleep(_LOOK_SECONDS)
    return ids, found


def check_aborted_while_running(engine: Engine) -> None:
    """Abort requests that are far from their ends: they have no results, and harm no other.

    A server goes on while nobody looks, so that on a busy machine they may end before it is told:
    there it gets many of them, and more than once if need be.
    """
    is_remote = engine.capabilities.engine == "remote"
    for _ in range(5 if is_remote else 1):
        ids, found = _abort_all(engine, engine.num_slots - 1 if is_remote else 2)
        assert found[9].error is None
        if ids - found.keys():
            break
    if is_remote:
        assert ids - found.keys(), "some were given up"
    else:
        assert found.keys() == {9}
    assert collect(engine, ScriptedSource([hello(1)])).keys() == {1}


def check_over_long(engine: Engine) -> None:
    """Send prompts that are too long by one token and by many, and one that just fits."""
    context_tokens = engine.capabilities.context_tokens
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    many = Message("user", "word " * (4 * context_tokens + 8))
    requests = [
        Request(id=1, messages=(many,), sampling=sampling),
        Request(id=2, prompt=(65,) * context_tokens, sampling=sampling),
        Request(id=3, prompt=(65,) * (context_tokens - 1), sampling=sampling),
        hello(4),
    ]
    results = collect(engine, ScriptedSource(requests))
    for too_long in (results[1], results[2]):
        error = too_long.error
        assert error is not None, "there is no room for an answer"
        assert error.code == "context_length_exceeded"
        assert error.status_code == 400
        assert "word word" not in error.message
        assert not too_long.text
    assert results[3].error is None, "there is room for one token"
    assert results[3].usage.prompt_tokens == context_tokens - 1
    assert results[3].usage.completion_tokens == 1
    if (
        engine.capabilities.engine != "simulated"
    ):  # whose replies are all as long as they mean to be
        assert results[3].finish_reason == "length"
    assert results[4].error is None
