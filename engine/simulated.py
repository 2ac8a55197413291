"""An engine without a model, so that everything else runs at the speed of a rack of GPUs.

Time passes in steps of a set length; each running request gains a token a step. There are no
tokens to choose from, so what changes their choice (temperature, penalties, biases, words and
tokens that end an answer, ...) is taken and changes nothing, and no log probabilities are told. How
many answers there are, how long they are, their form and their tool calls are as asked for.

A request can order a fault by what its last message (or prompt) says:

    [[tokens=50]]           the reply has so many tokens, whatever the setting
    [[reply=text]]          the reply is this text
    [[fault=child]]         the process has a child from now on, as those of vLLM have
    [[fault=crash]]         the process kills itself when the request starts
    [[fault=crash-worker]]  the worker that started the process is killed when the request starts
    [[fault=endless]]       the reply never ends, whatever the setting
    [[fault=hang]]          the engine stops making progress when the request starts
    [[fault=oom]]           the engine reports that it is out of memory
    [[fault=error]]         the request ends with an error
    [[fault=nan]]           the request ends as if its logits were not numbers
    [[fault=invalid]]       the reply breaks its constraint, always
    [[fault=invalid:2]]     the reply breaks its constraint the first two times it is asked for
"""

import heapq
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Generator

import llguidance
import msgspec

from engine.base import Source
from engine.config import SimulatedConfig
from engine.constraints import grammar_of
from engine.sampling import resolve_sampling
from engine.tuning import Tuning
from jobs.domain.errors import EngineMisconfigured, EngineOutOfMemory
from jobs.domain.request import PARAMETERS, Capabilities, Constraint, Request, SamplingParams
from jobs.domain.result import LineError, Result, Usage

_DIRECTIVE = re.compile(r"\[\[(tokens|reply|fault)=([^\]]*)\]\]")
_ABORT_SECONDS = 0.25
_IDLE_SECONDS = 0.002
_MAX_LAG_SECONDS = 1.0
_SENTENCE = (
    "the batch ran through the night and every line came back with an answer that fits its form"
)
_WORDS = tuple(_SENTENCE.split(" "))
_PREFERRED = b'"}],:0123456789abcdefghijklmnopqrstuvwxyz-.@ {['
_MAX_CONSTRAINED_BYTES = 4096


class _Running(msgspec.Struct):
    request: Request
    ends_at_step: int
    num_tokens: int
    fault: str


class _StepClock:
    """Keeps steps at their set length, and does not race to catch up after a long pause."""

    def __init__(self, step_seconds: float) -> None:
        self.step = 0
        self._step_seconds = step_seconds
        self._next_at = time.monotonic()

    def wait(self, *, busy: bool) -> None:
        """Sleep until the step ends; without work nothing counts as a step."""
        now = time.monotonic()
        if not busy:
            time.sleep(_IDLE_SECONDS)
            self._next_at = now
            return
        self.step += 1
        self._next_at = max(self._next_at + self._step_seconds, now - _MAX_LAG_SECONDS)
        if self._next_at > now:
            time.sleep(self._next_at - now)


