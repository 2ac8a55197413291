"""All of one machine in one process tree: control loop, sweeper, one engine at a time.

    control thread   claims plan and finalize units
    sweeper thread   reaps, expires, advances
    chores thread    audits a few batches, removes what nobody needs
    engine thread    runs shards of one model on its engine process, then of the next

`batchctl run` and `batchctl serve` both stand on this; so do the tests.
"""

import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from engine.deaths import DeathBudget
from engine.tuning import Tuning
from jobs.app import App
from jobs.domain.errors import AlreadyLocked, BatchctlError
from jobs.loops.chores import ChoreLoop
from jobs.loops.control import ControlLoop
from jobs.loops.sweep import SweepLoop
from jobs.loops.turns import Crew
from jobs.loops.work import WorkLoop
from jobs.worker.presence import Presence
from storage import units
from storage.config import PRIVATE


class FolderLock:
    """Keeps a second process out of a data folder; freed by the kernel when the holder dies."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            AlreadyLocked: another process has it.
        """
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        self._file: IO[str] = (folder / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise AlreadyLocked(
                f"Another batchctl (process {holder}) works in {folder}; wait for it, end it, or "
                "choose another folder with --data."
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __enter__(self) -> Self:
        """Hold the lock for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self._file.close()


class Embedded:
    """The loops and the worker of one machine; use as a context manager."""

    def __init__(
        self,
        app: App,
        *,
        fail_without_engine: bool = True,
        does_chores: bool = True,
        on_progress: Callable[[str, int], None] | None = None,
    ) -> None:
        """Prepare to work on `app`.

        Args:
            does_chores: whether batches are audited and what nobody needs is removed.
            fail_without_engine: whether shards whose engine cannot be had end with errors; if
                not, work stops and `failure` says why.
            on_progress: called with "planning" or "finalizing" and a number of lines.
        """
        self.app = app
        self._on_progress = on_progress
        self._does_chores = does_chores
        self._crew = Crew(app, fail_without_engine=fail_without_engine)
        # On Postgres there may be workers beside this process: it is one of them, and leaves to
        # the others what it cannot serve as they do. SQLite is this folder's alone.
        self._presence = (
            Presence(app, self._crew, device="serve", work=lambda: self._work)
            if app.db.is_postgres
            else None
        )
        self._work = (
            WorkLoop(self._crew)
            if self._presence is None
            else WorkLoop(
                self._crew,
                models=(),
                others_serve=self._presence.do_others_serve,
                on_loaded=self._presence.offer_loaded,
                budget=DeathBudget(
                    max_deaths=app.settings.worker.max_engine_deaths,
                    window_seconds=app.settings.worker.engine_death_window_seconds,
                ),
            )
        )
        self._threads: list[threading.Thread] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Take over what an earlier process left, and start."""
        crew = self._crew
        if self._presence is None:
            units.reap_other_boots(self.app.db, boot_id=crew.boot_id)
        sandbox = self._stack.enter_context(self.app.open_sandbox())
        control = ControlLoop(crew, checker=sandbox, on_progress=self._on_progress)
        turns = {
            "control": control.turn,
            "sweeper": SweepLoop(crew).turn,
            "engine": self._work.turn,
        }
        if self._does_chores:
            turns["chores"] = ChoreLoop(crew).turn
        self._threads = [
            threading.Thread(target=crew.repeat, args=(turn,), kwargs={"name": name}, name=name)
            for name, turn in turns.items()
        ]
        self._stack.enter_context(crew.keeping())
        if self._presence is not None:
            self._stack.enter_context(self._presence)
            self._presence.offer()
        # With a broker there may be workers that wait for a ring; it sweeps for them.
        self.app.doorbell.poke_every(self.app.settings.leases.reap_seconds / 2)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush what is finished, give the rest back, end the engine."""
        self.stop()
        for thread in self._threads:
            thread.join()  # each looks at `stopping` often, and every wait of theirs is bounded
        self._work.close()
        self._stack.close()

    @property
    def failure(self) -> BatchctlError | None:
        """The error that ended the work, or that nobody can wait out."""
        return self._crew.failure

    @property
    def engine_pid(self) -> int | None:
        """The process id of the engine, or None while there is none."""
        return self._work.engine_pid

    @property
    def tuning(self) -> Tuning | None:
        """What the engine worked with last, where it chose that."""
        return self._work.tuning

    def stop(self) -> None:
        """Ask every loop to end."""
        self._crew.stop()
