"""Holds every engine's answers to their constraints, and asks again where they break them."""

from collections import deque
from collections.abc import Callable, Generator, Sequence

import msgspec
import xxhash

from engine.base import Engine, Source
from engine.bounded import BoundedCache
from engine.config import AskingConfig
from engine.constraints import Enforcement
from engine.sampling import is_greedy
from engine.sandbox import Sandbox
from engine.tools import Offer, judge, open_offer, take_apart
from engine.tuning import Tuning
from jobs.domain.errors import EngineDied
from jobs.domain.request import Capabilities, Request, SamplingParams
from jobs.domain.result import Choice, LineError, Result, Usage
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


class _Several(msgspec.Struct):
    """A request that wants several answers, each of which is asked for by itself."""

    request: Request
    num_asked: int
    answers: dict[int, Result] = msgspec.field(default_factory=dict)


class _Queue:
    """The source an engine sees: what is to be asked again comes first.

    A request that wants several answers becomes as many, with ids of ours, below 0.
    """

    def __init__(self, source: Source, resolve: Callable[[Request], SamplingParams]) -> None:
        self._source = source
        self._resolve = resolve
        self._waiting: deque[Request] = deque()
        self._is_closed = False
        self._num_parts = 0
        self._parts: dict[int, tuple[_Several, int]] = {}
        self.asked: dict[int, _Asked] = {}

    def take(self, n: int) -> Sequence[Request] | None:
        if len(self._waiting) < n and not self._is_closed:
            fresh = self._source.take(n - len(self._waiting))
            if fresh is None:
                self._is_closed = True
            for request in fresh or ():
                for one in self._split(request):
                    if one.constraint is not None or one.tools is not None:
                        self.asked[one.id] = _Asked(one)
                    self._waiting.append(one)
        taken: list[Request] = []
        while self._waiting and len(taken) < n:
            request = self._waiting.popleft()
            if not self.is_aborted(request.id):
                taken.append(request)
        # An answer that is still out may have to be asked for again.
        if not taken and self._is_closed and not self._has_open_questions():
            return None
        return taken

    def is_aborted(self, request_id: int) -> bool:
        if request_id < 0 and request_id not in self._parts:
            return True  # a part that was given up
        aborted = self._source.is_aborted(self.origin_of(request_id))
        if aborted:
            self.asked.pop(request_id, None)
            self._parts.pop(request_id, None)
        return aborted

    def ask_again(self, request: Request) -> None:
        self._waiting.appendleft(request)

    def origin_of(self, request_id: int) -> int:
        """Return the request that an id of ours stands for a part of."""
        part = self._parts.get(request_id)
        return part[0].request.id if part is not None else request_id

    def gather(self, result: Result) -> Result | None:
        """Return the result of a whole request, or None where further answers are out."""
        self.asked.pop(result.id, None)
        part = self._parts.pop(result.id, None)
        if part is None:  # of what was given up meanwhile nobody wants a part
            return result if result.id >= 0 else None
        several, number = part
        several.answers[number] = result
        return _join(several) if len(several.answers) == several.num_asked else None

    def _split(self, request: Request) -> list[Request]:
        """Return the requests of one answer each that make up a request."""
        wanted = request.sampling.n
        if wanted == 1:
            return [request]
        # Whatever is determined would be the same each time.
        sampling = self._resolve(request)
        several = _Several(request, 1 if is_greedy(sampling) else wanted)
        parts: list[Request] = []
        for number in range(several.num_asked):
            self._num_parts += 1
            self._parts[-self._num_parts] = (several, number)
            single = msgspec.structs.replace(
                request,
                id=-self._num_parts,
                sampling=msgspec.structs.replace(request.sampling, n=1),
            )
            parts.append(_with_another_seed(single, sampling.seed, f"/{number}" if number else ""))
        return parts

    def _has_open_questions(self) -> bool:
        for request_id in list(self.asked):
            self.is_aborted(request_id)
        return bool(self.asked)


def _join(several: _Several) -> Result:
    """Return one result of all answers; that of the first which failed, if one did."""
    answers = [several.answers[number] for number in range(several.num_asked)]
    first = next((one for one in answers if one.error is not None), answers[0])
    usage = first.usage
    for one in answers:
        if one is not first:
            # The prompt is one, however often it is computed: it stays in the cache.
            usage += msgspec.structs.replace(one.usage, prompt_tokens=0, cached_tokens=0)
    further = [
        Choice(
            text=one.text,
            finish_reason=one.finish_reason,
            reasoning=one.reasoning,
            tool_calls=one.tool_calls,
            logprobs=one.logprobs,
        )
        for one in (answers if several.num_asked > 1 else answers * several.request.sampling.n)[1:]
    ]
    return msgspec.structs.replace(
        first,
        id=several.request.id,
        usage=usage,
        attempts=max(one.attempts for one in answers),
        further=() if first.error is not None else tuple(further),
    )


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
        queue = _Queue(source, self._engine.resolve_sampling)
        try:
            for result in self._engine.generate(queue):
                asked = queue.asked.get(result.id)
                final = result if asked is None else self._judge(asked, result, queue)
                whole = None if final is None else queue.gather(final)
                if whole is not None:
                    yield whole
        except EngineDied as error:
            error.suspects = frozenset(map(queue.origin_of, error.suspects))
            raise

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
            return self._kept(asked, kept) or counted
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
            failure = _failure(counted, reason, unchanging)
            return self._kept(asked, kept) or msgspec.structs.replace(counted, error=failure)
        queue.ask_again(_with_another_seed(request, sampling.seed, f"?{asked.attempts}"))
        return None

    @staticmethod
    def _kept(asked: _Asked, constraint: Enforcement | None) -> Result | None:
        """Return the valid answer of an earlier try, if there is one."""
        if asked.ended_early is None:
            return None
        return msgspec.structs.replace(
            asked.ended_early, usage=asked.usage, attempts=asked.attempts, constraint=constraint
        )

    def _judge_calls(self, tools: Tools, result: Result) -> tuple[str | None, Result]:
        """Return what is wrong with an answer that may call tools, and the answer taken apart."""
        key = xxhash.xxh3_128_digest(tools.spec.encode())
        offer = self._offers.find(key)
        if offer is None:
            offer = self._offers.keep(key, open_offer(tools), weight=16 * len(tools.spec) + 512)
        if result.tool_calls:  # the engine told them apart
            complaint, answer = "", result
        else:
            speech = take_apart(
                result.text, tools=offer.schemas, is_cut=result.finish_reason == "length"
            )
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


def _with_another_seed(request: Request, seed: int | None, mark: str) -> Request:
    """Return the request with a seed that follows from `seed`; without one, any will differ.

    Args:
        mark: what tells it from others that follow from the same; empty: it is that seed.
    """
    if seed is None or not mark:
        return request
    mixed = xxhash.xxh3_64_intdigest(f"{seed}{mark}".encode()) >> 1
    return msgspec.structs.replace(
        request, sampling=msgspec.structs.replace(request.sampling, seed=mixed)
    )