class SimulatedEngine:
    """Serves requests on a timetable; see the module for the faults it can be ordered to have."""

    def __init__(self, config: SimulatedConfig, *, model: str) -> None:
        """Pretend to load a model for `config.load_seconds`.

        Raises:
            EngineMisconfigured: the ledger cannot be written.
        """
        time.sleep(config.load_seconds)
        self._config = config
        self._model = model
        self._num_tokens = 0
        self._asked: dict[int, int] = {}
        self._ledger = _open_ledger(config.ledger) if config.ledger else None

    @property
    def capabilities(self) -> Capabilities:
        """What the simulated model can do: everything that is understood."""
        return describe(self._config, self._model)

    @property
    def num_slots(self) -> int:
        """How many requests run at once."""
        return self._config.slots

    @property
    def tuning(self) -> Tuning | None:
        """Nothing is chosen here."""
        return None

    def progress(self) -> int:
        """Return the number of tokens made so far."""
        return self._num_tokens

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters with every default filled in."""
        return resolve_sampling(request, self._config.defaults, None)

    def count_tokens(self, request: Request) -> int:
        """Return a quarter of the prompt's length in characters, and at least 1."""
        if request.messages is not None:
            return sum(len(m.content) // 4 + 4 for m in request.messages)
        prompt = request.prompt or ""
        return len(prompt) if isinstance(prompt, tuple) else max(1, len(prompt) // 4)

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, at the step at which it ends."""
        running: list[tuple[int, int, _Running]] = []
        clock = _StepClock(self._config.step_seconds)
        next_abort_at = time.monotonic() + _ABORT_SECONDS
        while True:
            free = self._config.slots - len(running)
            taken = source.take(free) if free else ()
            if taken is None and not running:
                return
            for request in taken or ():
                started = self._start(request, clock.step)
                if isinstance(started, Result):
                    yield started
                else:
                    heapq.heappush(running, (started.ends_at_step, request.id, started))
            self._count(len(running))
            clock.wait(busy=bool(running))
            while running and running[0][0] <= clock.step:
                yield self._finish(heapq.heappop(running)[2])
            if time.monotonic() > next_abort_at:
                next_abort_at = time.monotonic() + _ABORT_SECONDS
                running = [entry for entry in running if not source.is_aborted(entry[1])]
                heapq.heapify(running)

    def close(self) -> None:
        """Close the ledger."""
        if self._ledger is not None:
            os.close(self._ledger)
            self._ledger = None

    def _count(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        self._num_tokens += num_tokens
        if self._ledger is not None:
            os.write(self._ledger, struct.pack("<I", num_tokens))

    def _start(self, request: Request, step: int) -> _Running | Result:
        prompt_tokens = self.count_tokens(request)
        if prompt_tokens >= self._config.context_tokens:
            return Result(
                id=request.id,
                error=LineError(
                    code="context_length_exceeded",
                    message=f"The prompt has {prompt_tokens} tokens; the model's context holds "
                    f"{self._config.context_tokens}.",
                    status_code=400,
                    param="messages" if request.messages else "prompt",
                ),
            )
        directives = dict(_DIRECTIVE.findall(_text_of(request)))
        fault = directives.get("fault", "")
        if fault == "child":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        elif fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "crash-worker":
            os.kill(os.getppid(), signal.SIGKILL)
            threading.Event().wait()  # this process has nobody left, and ends with its worker
        elif fault == "hang":
            threading.Event().wait()
        elif fault == "oom":
            raise EngineOutOfMemory("The simulated device is out of memory.")
        sampling = self.resolve_sampling(request)
        room = self._config.context_tokens - prompt_tokens
        wanted = int(directives.get("tokens", min(self._config.reply_tokens, room)))
        num_tokens = max(1, min(wanted, sampling.max_tokens or wanted))
        if fault == "endless":
            num_tokens = sys.maxsize
        return _Running(request, step + num_tokens, num_tokens, fault)

    def _finish(self, done: _Running) -> Result:
        request = done.request
        usage = Usage(prompt_tokens=self.count_tokens(request), completion_tokens=done.num_tokens)
        if done.fault in ("error", "nan"):
            code = "numerical_error" if done.fault == "nan" else "simulated_error"
            return Result(
                id=request.id,
                usage=usage,
                error=LineError(code=code, message="Ordered by the request.", status_code=500),
            )
        text = self._reply(request, done)
        return Result(
            id=request.id,
            text=text,
            finish_reason="stop",
            usage=usage,
            constraint="enforced" if request.constraint else None,
        )

    def _reply(self, request: Request, done: _Running) -> str:
        reply = dict(_DIRECTIVE.findall(_text_of(request))).get("reply", self._config.reply)
        if request.constraint is None:
            return reply or _sentence(_text_of(request), done.num_tokens)
        name, _, times = done.fault.partition(":")
        if name == "invalid":
            asked = self._asked[request.id] = self._asked.get(request.id, 0) + 1
            if not times or asked <= int(times):
                return "(not what the constraint asks for)"
            del self._asked[request.id]
        return reply or constrained_reply(request.constraint)


def _open_ledger(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise EngineMisconfigured(
            f"The ledger {path} cannot be written: {error.strerror}; set another in the model's "
            "options."
        ) from error


def describe(config: SimulatedConfig, model: str) -> Capabilities:
    """Return what a simulated model of this configuration can do."""
    return Capabilities(
        model=model,
        engine="simulated",
        context_tokens=config.context_tokens,
        parameters=PARAMETERS,
        constraint_backend=config.asking.backend,
        refuses_unenforceable=config.asking.on_unsupported_schema == "refuse",
        fingerprint=f"simulated-{zlib.crc32(config.model_dump_json().encode()):08x}",
        num_slots=config.slots,
        is_greedy=config.defaults.temperature == 0,
    )


def _text_of(request: Request) -> str:
    if request.messages:
        return request.messages[-1].content
    return request.prompt if isinstance(request.prompt, str) else ""


def _sentence(text: str, num_tokens: int) -> str:
    start = zlib.crc32(text.encode()) % len(_WORDS)
    return " ".join(_WORDS[(start + i) % len(_WORDS)] for i in range(num_tokens))


def constrained_reply(constraint: Constraint) -> str:
    """Return a short text that the constraint's grammar accepts.

    Walks the grammar byte by byte and ends as soon as it may. Empty when it cannot be walked.
    """
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar_of(constraint))
    made = bytearray()
    while not matcher.is_error() and len(made) < _MAX_CONSTRAINED_BYTES:
        if matcher.is_stopped() or matcher.is_accepting():
            break
        mask = matcher.compute_bitmask()
        allowed = int.from_bytes(mask, "little")
        byte = next((b for b in _PREFERRED if allowed >> b & 1), None)
        if byte is None:
            byte = next((b for b in range(256) if allowed >> b & 1), None)
        if byte is None:
            break
        matcher.consume_token(byte)
        made.append(byte)
    return made.decode("utf-8", "replace")
