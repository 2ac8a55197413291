"""Sends requests to one server, as many at once as it bears, and tries again what may yet succeed.

    ready ──► running ──► answered: a result
      ▲          │
      │          ├── the line's fault (400, 413, ...): a result with an error
      │          ├── a fault of this try (500, half an answer, silence): back after a pause, so
      │          │   many times while others succeed, then a result with an error
      │          └── the server's state (429, 503, not there): back at once, and everybody waits
      └──────────────┘

Everything here runs in one event loop; `engine.remote` owns it.
"""

import asyncio
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import xxhash

from engine import openai_api
from engine.concurrency import AdaptiveLimit
from engine.config import RemoteConfig
from engine.exchange import Exchange
from engine.openai_answers import FLOAT_BYTES, Answer, Refusal, Trouble
from engine.openai_api import Level
from engine.rates import RateLimiter
from engine.sampling import longest_answer
from jobs.domain.errors import (
    BatchctlError,
    EngineError,
    EngineMisconfigured,
    EngineUnavailable,
    InternalError,
)
from jobs.domain.pooling import Pooling
from jobs.domain.request import Request
from jobs.domain.result import LineError, Result
from jobs.telemetry import log

STREAM_ABOVE_TOKENS = 1024
"""Answers that may be longer are streamed, where `streaming` is auto."""
START_PATIENCE_SECONDS = 60.0
"""Patience with a server that has never answered and is not there: the URL may be wrong."""

_BACK_OFF_SECONDS = (0.25, 30.0)
_MAX_PROBE_SECONDS = 5.0
_LOG_SECONDS = 30.0
_FEW_JOBS = 2
_NOT_THERE = frozenset({404, 405, 501})  # the latter two: a web server that takes no POST
_MAX_PAUSE_SECONDS = 300.0
_TICK_SECONDS = 0.5
_GUESSED_ANSWER_TOKENS = 256
_MAX_REMEMBERED = 1024
_REFUSALS_OF_A_KIND = 3
# A request that is put off because the server has too much to do is hardly to blame, unless that
# happens to it again and again while others are answered.
_FAULT, _LOAD = 5, 1

_SAID: Mapping[str, str] = {
    "connect_timeout": "no connection in time",
    "connection_failed": "no connection (refused, or no such host)",
    "proxy_failed": "the proxy failed",
    "timed_out": "no byte in time",
    "connection_lost": "the connection was closed",
    "invalid_answer": "an answer that is none of OpenAI's API",
    "html_answer": "a web page instead of JSON",
    "half_answer": "half an answer",
    "empty_answer": "an empty answer",
    "redirected": "a redirection",
    "engine_error": "an error of the engine behind the server",
}


class _Job:
    """A request that has no result yet."""

    def __init__(self, request: Request, levels: tuple[Level, ...], estimate: int) -> None:
        self.request = request
        self.levels = levels
        self.level = levels[0]
        self.estimate = estimate
        self.codes: Counter[str] = Counter()
        self.blame = 0
        self.alive_before = -1
        self.started_at = 0.0
        self.has_bytes = False
        self.task: asyncio.Task[None] | None = None
        self.streams = False
        self.max_tokens_name = ""


