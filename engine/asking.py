"""Holds every engine's answers to their constraints, and asks again where they break them."""

from collections import deque
from collections.abc import Generator, Sequence

import msgspec
import xxhash

from engine.base import Engine, Source
from engine.config import AskingConfig
from engine.constraints import BoundedCache
from engine.sampling import is_greedy
from engine.sandbox import Sandbox
from engine.tools import Offer, judge, open_offer, take_apart
from engine.tuning import Tuning
from jobs.domain.request import Capabilities, Request, SamplingParams
from jobs.domain.result import LineError, Result, Usage
from jobs.domain.tools import Tools

_CHECK_SECONDS = 1
"""Of processor time, to hold one answer against its constraint where that is not sure to be quick;
no other answer of the engine is looked at meanwhile."""


class _Asked(msgspec.Struct):
    """A constrained request that has no final result yet."""

    request: Request
    attempts: int = 0
    usage: Usage = Usage()
    ended_early: Result | None = None
    """A valid answer that ran out of tokens; what comes of asking again may be whole."""


class _Queue:
    """The source an engine sees: what is to be asked again comes first."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._again: deque[Request] = deque()
        self._is_closed = False
        self.asked: dict[int, _Asked] = {}

    def take(self, n: int) -> Sequence[Request] | None:
        taken: list[Request] = []
        while self._again and len(taken) < n:
            request = self._again.popleft()
            if self._source.is_aborted(request.id):
                self.asked.pop(request.id, None)
            else:
                taken.append(request)
        if len(taken) < n and not self._is_closed:
            fresh = self._source.take(n - len(taken))
            if fresh is None:
                self._is_closed = True
            else:
                for request in fresh:
                    if request.constraint is not None or request.tools is not None:
                        self.asked[request.id] = _Asked(request)
                taken.extend(fresh)
        # An answer that is still out may have to be asked for again.
        if not taken and self._is_closed and not self._has_open_questions():
            return None
        return taken

    def is_aborted(self, request_id: int) -> bool:
        aborted = self._source.is_aborted(request_id)
        if aborted:
            self.asked.pop(request_id, None)
        return aborted

    def ask_again(self, request: Request) -> None:
        self._again.append(request)

    def _has_open_questions(self) -> bool:
        for request_id in list(self.asked):
            if self._source.is_aborted(request_id):
                del self.asked[request_id]
        return bool(self.asked)


class Asking:
    """An engine whose every answer keeps its constraint, or says why it does not."""

    def __init__(self, engine: Engine, config: AskingConfig) -> None:
        self._engine = engine
        self._config = config
        self._sandbox = Sandbox(cpu_seconds=_CHECK_SECONDS, wall_seconds=4 * _CHECK_SECONDS)
        self._offers: BoundedCache[Offer] = BoundedCache(max_entries=1024, max_bytes=64 << 20)

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""
        return self._engine.capabilities

    @property
    def num_slots(self) -> int:
        """How many requests the engine works on at once."""
        return self._engine.num_slots

    @property
    def tuning(self) -> Tuning | None:
        """What the engine works with now, where it chooses that."""
        return self._engine.tuning

    def count_tokens(self, request: Request) -> int:
        """Return the exact number of prompt tokens of a request."""
        return self._engine.count_tokens(request)

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters with every default filled in."""
        return self._engine.resolve_sampling(request)

    def progress(self) -> int:
        """Return a number that grows while the engine works; any thread may ask."""
        return self._engine.progress()

    def close(self) -> None:
        """Give the device back."""
        self._sandbox.close()
        self._engine.close()

    def generate(self, source: Source) -> Generator[Result]:
        """Yield one final result for each request of `source`, as they finish."""
        queue = _Queue(source)
        for result in self._engine.generate(queue):
            asked = queue.asked.get(result.id)
            final = result if asked is None else self._judge(asked, result, queue)
            if final is not None:
                queue.asked.pop(result.id, None)
                yield final

    def _judge(self, asked: _Asked, result: Result, queue: _Queue) -> Result | None:
        """Return the final result, or None when the question was asked again."""
        request = asked.request
        constraint = request.constraint
        asked.attempts += 1
        asked.usage += result.usage
        kept = None if constraint is None else result.constraint or "validated"
        counted = msgspec.structs.replace(
            result, usage=asked.usage, attempts=asked.attempts, constraint=kept
        )
        if result.error is not None:
            return counted
        if request.tools is not None:
            reason, answer = self._judge_calls(request.tools, counted)
        else:
            reason, answer = None, counted
            if constraint is not None:
                reason = self._sandbox.validate(constraint, result.text)
        sampling = self._engine.resolve_sampling(request)
        unchanging = is_greedy(sampling)
        is_last = unchanging or asked.attempts >= self._config.max_asks
        if reason is None:
            ended_early = (
                result.finish_reason == "length"
                and constraint is not None
                and constraint.kind.startswith("json")
            )
            if is_last or not ended_early:
                return answer
            asked.ended_early = answer
        elif is_last:
            if asked.ended_early is not None:
                return msgspec.structs.replace(
                    asked.ended_early, usage=asked.usage, attempts=asked.attempts, constraint=kept
                )
            return msgspec.structs.replace(counted, error=_failure(counted, reason, unchanging))
        queue.ask_again(_with_another_seed(request, sampling.seed, asked.attempts))
        return None

    def _judge_calls(self, tools: Tools, result: Result) -> tuple[str | None, Result]:
        """Return what is wrong with an answer that may call tools, and the answer taken apart."""
        key = xxhash.xxh3_128_digest(tools.spec.encode())
        offer = self._offers.find(key)
        if offer is None:
            offer = self._offers.keep(key, open_offer(tools), weight=16 * len(tools.spec) + 512)
        if result.tool_calls:  # the engine told them apart
            complaint, answer = "", result
        else:
            speech = take_apart(result.text, tools=offer.schemas)
            complaint = speech.complaint
            answer = msgspec.structs.replace(
                result,
                text=speech.content,
                reasoning=speech.reasoning or result.reasoning,
                tool_calls=speech.tool_calls,
            )
        reason = complaint or judge(
            answer.tool_calls, tools, offer, validate=self._sandbox.validate
        )
        return reason, answer


def _failure(result: Result, reason: str, unchanging: bool) -> LineError:  # noqa: FBT001
    if result.finish_reason == "length":
        return LineError(
            code="truncated",
            message=f"The answer was cut off after {result.usage.completion_tokens} tokens, "
            f"before it was complete: {reason}. Raise max_tokens.",
            status_code=500,
        )
    asked = (
        "it was greedy, so it was asked for once"
        if unchanging
        else f"it was asked for {result.attempts} times"
    )
    return LineError(
        code="schema_mismatch",
        message=f"The answer breaks its constraint: {reason}; {asked}.",
        status_code=500,
    )


def _with_another_seed(request: Request, seed: int | None, attempt: int) -> Request:
    """Return the request with a seed that follows from `seed`; without one, any will differ."""
    if seed is None:
        return request
    mixed = xxhash.xxh3_64_intdigest(f"{seed}/{attempt}".encode()) >> 1
    return msgspec.structs.replace(
        request, sampling=msgspec.structs.replace(request.sampling, seed=mixed)
    )
