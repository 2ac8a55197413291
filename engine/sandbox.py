"""Compiles constraints in a helper process, under limits that it cannot argue with.

A schema, regular expression or grammar comes from a stranger, and compiling one, or holding an
answer against it, can take all the time and memory there is. The helper has a bounded address
space and a bounded time for each item; one that takes more costs the helper, which is started
again, and that item is too complex.

    parent  --- [constraint, backend, answer], length-prefixed msgpack --->  helper
            <-- [enforcement, error code, message] -----------------------

Run as `python -m engine.sandbox`. Needs no model and no torch.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, Self

import msgspec

from engine.bounded import BoundedCache
from engine.config import ConstraintBackend
from engine.constraints import Enforcement, examine, is_quick, key_of, validate
from jobs.domain.errors import EngineUnavailable, InvalidInput
from jobs.domain.request import Constraint

_LENGTH = struct.Struct("<I")
_MAX_MEMORY_BYTES = 2 << 30
_START_SECONDS = 60.0
_IN_FLIGHT = 64
"""Items written ahead of their answers; small enough for both pipes to never fill at once."""
_IN_FLIGHT_BYTES = 32 * 1024
_PR_SET_PDEATHSIG = 1


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What planning needs to know of a constraint.

    Attributes:
        outcome: "enforced" while generating, "validated" only after it, or "invalid".
        error_code: for an invalid one: invalid_schema, invalid_regex, invalid_grammar,
            invalid_value or schema_too_complex.
        message: what is wrong, or what cannot be enforced; never the constraint's own text.
    """

    outcome: Enforcement | Literal["invalid"]
    error_code: str | None = None
    message: str = ""

    @property
    def enforceable(self) -> bool:
        """Whether all of it is kept while generating."""
        return self.outcome == "enforced"


_TOO_COMPLEX = Verdict(
    "invalid",
    "schema_too_complex",
    "The constraint takes too much time or memory to compile; make it smaller, or bound fewer "
    "repetitions.",
)
_TOO_LONG = "it takes too long to check"
_READY = Verdict("enforced", None, "ready")
_encode = msgspec.msgpack.Encoder().encode
_Item = tuple[Constraint, ConstraintBackend, str | None]
"""A constraint to compile, or with an answer, to hold that against it."""
_decode_item = msgspec.msgpack.Decoder(_Item).decode
_MISMATCH = "schema_mismatch"
_MAX_FAILURES = 3
"""Answers of one constraint that take too long before no more of them are tried."""
_decode_verdict = msgspec.msgpack.Decoder(Verdict).decode