class Traffic:
    """Everything that is out at, or waits for, one server."""

    def __init__(
        self, config: RemoteConfig, *, model: str, emit: Callable[[Result | BatchctlError], None]
    ) -> None:
        """Prepare; `open` connects nothing either.

        Args:
            model: what the server calls it.
            emit: is called with each result, and with the error that ends the work.
        """
        self._config = config
        self._model = model
        self._emit = emit
        self._exchange = Exchange(config, model=model)
        self._limit = AdaptiveLimit(config.slots)
        self._rates = RateLimiter(config)
        self._rng = random.Random()  # noqa: S311 - for pauses
        self._ready: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._running: dict[int, _Job] = {}
        self._resting: dict[int, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._pause_until = 0.0
        self._rounds = 0
        self._num_alive = 0
        self._num_answers = 0
        self._trouble_since: float | None = None
        self._last_alive_at = 0.0
        self._last_trouble = ""
        self._last_kind = ""
        self._streams = config.streaming
        self._max_tokens_name = "max_tokens"
        self._levels: OrderedDict[str, Level] = OrderedDict()
        self._refused_kinds: Counter[str] = Counter()
        self._progress = 0
        self._logged_at = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()

    def room(self, num_held: int) -> int:
        """Return how many more requests to take while so many have no result; any thread may ask.

        One that rests before its next try leaves its place to another.
        """
        num_active = num_held - len(self._resting)
        return min(self._limit.limit - num_active, 2 * self._config.slots - num_held)

    @property
    def progress(self) -> int:
        """A number that grows with bytes and results, and while requests wait within bounds."""
        return self._progress

    def open(self) -> None:
        """Start to send what is submitted.

        Raises:
            EngineMisconfigured: the proxy or the certificates of the environment are unusable.
        """
        self._exchange.open()
        self._start(self._dispatch())
        self._start(self._tick())

    async def close(self) -> None:
        """Close every connection."""
        await self.abandon()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._rates.close()
        await self._exchange.close()

    async def count_tokens(self, request: Request) -> int | None:
        """Return the number of prompt tokens, or None where the server does not count."""
        return await self._exchange.count_tokens(request)

    def submit(self, requests: Iterable[Request]) -> None:
        """Take requests to send."""
        if not self._jobs:
            self._trouble_since = None  # of requests that are long gone
        for request in requests:
            job = _Job(request, self._levels_of(request), self._estimate(request))
            self._jobs[request.id] = job
            self._ready.append(job)
        self._wake.set()

    def abort(self, request_ids: Iterable[int]) -> None:
        """Forget requests; what is out for them is given up by closing its connection."""
        for request_id in request_ids:
            job = self._jobs.pop(request_id, None)
            if job is None:
                continue
            if (timer := self._resting.pop(request_id, None)) is not None:
                timer.cancel()
            if job.task is not None:
                job.task.cancel()
        self._ready = deque(job for job in self._ready if job.request.id in self._jobs)
        if not self._jobs:
            self._trouble_since = None

    async def abandon(self) -> None:
        """Forget everything, and return once nothing is out any more."""
        tasks = [job.task for job in self._running.values() if job.task is not None]
        self.abort(list(self._jobs))
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- when a request is sent ---

    def _start(self, work: Any) -> asyncio.Task[None]:  # noqa: ANN401 - any coroutine
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("remote_engine_fault", exc_info=error)
            self._emit(InternalError(f"{type(error).__name__} in the remote engine; see its log."))

    async def _dispatch(self) -> None:
        while True:
            self._wake.clear()
            wait: float | None = None
            if self._ready and len(self._running) < self._limit.limit:
                wait = self._pause_until - time.monotonic()
                if wait <= 0 and self._rates.is_needed:
                    wait = await self._rates.acquire(self._ready[0].estimate) if self._ready else 0
                if wait <= 0:
                    if self._ready:
                        self._send(self._ready.popleft())
                    continue
                wait = min(wait, 1.0)  # a shared pause may end, or begin, meanwhile
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _send(self, job: _Job) -> None:
        job.started_at = time.monotonic()
        job.has_bytes = False
        if job.alive_before < 0:
            job.alive_before = self._num_alive
        self._running[job.request.id] = job
        job.task = self._start(self._run(job))

    async def _run(self, job: _Job) -> None:
        try:
            outcome = await self._ask(job)
        finally:
            if self._running.get(job.request.id) is job:
                del self._running[job.request.id]
            self._wake.set()
        if self._jobs.get(job.request.id) is job:
            job.task = None
            await self._judge(job, outcome)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            if self._jobs:
                # Every wait here has an end of its own: a request's time-out, a pause's cap, the
                # patience with the server. So this loop's turning is progress.
                self._progress += 1
            self._check_patience()

    # --- what becomes of it ---

    async def _ask(self, job: _Job) -> Answer | Trouble | Refusal | EngineError:
        request, config = job.request, self._config
        job.streams = (self._streams == "always" and request.pooling is None) or (
            self._streams == "auto"
            and openai_api.may_be_long(request, config.defaults, than=STREAM_ABOVE_TOKENS)
        )
        job.max_tokens_name = self._max_tokens_name
        body = openai_api.build_body(
            request,
            model=self._model,
            defaults=config.defaults,
            constraint_fields=openai_api.constraint_fields(
                request.constraint, config.native_constraints, job.level
            ),
            streams=job.streams,
            max_tokens_name=job.max_tokens_name,
        )

        def note_bytes() -> None:
            job.has_bytes = True
            self._progress += 1

        endpoint = openai_api.endpoint_of(request)
        return await self._exchange.ask(endpoint, body, note_bytes=note_bytes)

    async def _judge(self, job: _Job, outcome: Answer | Trouble | Refusal | EngineError) -> None:
        if isinstance(outcome, Trouble):
            if outcome.code == "redirected" and not self._num_answers:
                self._emit(
                    EngineMisconfigured(
                        f"{self._exchange.shown} sends callers elsewhere (status "
                        f"{outcome.status}); set `url` to where it sends them."
                    )
                )
                return
            await self._retry(job, outcome)
            return
        if isinstance(outcome, EngineError):
            self._emit(outcome)
            return
        if isinstance(outcome, Refusal):
            blocking = await self._find_blocking(outcome)
            if self._jobs.get(job.request.id) is not job:
                return  # given up meanwhile
            if blocking is not None:
                self._emit(blocking)
                return
            self._note_alive()
            if not self._change(job, outcome):
                self._finish(job, self._refused(job, outcome))
            return
        self._note_alive()
        self._num_answers += 1
        self._limit.note_success()
        self._remember(job)
        used = outcome.usage.prompt_tokens + outcome.usage.completion_tokens
        self._finish(job, self._answered(job, outcome))
        await self._rates.settle(estimated=job.estimate, used=used or job.estimate)

    def _finish(self, job: _Job, result: Result) -> None:
        if self._jobs.get(job.request.id) is job:
            del self._jobs[job.request.id]
            self._progress += 1
            self._emit(result)

    def _note_alive(self) -> None:
        self._num_alive += 1
        self._trouble_since = None
        self._rounds = 0
        self._last_alive_at = time.monotonic()

    def _answered(self, job: _Job, answer: Answer) -> Result:
        error = None
        if answer.refused == "content_filter":
            error = LineError(
                code="content_filter",
                message="A content filter of the server cut the answer off.",
                status_code=400,
            )
        elif answer.refused:
            error = LineError(
                code="refusal", message="The model refused to answer.", status_code=400
            )
        pooling = job.request.pooling
        if pooling is not None and not _answers(pooling, answer):
            error = LineError(
                code="invalid_answer",
                message="The server made other than one vector or score of each text, or "
                "vectors of another length.",
                status_code=502,
            )
        kept = None
        if job.request.constraint is not None:
            is_held = (
                job.level != "none"
                and self._config.native_constraints == "vllm"
                and job.request.tools is None
            )
            kept = "enforced" if is_held else "validated"
        return Result(
            id=job.request.id,
            text=answer.text,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            error=error,
            constraint="enforced" if kept == "enforced" else "validated" if kept else None,
            reasoning=answer.reasoning,
            tool_calls=answer.tool_calls,
            logprobs=answer.logprobs,
            vectors=answer.vectors,
            scores=answer.scores,
        )

    def _refused(self, job: _Job, refusal: Refusal) -> Result:
        return Result(
            id=job.request.id,
            error=refusal.error,
            attempts=job.codes.total() + 1,
            constraint="validated" if job.request.constraint is not None else None,
        )

    async def _find_blocking(self, refusal: Refusal) -> EngineError | None:
        """Return the error that no request can get past, or None where it is this one's own."""
        status, code = refusal.status, refusal.error.code
        if refusal.no_quota:
            return EngineUnavailable(
                f"{self._exchange.shown} says that the account has no quota left (status {status}, "
                f"{code}); add credit, or use another key."
            )
        is_first = not self._num_answers
        if status == 401 or (status == 403 and is_first and not refusal.about_content):  # noqa: PLR2004
            what = "refuses the API key" if self._config.api_key else "asks for an API key"
            return EngineMisconfigured(
                f"{self._exchange.shown} {what} (status {status}); set the model's `api_key` or "
                "`remote.api_key`."
            )
        if status in _NOT_THERE and is_first:
            return await self._exchange.explain_missing(status)
        return None

    # --- trying again ---

    def _change(self, job: _Job, refusal: Refusal) -> bool:
        """Send a refused request again in the form that the server may want; False: it has none."""
        if refusal.about_max_tokens and job.max_tokens_name == "max_tokens":
            self._max_tokens_name = "max_completion_tokens"
        elif refusal.about_stream and job.streams:
            self._streams = "never"
        elif refusal.about_constraint and job.level != "none":
            job.level = job.levels[job.levels.index(job.level) + 1]
        else:
            return False
        self._ready.appendleft(job)
        self._wake.set()
        return True

    async def _retry(self, job: _Job, trouble: Trouble) -> None:
        now = time.monotonic()
        job.codes[trouble.code] += 1
        self._note_trouble(trouble, started_at=job.started_at)
        is_news = trouble.slows and self._slow_down(trouble, job.started_at)
        pause = 0.0
        if trouble.kind != "fault" and is_news:
            self._rounds += 1
            most = _MAX_PROBE_SECONDS if trouble.kind == "away" else _BACK_OFF_SECONDS[1]
            pause = self._jitter(self._rounds, most)
        # A server may ask for no pause at all, or for one that is over, each time.
        asked = min(trouble.retry_after or 0.0, _MAX_PAUSE_SECONDS)
        self._pause_until = max(self._pause_until, now + max(pause, asked))
        if asked > 0:
            await self._rates.pause(asked)
            if self._jobs.get(job.request.id) is not job:
                return  # given up meanwhile, and its id perhaps given to another
        if self._is_blamed(job):
            job.blame += {"fault": _FAULT, "load": _LOAD, "away": 0}[trouble.kind]
        job.alive_before = self._num_alive
        if job.blame >= _FAULT * self._config.max_tries:
            self._finish(job, self._given_up(job, trouble))
            return
        if self._check_patience() or self._jobs.get(job.request.id) is not job:
            return
        if trouble.kind == "fault":
            delay = self._jitter(job.codes.total(), _BACK_OFF_SECONDS[1])
            self._resting[job.request.id] = asyncio.get_running_loop().call_later(
                delay, self._again, job
            )
        else:
            self._again(job)

    def _note_trouble(self, trouble: Trouble, *, started_at: float) -> None:
        now = time.monotonic()
        self._last_trouble, self._last_kind = trouble.code, trouble.kind
        if self._trouble_since is None:
            self._trouble_since = max(self._last_alive_at, started_at)
        if now - self._logged_at > _LOG_SECONDS:
            self._logged_at = now
            log.warning("remote_trouble", server=self._exchange.shown, code=trouble.code)

    def _again(self, job: _Job) -> None:
        self._resting.pop(job.request.id, None)
        self._ready.appendleft(job)
        self._wake.set()

    def _slow_down(self, trouble: Trouble, started_at: float) -> bool:
        """Lower the limit where that may help; return False if that was done for this failure."""
        now = time.monotonic()
        if trouble.kind == "away":
            return self._limit.note_outage(started_at=started_at, now=now)
        return self._limit.note_overload(started_at=started_at, now=now)

    def _jitter(self, num_failures: int, most: float) -> float:
        """Return a pause: exponential, with full jitter.

        Source: M. Brooker 2015, Exponential Backoff And Jitter.
        """
        return self._rng.uniform(0, min(most, _BACK_OFF_SECONDS[0] * 2.0 ** min(num_failures, 16)))

    def _is_blamed(self, job: _Job) -> bool:
        """Return whether a failure counts against the request, not the server.

        It does when the server was well with others since this one was sent or failed before, or
        is well with all but the last few.
        """
        return self._num_alive > job.alive_before or (
            self._num_answers > 0 and len(self._jobs) <= _FEW_JOBS
        )

    def _given_up(self, job: _Job, trouble: Trouble) -> Result:
        tries = job.codes.total()
        codes = ", ".join(f"{code} x {n}" for code, n in job.codes.most_common())
        return Result(
            id=job.request.id,
            attempts=tries,
            constraint="validated" if job.request.constraint is not None else None,
            error=LineError(
                code="rate_limit_exceeded" if trouble.kind == "load" else "server_error",
                message=f"The server failed {tries} times on this request while it answered "
                f"others: {codes}.",
                status_code=trouble.status if trouble.status >= 400 else 502,  # noqa: PLR2004
            ),
        )

    def _check_patience(self) -> bool:
        """Emit the end of the work once the server has failed everything for too long."""
        if self._trouble_since is None or not self._jobs:
            return False
        patience = self._config.patience_seconds
        if not self._num_answers and self._last_kind != "load":
            patience = min(patience, START_PATIENCE_SECONDS)
        since = self._trouble_since
        if time.monotonic() - since < patience:
            return False
        if any(job.has_bytes and job.started_at <= since for job in self._running.values()):
            return False  # a long answer from before the trouble still comes in
        self._trouble_since = None
        what = _SAID.get(self._last_trouble, f"status {self._last_trouble}")
        self._emit(
            EngineUnavailable(
                f"{self._exchange.shown} has answered no request for {patience:.0f} s; the last "
                f"one got: {what}. No answer that came before is lost."
            )
        )
        return True

    # --- what was learnt about constraints ---

    def _levels_of(self, request: Request) -> tuple[Level, ...]:
        # Where there are tools the constraint is theirs, and the server's to keep.
        constraint = None if request.tools is not None else request.constraint
        levels = openai_api.constraint_levels(
            constraint, self._config.native_constraints, chat=request.messages is not None
        )
        if constraint is None:
            return levels
        known = self._levels.get(_digest(request))
        if known in levels:
            return levels[levels.index(known) :]
        if self._refused_kinds[constraint.kind] >= _REFUSALS_OF_A_KIND:
            return ("none",)
        return levels

    def _remember(self, job: _Job) -> None:
        """Keep at which level a constraint was taken, once it was refused at a stricter one."""
        constraint = job.request.constraint
        if constraint is None:
            return
        if job.level == "none" and job.levels[0] != "none":
            self._refused_kinds[constraint.kind] += 1
        elif job.level != "none":
            self._refused_kinds.pop(constraint.kind, None)
        if job.level != job.levels[0]:
            self._levels[_digest(job.request)] = job.level
            if len(self._levels) > _MAX_REMEMBERED:
                self._levels.popitem(last=False)

    def _estimate(self, request: Request) -> int:
        answer = longest_answer(request.sampling, self._config.defaults)
        return openai_api.estimate_tokens(request) + (answer or _GUESSED_ANSWER_TOKENS)


def _answers(pooling: Pooling, answer: Answer) -> bool:
    """Return whether there is a vector, or a score, of each text, and of the length asked for."""
    if pooling.task != "embed":
        return len(answer.scores) == len(pooling.texts)
    sizes = {len(vector) // FLOAT_BYTES for vector in answer.vectors}
    return len(answer.vectors) == len(pooling.texts) and (
        pooling.dimensions is None or sizes == {pooling.dimensions}
    )


def _digest(request: Request) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(request.constraint))
