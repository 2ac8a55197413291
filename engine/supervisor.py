"""Keeps one engine process alive: starts it when it is needed, again when it died."""

import time
from collections.abc import Callable, Sequence

from engine.process import ProcessEngine
from jobs.domain.errors import EngineDied, EngineUnavailable

MAX_FRUITLESS_DEATHS = 5
"""Engine lives in a row that ended without a result and without a suspect."""
MAX_SUSPECT_DEATHS = 16
"""The same with suspects: halving a thousand of them, and one of them alone three times."""
_BACK_OFF_SECONDS = (0.0, 0.5, 2.0, 5.0, 15.0)


class EngineSupervisor:
    """Owns the engine process of one model."""

    def __init__(
        self,
        start: Callable[[], ProcessEngine],
        *,
        back_off_seconds: Sequence[float] = _BACK_OFF_SECONDS,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """Use `start` to begin an engine life; it may raise what ProcessEngine raises.

        Args:
            back_off_seconds: how long to wait after so many fruitless deaths in a row.
            wait: waits so many seconds, or less when everything is to stop.
        """
        self._wait = wait
        self._start = start
        self._back_off_seconds = back_off_seconds
        self._engine: ProcessEngine | None = None
        self._deaths = 0
        self._max_deaths = MAX_FRUITLESS_DEATHS
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        """The process id of the engine, or None when there is none."""
        return self._engine.pid if self._engine is not None else None

    def open(self) -> ProcessEngine:
        """Return the running engine, started first if need be.

        Raises:
            EngineMisconfigured, EngineOutOfMemory: it cannot start.
            EngineUnavailable: it died too often without having done anything.
        """
        while self._engine is None:
            if self._deaths >= self._max_deaths:
                raise EngineUnavailable(
                    f"The engine died {self._deaths} times in a row without a result; "
                    "see its log for the reason."
                )
            pauses = self._back_off_seconds
            if self._max_deaths == MAX_FRUITLESS_DEATHS:  # a suspect is tried at once
                self._wait(pauses[min(self._deaths, len(pauses) - 1)])
            try:
                self.num_starts += 1
                self._engine = self._start()
            except EngineDied:
                self._deaths += 1
                if self._deaths >= MAX_FRUITLESS_DEATHS:
                    raise
        return self._engine

    def note_death(self, *, productive: bool, suspects: bool = False) -> None:
        """Forget an engine that died.

        Args:
            productive: whether its life brought a result.
            suspects: whether a request may be to blame; then it may die more often in a row.
        """
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._deaths = 0 if productive else self._deaths + 1
        self._max_deaths = MAX_SUSPECT_DEATHS if suspects else MAX_FRUITLESS_DEATHS

    def note_work(self) -> None:
        """Forget earlier deaths: the engine has brought results since."""
        self._deaths = 0

    def progress(self) -> object:
        """Return something that changes while the engine works or loads."""
        engine = self._engine  # read once: the worker's thread may forget it meanwhile
        # A new life is progress, even when its first count is where the last one stopped.
        return time.monotonic() if engine is None else (self.num_starts, engine.progress())

    def close(self) -> None:
        """End the engine process."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