class Sandbox:
    """Checks constraints one after the other in a process of its own; safe to share by threads."""

    def __init__(
        self,
        *,
        backend: ConstraintBackend = "llguidance",
        cpu_seconds: int = 5,
        wall_seconds: float = 5.0,
        memory_bytes: int = _MAX_MEMORY_BYTES,
        max_remembered: int = 65_536,
    ) -> None:
        """Start nothing yet; the helper starts with the first check.

        Args:
            cpu_seconds: processor time for one item.
            wall_seconds: time on the clock for one item.
            memory_bytes: of address space, the helper's own included.
        """
        self._backend = backend
        self._cpu_seconds = cpu_seconds
        self._wall_seconds = wall_seconds
        self._memory_bytes = memory_bytes
        self._known: BoundedCache[Verdict] = BoundedCache(
            max_entries=max_remembered, max_bytes=max_remembered * 512
        )
        self._failures: BoundedCache[int] = BoundedCache(
            max_entries=max_remembered, max_bytes=max_remembered * 512
        )
        self._helper: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._received = bytearray()

    def check(self, constraint: Constraint) -> Verdict:
        """Return the verdict on one constraint."""
        return self.check_many([constraint])[0]

    def check_many(
        self, constraints: Sequence[Constraint], *, backend: ConstraintBackend | None = None
    ) -> list[Verdict]:
        """Return a verdict for each constraint, in their order; equal ones are compiled once.

        Args:
            backend: the library that will keep them; None: the sandbox's own.

        Raises:
            EngineUnavailable: the helper cannot be started.
        """
        backend = backend or self._backend
        keys = [backend.encode() + key_of(constraint) for constraint in constraints]
        with self._lock:
            verdicts: dict[bytes, Verdict | None] = {key: self._known.find(key) for key in keys}
            missing: dict[bytes, Constraint] = {
                key: constraint
                for key, constraint in zip(keys, constraints, strict=True)
                if verdicts[key] is None
            }
            compiled = self._ask([(one, backend, None) for one in missing.values()])
            for key, made in zip(missing, compiled, strict=True):
                verdicts[key] = self._known.keep(key, made, weight=128 + len(made.message))
        return [verdict for key in keys if (verdict := verdicts[key]) is not None]

    def validate(self, constraint: Constraint, text: str) -> str | None:
        """Return why `text` breaks the constraint, or None when it keeps it; never quotes the text.

        In this process where that is sure to be quick, in the helper where it may not be.
        """
        try:
            if is_quick(constraint, text):
                return validate(constraint, text)
        except InvalidInput:
            return "its constraint is none that is allowed"
        key = key_of(constraint)
        with self._lock:
            num_failures = self._failures.find(key) or 0
            if num_failures >= _MAX_FAILURES:
                return _TOO_LONG
            try:
                (verdict,) = self._ask([(constraint, self._backend, text)])
            except (EngineUnavailable, UnicodeEncodeError):  # half of a character is no text
                return "it could not be checked"
            if verdict is _TOO_COMPLEX:
                self._failures.keep(key, num_failures + 1, weight=128)
                return _TOO_LONG
        return verdict.message if verdict.error_code is not None else None

    def close(self) -> None:
        """End the helper; a later check starts another."""
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _ask(self, items: list[_Item]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        died_at = -1
        while len(verdicts) < len(items):
            helper = self._start()
            try:
                self._feed(helper, items, verdicts)
            except TimeoutError:
                # The item whose turn it was is the one that takes too long.
                self._stop()
                verdicts.append(_TOO_COMPLEX)
            except (OSError, EOFError):
                # A helper may also die of something else (its starting thread ended, somebody
                # killed it), so an item is tried twice before it is blamed.
                self._stop()
                if died_at == len(verdicts):
                    verdicts.append(_TOO_COMPLEX)
                else:
                    died_at = len(verdicts)
        return verdicts

    def _feed(
        self,
        helper: subprocess.Popen[bytes],
        items: list[_Item],
        into: list[Verdict],
    ) -> None:
        """Keep a window of items in the pipe and collect their verdicts."""
        if helper.stdin is None:
            raise EOFError
        sent = len(into)
        sizes: list[int] = []
        while len(into) < len(items):
            while sent < len(items) and len(sizes) < _IN_FLIGHT:
                frame = _encode(items[sent])
                if sizes and sum(sizes) + len(frame) > _IN_FLIGHT_BYTES:
                    break
                helper.stdin.write(_LENGTH.pack(len(frame)) + frame)
                sizes.append(len(frame))
                sent += 1
            helper.stdin.flush()
            into.append(self._receive(helper, self._wall_seconds))
            del sizes[0]

    def _receive(self, helper: subprocess.Popen[bytes], seconds: float) -> Verdict:
        if helper.stdout is None:
            raise EOFError
        descriptor = helper.stdout.fileno()
        ends_at = time.monotonic() + seconds
        received = self._received
        while True:
            if len(received) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(received)
                if len(received) >= _LENGTH.size + size:
                    frame = bytes(received[_LENGTH.size : _LENGTH.size + size])
                    del received[: _LENGTH.size + size]
                    return _decode_verdict(frame)
            left = ends_at - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(descriptor, 65_536)
            if not chunk:
                raise EOFError
            received += chunk

    def _start(self) -> subprocess.Popen[bytes]:
        if self._helper is not None and self._helper.poll() is None:
            return self._helper
        self._stop()
        helper = subprocess.Popen(  # noqa: S603 -- our own interpreter and module
            [
                sys.executable,
                "-m",
                "engine.sandbox",
                str(os.getpid()),
                str(self._memory_bytes),
                str(self._cpu_seconds),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[1],
            start_new_session=True,
        )
        self._helper = helper
        self._received.clear()
        try:
            self._receive(helper, _START_SECONDS)
        except (OSError, EOFError, TimeoutError) as error:
            self._stop()
            raise EngineUnavailable(
                "The helper that checks constraints does not start; is the machine out of memory?"
            ) from error
        return helper

    def _stop(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        helper.kill()
        helper.wait()
        for pipe in (helper.stdin, helper.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def serve(*, parent: int, memory_bytes: int, cpu_seconds: int) -> None:
    """Answer the parent until it closes the pipe; only `Sandbox` starts this."""
    _die_with(parent)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    # Imports and the byte tokenizer are paid for before the limits count.
    _judge(Constraint("regex", "a"), "llguidance", None)
    with contextlib.suppress(ValueError, OSError):  # macOS knows the name only
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _write(replies, _READY)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while (item := _read(requests)) is not None:
        # Whole seconds of the process, so an item gets up to one more than its share.
        allowed = int(time.process_time()) + cpu_seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, hard))
        _write(replies, _judge(*item))


def _judge(constraint: Constraint, backend: ConstraintBackend, answer: str | None) -> Verdict:
    try:
        if answer is not None:
            reason = validate(constraint, answer)
            return Verdict("validated", _MISMATCH if reason else None, reason or "")
        outcome, message = examine(constraint, backend=backend)
        return Verdict(outcome, None, message)
    except InvalidInput as error:
        return Verdict("invalid", error.error_code, error.message)
    except (MemoryError, RecursionError):
        return _TOO_COMPLEX


def _die_with(parent: int) -> None:
    """End this process when its parent ends, whatever either is doing then."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before the line above


def _read(stream: BinaryIO) -> _Item | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    body = stream.read(size)
    return _decode_item(body) if len(body) == size else None


def _write(stream: BinaryIO, verdict: Verdict) -> None:
    frame = _encode(verdict)
    stream.write(_LENGTH.pack(len(frame)) + frame)
    stream.flush()


if __name__ == "__main__":
    serve(parent=int(sys.argv[1]), memory_bytes=int(sys.argv[2]), cpu_seconds=int(sys.argv[3]))
