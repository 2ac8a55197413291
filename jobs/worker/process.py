"""What lives in the child of a Celery worker: one App, its leases, its loops and its engine.

    message ─► wake ─┐
                     ├─ one lock ─► turns of a loop, until there is nothing to do
    poll thread ─────┘

A message starts the loop in Celery's own thread, so that `celery inspect active` shows it; while
it runs, or where Redis is away, the poll thread looks at the database. Everything begins in a
thread, because Celery waits for its child to start: a database that is away is waited for here.

`python -m jobs.worker.process` is the same without Celery, for a fleet that has no broker.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from engine.deaths import DeathBudget
from jobs.app import App, open_app, server_folder
from jobs.domain.errors import BatchctlError, Conflict, InvalidInput
from jobs.loops.chores import ChoreLoop
from jobs.loops.control import ControlLoop
from jobs.loops.sweep import SweepLoop
from jobs.loops.turns import Crew
from jobs.loops.work import WorkLoop
from jobs.settings import Settings, load
from jobs.telemetry import bind_process, configure_logging, log
from jobs.worker.gpu import DEVICE
from jobs.worker.presence import Presence
from jobs.worker.probe import HEALTHY_SECONDS, Pulse, open_probe

DRAIN_FILE = "_BATCHCTL_DRAIN_FILE"
"""Names a file; once it exists, work stops, what is finished is flushed and leases are released."""
_DRAIN_LOOK_SECONDS = 0.2
_WAIT_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
_RELAXED_POLLS = 15
"""How many times less often an idle worker looks for work while it hears what others tell."""
_MAX_RELAXED_SECONDS = 30.0
_STOP_LOOK_SECONDS = 60.0


def check(settings: Settings) -> None:
    """Look at what no waiting will change.

    Raises:
        InvalidInput: workers cannot run with these settings.
    """
    url = settings.database.resolve_url(server_folder(settings))
    if not url.startswith("postgresql"):
        raise InvalidInput(
            "Workers share a database: say where Postgres is with database.url or "
            "BATCHCTL_DATABASE__URL. On one machine with SQLite, `batchctl serve` has the workers "
            "in it.",
            param="database.url",
        )
    for name in settings.worker.models:
        if name not in settings.models:
            raise InvalidInput(
                f"worker.models names {name!r}, which is not in the catalogue. Known are: "
                f"{', '.join(settings.models)}.",
                param="worker.models",
            )


@dataclass(slots=True, eq=False)
class _Loop:
    """A loop of this process; whoever has the lock takes its turns.

    Attributes:
        once: what a message starts instead, where a turn waits for the next one.
    """

    name: str
    turn: Callable[[], bool]
    once: Callable[[], bool] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class WorkerProcess:
    """The work of one process, in threads of its own; begun by `start`."""

    def __init__(self, settings: Settings, *, environment: Mapping[str, str]) -> None:
        """Prepare to work as `settings` say.

        Args:
            environment: has what the launcher of this process tells it.
        """
        self._settings = settings
        self._device = environment.get(DEVICE) or "cpu"
        drain_file = environment.get(DRAIN_FILE)
        self._drain_file = Path(drain_file) if drain_file else None
        self._stopping = threading.Event()
        self._crew: Crew | None = None
        self._loops: dict[str, _Loop] = {}
        self._num_notes = 0
        leases = settings.leases
        idle_seconds = leases.idle_poll_seconds * _RELAXED_POLLS
        # An engine that hangs is ended after `stall_seconds`, which is better than all of it.
        stall_seconds = leases.stall_seconds + leases.lease_seconds
        self._pulse = Pulse(
            progress=self.progress,
            limit_seconds=max(HEALTHY_SECONDS, 2 * idle_seconds, stall_seconds),
        )
        self._work: WorkLoop | None = None
        self._presence: Presence | None = None
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("worker", self._run), ("drain", self._watch_drain_file))
        ]

    def start(self) -> None:
        """Begin; returns at once."""
        for thread in self._threads:
            thread.start()

    def wake(self, name: str) -> None:
        """Take turns of a loop until there is nothing to do; if it is running, ring and return."""
        loop, crew = self._loops.get(name), self._crew
        if loop is None or crew is None:
            return  # not begun, or not this worker's: whoever it is for polls too
        if loop.once is not None:
            crew.attempt(loop.once, name=name)
            return
        if not loop.lock.acquire(blocking=False):
            crew.app.doorbell.ring_here()
            return
        try:
            while not crew.stopping.is_set() and crew.attempt(
                lambda: self._turn(loop), name=loop.name
            ):
                pass
        finally:
            loop.lock.release()

    def drain(self) -> None:
        """Stop taking work; flush what is finished and give the rest back."""
        self._stopping.set()
        if self._crew is not None:
            self._crew.stop()

    def wait(self) -> None:
        """Return when everything has ended."""
        self._ended.wait()

    def close(self) -> None:
        """Drain, and return when everything has ended, or the time for it is over."""
        self.drain()
        self._ended.wait(self._settings.leases.drain_seconds + 5)

    # --- life ---

    def _watch_drain_file(self) -> None:
        while self._drain_file is not None and not self._stopping.wait(_DRAIN_LOOK_SECONDS):
            if self._drain_file.exists():
                log.info("worker_draining")
                self.drain()

    def _run(self) -> None:
        num_tries = 0
        try:
            while not self._stopping.is_set():
                try:
                    with open_app(self._settings, folder=server_folder(self._settings)) as app:
                        num_tries = 0
                        self._serve(app)
                        return
                except BatchctlError as error:
                    seconds = _WAIT_SECONDS[min(num_tries, len(_WAIT_SECONDS) - 1)]
                    num_tries += 1
                    log.warning(
                        "worker_waits", code=error.code, error=error.message, seconds=seconds
                    )
                    self._stopping.wait(seconds)
        except Exception:  # noqa: BLE001  whatever it is
            log.exception("worker_crashed")
            # Celery starts another child; this one would look alive and do nothing.
            os._exit(1)
        finally:
            self._ended.set()

    def _serve(self, app: App) -> None:
        """Work until told to stop."""
        crew = Crew(app, idle_seconds=lambda: self._idle_seconds(app))
        bind_process(worker_id=crew.worker_id)
        with ExitStack() as stack:
            presence = stack.enter_context(
                Presence(app, crew, device=self._device, work=lambda: self._work)
            )
            self._presence = presence
            stack.enter_context(self._probing())
            stack.enter_context(crew.keeping())
            loops = self._make_loops(app, crew, presence, stack)
            threads = [
                threading.Thread(target=self._poll, args=(loop, crew), name=loop.name, daemon=True)
                for loop in loops
            ]
            self._crew, self._loops = crew, {loop.name: loop for loop in loops}
            if self._stopping.is_set():  # between a look and the crew
                crew.stop()
            log.info("worker_ready", role=self._settings.worker.role, device=self._device)
            for thread in threads:
                thread.start()
            while not crew.stopping.wait(_STOP_LOOK_SECONDS):
                pass
            self._end(threads)

    def _end(self, threads: list[threading.Thread]) -> None:
        """Wait for the loops, as long as draining may take, then end the engine."""
        until = time.monotonic() + self._settings.leases.drain_seconds
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        for loop in self._loops.values():  # a turn may be Celery's
            if loop.lock.acquire(timeout=max(0.0, until - time.monotonic())):
                loop.lock.release()
            else:
                log.warning("drain_timed_out", loop=loop.name)
        if self._work is not None:
            self._work.close()

    def _make_loops(
        self, app: App, crew: Crew, presence: Presence, stack: ExitStack
    ) -> list[_Loop]:
        role, loops = self._settings.worker.role, []
        if role != "engine":
            sandbox = stack.enter_context(app.open_sandbox())
            control = ControlLoop(crew, checker=sandbox, on_progress=self._note_lines)
            loops.append(_Loop("control", control.turn))
            sweeper = SweepLoop(crew)
            loops.append(_Loop("sweep", sweeper.turn, once=sweeper.sweep))
            chores = ChoreLoop(crew, on_progress=lambda n: self._note_lines("chores", n))
            loops.append(_Loop("chores", chores.turn))
            app.doorbell.poke_every(self._settings.leases.reap_seconds / 2)
        if role != "control":
            work = WorkLoop(
                crew,
                models=(),
                engine_log=app.folder / f"engine-{crew.worker_id}.log",
                others_serve=presence.do_others_serve,
                on_loaded=presence.offer_loaded,
                budget=DeathBudget(
                    max_deaths=self._settings.worker.max_engine_deaths,
                    window_seconds=self._settings.worker.engine_death_window_seconds,
                ),
            )
            self._work = work
            stack.callback(work.close)
            presence.offer()
            loops.append(_Loop("work", work.turn))
        return loops

    # --- turns ---

    def _poll(self, loop: _Loop, crew: Crew) -> None:
        def turn() -> bool:
            if not loop.lock.acquire(blocking=False):
                return False  # Celery's thread is at it
            try:
                return self._turn(loop)
            finally:
                loop.lock.release()

        crew.repeat(turn, name=loop.name)

    def _turn(self, loop: _Loop) -> bool:
        self._pulse.note(loop.name)
        try:
            busy = loop.turn()
        except BatchctlError as error:
            self._pulse.note(loop.name, failure=error.code)
            raise
        self._pulse.note(loop.name)
        return busy

    def _idle_seconds(self, app: App) -> float:
        seconds = app.settings.leases.idle_poll_seconds
        # With both roles, one message may wait behind hours of the other's work.
        if app.settings.worker.role == "all" or not app.doorbell.is_shared:
            return seconds
        return max(seconds, min(seconds * _RELAXED_POLLS, _MAX_RELAXED_SECONDS))

    def _note_lines(self, _phase: str, _num_lines: int) -> None:
        self._num_notes += 1

    def progress(self) -> object:
        """Return something that changes while a unit or the engine gets on."""
        work = self._work
        return self._num_notes, work.progress() if work is not None else None

    def _problem(self) -> str | None:
        if self._presence is not None and self._presence.serves_nothing:
            return "None of its models may be served; see the log."
        if self._work is not None and self._work.has_no_engine_to_offer:
            return "No engine of its models can be started; see the log."
        if self._work is not None and self._work.quarantine is not None:
            return f"Quarantined. {self._work.quarantine}"
        return self._pulse.problem()

    @contextmanager
    def _probing(self) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(open_probe(self._settings.worker, self._problem))
            except Conflict as error:  # work is worth more than being watched
                log.warning("probe_not_served", error=error.message)
            yield


_current: WorkerProcess | None = None


def start(settings: Settings) -> None:
    """Begin to work in this process; returns at once."""
    global _current  # noqa: PLW0603  Celery's tasks are functions, and a process has one worker
    _current = WorkerProcess(settings, environment=os.environ)
    _current.start()


def stop() -> None:
    """End what `start` began."""
    if _current is not None:
        _current.close()


def wake(name: str) -> None:
    """Take turns of a loop of this process; see `WorkerProcess.wake`."""
    if _current is not None:
        _current.wake(name)


def main() -> None:
    """Work until SIGTERM or SIGINT, without Celery: for a fleet that has no broker."""
    try:
        settings = load()
        check(settings)
    except BatchctlError as error:
        sys.exit(f"error: {error.message}")
    configure_logging(level=settings.log.level, form=settings.log.format)
    worker = WorkerProcess(settings, environment=os.environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: worker.drain())
    worker.start()
    worker.wait()


if __name__ == "__main__":
    main()
