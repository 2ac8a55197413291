"""An Engine that lives in a process of its own, spoken to over a socketpair."""

import contextlib
import itertools
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from engine import guardian, wire
from engine.base import Source
from engine.config import EngineConfig, LlamacppConfig, RemoteConfig, VllmConfig
from engine.paths import expand
from engine.sampling import resolve_sampling
from engine.tuning import Tuning
from jobs.domain import errors
from jobs.domain.request import Capabilities, Request, SamplingParams
from jobs.domain.result import LineError, Result

_POLL_SECONDS = 0.005
_WAIT_SECONDS = 0.2

# Names of settings of ours that start as vLLM's own variables do; it warns of those it does not
# know. `jobs.settings` reads them.
_OUR_NAMES = frozenset(
    {
        "VLLM_GPU_MEMORY_UTILIZATION",
        "VLLM_MAX_MODEL_LEN",
        "VLLM_PREFIX_CACHING",
        "VLLM_QUANTIZATION",
        "VLLM_TENSOR_PARALLEL_SIZE",
    }
)
_OUR_PREFIX = "VLLM_REMOTE_"
_VLLM_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def _environment(config: EngineConfig) -> dict[str, str]:
    """Return this process's environment as the engine process gets it."""
    passed_on = {
        name: value
        for name, value in os.environ.items()
        if name not in _OUR_NAMES and not name.startswith(_OUR_PREFIX)
    }
    if isinstance(config, LlamacppConfig):
        # Where one of its assertions fails, ggml would first wait for a debugger's trace.
        return {"GGML_NO_BACKTRACE": "1"} | passed_on
    if not isinstance(config, VllmConfig):
        return passed_on
    fixed = {
        # The engine process has threads, and a forked child would hold its socket open.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # Where engine.vllm.startup reads why a child ended.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    if expand(config.model).is_dir():
        fixed["HF_HUB_OFFLINE"] = "1"
    return _VLLM_DEFAULTS | passed_on | fixed


def _engine_errors() -> dict[str, type[errors.EngineError]]:
    found: dict[str, type[errors.EngineError]] = {}
    todo: list[type[errors.EngineError]] = [errors.EngineError]
    while todo:
        kind = todo.pop()
        found[kind.code] = kind
        todo += kind.__subclasses__()
    return found


_ERRORS = _engine_errors()
_BLAMELESS = frozenset({errors.EngineUnavailable, errors.EngineMisconfigured})


class _Guardian:
    """Our side of `engine.guardian`: as long as this process has it, the engine may live."""

    def __init__(self) -> None:
        reading, self._pipe = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-I", "-S", guardian.__file__, str(reading)],
                pass_fds=[reading],
                start_new_session=True,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(reading)

    def watch(self, pid: int) -> None:
        """Let it end the process group of an engine when this process, or the engine, ends."""
        with contextlib.suppress(BrokenPipeError):  # somebody killed it
            os.write(self._pipe, b"%d\n" % pid)

    def dismiss(self) -> None:
        """End it; may be called twice."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            os.close(self._pipe)


class _Probe:
    """A source of one harmless request, which shows that a model computes."""

    def __init__(self) -> None:
        self._requests: tuple[Request, ...] | None = (
            Request(id=0, prompt="Hello", sampling=SamplingParams(max_tokens=1)),
        )

    def take(self, n: int) -> Sequence[Request] | None:  # noqa: ARG002  one is never too many
        taken, self._requests = self._requests, None
        return taken

    def is_aborted(self, request_id: int) -> bool:  # noqa: ARG002  somebody waits
        return False


class ProcessEngine:
    """Starts `engine.host` and is an Engine to whoever holds it.

    The process gets its own session, so that a signal to the worker's group does not reach it,
    and ends when this end of the socket closes; where it cannot do that itself, its guardian ends
    it. After EngineDied it is gone; open another.

    Attributes:
        last_progress: a monotonic instant; the engine showed progress then.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: str,
        log_path: Path,
        start_seconds: float = 900.0,
        stall_seconds: float = 180.0,
        request_seconds: float = math.inf,
        on_tuned: Callable[[Tuning], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start the process and wait until the model is loaded.

        Args:
            log_path: where the process's own output goes.
            start_seconds: how long loading may take.
            stall_seconds: how long requests may be in flight without any progress.
            request_seconds: how long one request may run, however much progress it makes.
            on_tuned: called with what the engine chose, at first and when it chooses anew.
            stop: asked while loading; True gives it up.

        Raises:
            EngineMisconfigured: the model cannot be loaded as configured.
            EngineOutOfMemory: it does not fit.
            EngineDied: the process ended while loading.
            EngineTimedOut: loading took longer than `start_seconds`.
            EngineUnavailable: it was told to stop.
        """
        self._log_path = log_path
        self._stall_seconds = stall_seconds
        self._request_seconds = request_seconds
        self._stop = stop
        self._on_tuned = on_tuned
        self._tuning: Tuning | None = None
        self._config = config
        self._loading: str | None = model
        self._buffer = wire.FrameBuffer()
        self._in_flight: set[int] = set()
        self._started: dict[int, float] = {}  # when, the earliest first
        self._progress = 0
        self._credit = 0
        self._fatal: wire.Fatal | None = None
        self._session_over = True
        self._is_ended = False
        self.last_progress = time.monotonic()
        self._guardian = _Guardian()  # before the engine, which is never without
        ours, theirs = socket.socketpair()
        self._socket = ours
        try:
            with theirs, log_path.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-m", "engine.host", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env=_environment(config),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        except BaseException:
            ours.close()
            self._guardian.dismiss()
            raise
        self._guardian.watch(self._process.pid)
        self._send(wire.Open(config.model_dump_json(), model))
        try:
            ready = self._await_ready(model, start_seconds)
        except BaseException:
            self._kill()
            raise
        self._loading = None
        self._capabilities = ready.capabilities
        self._num_slots = ready.num_slots
        self._note_tuning(ready.tuning)

    @property
    def pid(self) -> int:
        """The engine process's id."""
        return self._process.pid

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""
        return self._capabilities

    @property
    def num_slots(self) -> int:
        """How many requests the engine works on at once."""
        return self._num_slots

    @property
    def tuning(self) -> Tuning | None:
        """What the engine last said that it works with."""
        return self._tuning

    def progress(self) -> int:
        """Return the number that the engine last reported."""
        return self._progress

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters, without the model's own defaults."""
        return resolve_sampling(request, self._config.defaults, None)

    def count_tokens(self, request: Request) -> int:
        """Return the exact number of prompt tokens; not while `generate` runs."""
        self._send(wire.Count(request))
        deadline = time.monotonic() + self._stall_seconds
        while True:
            for message in self._receive(deadline):
                if isinstance(message, wire.Count):
                    return message.num_tokens

    def probe(self) -> None:
        """Let the model answer a short request of ours; a remote server is asked nothing.

        Raises:
            EngineDied: it could not, and is gone.
        """
        if not isinstance(self._config, RemoteConfig):
            for _ in self.generate(_Probe()):
                pass

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish.

        Raises:
            EngineDied: the process ended; `suspects` were in its hands.
            EngineTimedOut: it made no progress for too long, and was ended.
            EngineUnavailable, EngineMisconfigured: it says so itself, of a server it asks.
        """
        ended = False
        self._credit = 0
        self._session_over = False
        self._send(wire.Submit([]))
        self.last_progress = time.monotonic()
        try:
            while not self._session_over:
                starved = False
                if self._credit and not ended:
                    taken = source.take(self._credit)
                    if taken is None:
                        ended = True
                        self._end_session()
                    elif taken:
                        self._submit(taken)
                    else:
                        starved = True
                wait = _POLL_SECONDS if starved else _WAIT_SECONDS
                for message in self._receive_some(wait):
                    if isinstance(message, wire.Results):
                        yield from self._finish(message.results)
                if self._fatal is not None:
                    self._raise_fatal(self._fatal)
                self._drop_aborted(source)
                yield from self._end_overdue()
                # Without credit and without anything in flight, it owes us an answer as well.
                if self._in_flight or ended or not self._credit:
                    self._check_stall()
        finally:
            if (
                not self._session_over
                and self._process.poll() is None
                and self._socket.fileno() >= 0
            ):
                self._leave_session()

    def close(self) -> None:
        """End the process; may be called twice."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2.0)
        self._kill()

    def _submit(self, requests: Sequence[Request]) -> None:
        self._credit -= len(requests)
        if not self._in_flight:
            self.last_progress = time.monotonic()
        self._in_flight.update(request.id for request in requests)
        self._send(wire.Submit(list(requests)))

    def _finish(self, results: list[Result]) -> Iterator[Result]:
        for result in results:
            if result.id in self._in_flight:
                self._in_flight.discard(result.id)
                self._started.pop(result.id, None)
                yield result

    def _end_session(self) -> None:
        if not self._in_flight:
            self.last_progress = time.monotonic()
        self._send(wire.End())

    def _drop_aborted(self, source: Source) -> None:
        aborted = [i for i in self._in_flight if source.is_aborted(i)]
        if aborted:
            self._abort(aborted)

    def _abort(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self._in_flight.discard(request_id)
            self._started.pop(request_id, None)
        self._send(wire.Abort(request_ids))

    def _end_overdue(self) -> list[Result]:
        """Give up the requests that run for too long; return their results."""
        since = time.monotonic() - self._request_seconds
        overdue = list(itertools.takewhile(lambda i: self._started[i] < since, self._started))
        if not overdue:
            return []
        self._abort(overdue)
        error = LineError(
            code="request_timed_out",
            message=f"The answer was not complete after {self._request_seconds:g} s, which is the "
            "limit of this server (leases.request_seconds). Ask for a shorter one (max_tokens).",
            status_code=504,
        )
        return [Result(id=request_id, error=error) for request_id in overdue]

    def _leave_session(self) -> None:
        """Abort what is in flight and bring the engine back to where a session can begin."""
        if self._in_flight:
            self._send(wire.Abort(list(self._in_flight)))
        self._in_flight.clear()
        self._started.clear()
        try:
            self._send(wire.End())
            deadline = time.monotonic() + self._stall_seconds
            while not self._session_over:
                self._receive(deadline)
        except errors.EngineError:
            self.close()

    def _await_ready(self, model: str, seconds: float) -> wire.Ready:
        deadline = time.monotonic() + seconds
        late = (
            f"The model {model} was not loaded within {seconds:.0f} s, as leases.load_seconds "
            f"asks for. What it did last is in {self._log_path}."
        )
        while True:
            for message in self._receive(deadline, late=late):
                if isinstance(message, wire.Ready):
                    return message

    def _receive(self, deadline: float, *, late: str | None = None) -> list[wire.FromEngine]:
        while time.monotonic() < deadline:
            messages = self._receive_some(_WAIT_SECONDS)
            if messages:
                return messages
            if self._stop():
                raise errors.EngineUnavailable("The engine was told to stop.")
        self._kill()
        raise errors.EngineTimedOut(
            late or f"The engine did not answer in time. See {self._log_path}."
        )

    def _receive_some(self, seconds: float) -> list[wire.FromEngine]:
        if self._fatal is not None:
            self._raise_fatal(self._fatal)
        if self._socket.fileno() < 0:
            self._raise_death()
        readable, _, _ = select.select([self._socket], [], [], seconds)
        if not readable:
            return []
        try:
            piece = self._socket.recv(1 << 20)
        except ConnectionError:
            piece = b""
        if not piece:
            self._raise_death()
        messages = self._buffer.feed(piece)
        self._note(messages)
        return messages

    def _note(self, messages: list[wire.FromEngine]) -> None:
        for message in messages:
            if isinstance(message, wire.Credit):
                self._credit += message.n
            elif isinstance(message, wire.Started):
                now = time.monotonic()
                self._started.update({i: now for i in message.request_ids if i in self._in_flight})
            elif isinstance(message, wire.Progress):
                if message.count != self._progress:
                    self._progress = message.count
                    self.last_progress = time.monotonic()
                self._note_tuning(message.tuning)
            elif isinstance(message, wire.Results):
                self.last_progress = time.monotonic()
            elif isinstance(message, wire.Fatal):
                self._kill()
                self._fatal = message  # raised behind the results that came before it
            elif isinstance(message, wire.End):
                self._session_over = True

    def _note_tuning(self, tuning: Tuning | None) -> None:
        if tuning is None:
            return
        is_new = self._tuning is None or self._tuning.choice != tuning.choice
        self._tuning = tuning
        if is_new and self._on_tuned is not None:
            self._on_tuned(tuning)

    def _raise_fatal(self, fatal: wire.Fatal) -> NoReturn:
        """Raise what the engine reported; with requests in flight, one of them may be to blame.

        No request is to blame for a server that is away or refuses the key.
        """
        kind = _ERRORS.get(fatal.code, errors.EngineError)
        if self._in_flight and kind not in _BLAMELESS:
            suspects = frozenset(self._started.keys() & self._in_flight)
            raise errors.EngineDied(fatal.message, suspects=suspects, cause=fatal.code)
        raise kind(fatal.message)

    def _check_stall(self) -> None:
        if time.monotonic() - self.last_progress > self._stall_seconds:
            suspects = frozenset(self._started.keys() & self._in_flight)
            self._kill()
            raise errors.EngineTimedOut(
                f"The engine made no progress for {self._stall_seconds:.0f} s with "
                f"{len(suspects)} requests in flight, and was ended.",
                suspects=suspects,
            )

    def _send(self, message: wire.ToEngine) -> None:
        # Nobody listens any more: the next receive finds that out, behind what was sent before.
        with contextlib.suppress(OSError):
            self._socket.sendall(wire.encode_frame([message]))

    def _raise_death(self) -> None:
        suspects = frozenset(self._started.keys() & self._in_flight)
        self._kill()
        status = self._process.returncode
        how = (
            f"was ended by {signal.Signals(-status).name}"
            if status is not None and status < 0
            else f"ended with status {status}"
        )
        when = (
            f"while it loaded {self._loading}, whose files may be damaged, or too large for this "
            "machine"
            if self._loading is not None
            else f"with {len(suspects)} requests in flight"
        )
        raise errors.EngineDied(
            f"The engine process {how} {when}. Its output is in {self._log_path}.",
            suspects=suspects,
        )

    def _kill(self) -> None:
        """End the engine's whole process group, which may hold more than the process itself."""
        if self._is_ended:
            return  # by now its number may be another process's
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5 if self._process.poll() is None else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._guardian.dismiss()
        self._socket.close()
        self._is_ended = True
