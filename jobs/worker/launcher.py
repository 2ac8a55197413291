"""Keeps processes running: starts, restarts with a growing pause, drains, and ends with them.

    launcher ──┬── worker (a session of its own) ── its children
               └── worker (a session of its own) ── its children

Each process leads a session and process group of its own, so that a terminal's Ctrl-C reaches the
launcher alone. Draining sends SIGTERM to the process, never to its group: a group's SIGTERM would
interrupt the work that is to be finished. When the launcher dies, even of SIGKILL, the kernel sends
each process that SIGTERM (Linux only).
"""

import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_STEADY_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_STDERR = 2
# A program of its own, because code between fork and exec may meet locks of other threads. What it
# asks for outlives exec. Linux only: elsewhere children of a killed launcher go on.
_TETHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):  # else it is dead already
    os.execv(sys.argv[2], sys.argv[2:])
"""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


EventKind = Literal["started", "failed", "ended", "draining", "killed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A process to keep running.

    Attributes:
        environment: what it has besides the launcher's own.
        device: what it runs on, for people.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a process.

    Attributes:
        pid: None: it could not be started, as `error` says.
        code: how it ended; -N is signal N.
        pause_seconds: until it is started again.
    """

    kind: EventKind
    name: str
    device: str
    pid: int | None
    code: int | None = None
    error: str | None = None
    pause_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pauses:
    """The pause before a restart: doubled with each, short again after a long life."""

    first_seconds: float = _FIRST_PAUSE_SECONDS
    longest_seconds: float = _LONGEST_PAUSE_SECONDS
    steady_seconds: float = _STEADY_SECONDS

    def after(self, last_seconds: float | None, *, lived_seconds: float) -> float:
        """Return the pause after one of `last_seconds` and a life of `lived_seconds`."""
        if last_seconds is None or lived_seconds >= self.steady_seconds:
            return self.first_seconds
        return min(2 * last_seconds, self.longest_seconds)


class _Member:
    """One command, and its process while there is one."""

    def __init__(
        self, command: Command, *, on_event: Callable[[Event], None], pauses: Pauses
    ) -> None:
        self._command = command
        self._on_event = on_event
        self._pauses = pauses
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pause_seconds: float | None = None
        self._is_draining = False
        self.due_at: float | None = 0.0

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start the process; if that cannot be done, later."""
        now = time.monotonic()
        self._started_at, self.due_at = now, None
        try:
            self._process = subprocess.Popen(  # noqa: S603  our own programs
                _tethered(self._command.arguments),
                env={**os.environ, **self._command.environment},
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,  # what workers say is no result of the launcher
                start_new_session=True,
            )
        except OSError as error:  # no memory, too many processes
            self._put_off(now)
            self._tell("failed", error=error.strerror)
        else:
            self._tell("started")

    def look(self) -> None:
        """Notice that the process has ended; what it left of its children is killed."""
        process = self._process
        if process is None:
            return
        if not _has_ended(process):
            return
        self._kill_group(process.pid)
        code = process.wait()
        if not self._is_draining:
            self._put_off(time.monotonic())
        self._tell("ended", code=code)
        self._process = None

    def drain(self) -> None:
        """Ask the process to end in order, and start it no more."""
        self.due_at, self._pause_seconds, self._is_draining = None, None, True
        if self._process is not None:
            self._tell("draining")
            os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process and its children."""
        if self._process is not None:
            self.abandon()
            self._tell("killed")

    def abandon(self) -> None:
        """Kill the process and its children, and say nothing of it."""
        if self._process is not None:
            self._kill_group(self._process.pid)

    def _put_off(self, now: float) -> None:
        lived_seconds = now - self._started_at
        self._pause_seconds = self._pauses.after(self._pause_seconds, lived_seconds=lived_seconds)
        self.due_at = now + self._pause_seconds

    @staticmethod
    def _kill_group(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _tell(self, kind: EventKind, *, code: int | None = None, error: str | None = None) -> None:
        self._on_event(
            Event(
                kind=kind,
                name=self._command.name,
                device=self._command.device,
                pid=self._process.pid if self._process is not None else None,
                code=code,
                error=error,
                pause_seconds=self._pause_seconds if kind in {"ended", "failed"} else None,
            )
        )


def launch(
    commands: Sequence[Command],
    *,
    patience_seconds: float,
    on_event: Callable[[Event], None],
    pauses: Pauses | None = None,
) -> None:
    """Keep the commands running until SIGINT, SIGTERM or SIGHUP; return when all have ended.

    The first signal asks every process to end in order; what has not ended after
    `patience_seconds`, or at a second signal, is killed with its children. Only for the main
    thread: the processes end with the thread that started them.
    """
    pauses = pauses or Pauses()
    members = [_Member(command, on_event=on_event, pauses=pauses) for command in commands]
    with _noticed() as wait:
        try:
            _keep_running(members, wait)
            for member in members:
                member.drain()
            if not _await_end(members, wait, seconds=patience_seconds):
                for member in members:
                    member.kill()
                _await_end(members, wait, seconds=None)
        finally:
            for member in members:  # there are some only when something failed here
                member.abandon()


def _keep_running(members: Sequence[_Member], wait: Callable[[float], bool]) -> None:
    """Start and restart until a signal asks for the end."""
    while True:
        for member in members:
            member.look()
            if member.due_at is not None and member.due_at <= time.monotonic():
                member.start()
        due = [member.due_at for member in members if member.due_at is not None]
        pause = min(due, default=math.inf) - time.monotonic()
        if wait(min(max(pause, 0.0), _LOOK_SECONDS)):
            return


def _await_end(
    members: Sequence[_Member], wait: Callable[[float], bool], *, seconds: float | None
) -> bool:
    """Return whether all ended, before another signal and within `seconds`; None: in any case."""
    deadline = time.monotonic() + seconds if seconds is not None else math.inf
    while True:
        for member in members:
            member.look()
        if not any(member.is_running for member in members):
            return True
        asked_again = wait(min(max(deadline - time.monotonic(), 0.0), _LOOK_SECONDS))
        if seconds is not None and (asked_again or time.monotonic() >= deadline):
            return False


@contextmanager
def _noticed() -> Iterator[Callable[[float], bool]]:
    """Yield a wait that ends early with a signal, and returns whether one asks for the end.

    The handlers do nothing; the interpreter writes each signal's number to a socket, so that none
    is lost, whatever runs when it comes.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        for end in (reader, writer):
            end.settimeout(0)
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in (*_ENDING, signal.SIGCHLD)
            if signal.getsignal(number) is not signal.SIG_IGN  # by nohup, or the shell
        }
        woken_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def wait(seconds: float) -> bool:
            select.select([reader], [], [], seconds)
            try:
                numbers = reader.recv(4096)
            except BlockingIOError:
                return False
            return any(number in _ENDING for number in numbers)

        try:
            yield wait
        finally:
            signal.set_wakeup_fd(woken_before)
            for number, handler in before.items():
                signal.signal(number, handler)


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return process.poll() is not None
    # Looked at and not waited for yet: until then nothing else can have its id.
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, options) is not None


def _tethered(arguments: Sequence[str]) -> list[str]:
    """Return a command that becomes `arguments`, after asking to end with this process."""
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *arguments]
