"""Keeps one engine process alive: starts it when it is needed, again when it died."""

import time
from collections.abc import Callable, Sequence

from engine.process import ProcessEngine
from jobs.domain.errors import EngineDied, EngineUnavailable

MAX_FRUITLESS_DEATHS = 5
"""Engine lives in a row that ended without a result and without a suspect."""
_BACK_OFF_SECONDS = (0.0, 0.5, 2.0, 5.0, 15.0)


class EngineSupervisor:
    """Owns the engine process of one model."""

    def __init__(
        self,
        start: Callable[[], ProcessEngine],
        *,
        back_off_seconds: Sequence[float] = _BACK_OFF_SECONDS,
    ) -> None:
        """Use `start` to begin an engine life; it may raise what ProcessEngine raises.

        Args:
            back_off_seconds: how long to wait after so many fruitless deaths in a row.
        """
        self._start = start
        self._back_off_seconds = back_off_seconds
        self._engine: ProcessEngine | None = None
        self._deaths = 0
        self._loading = False
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
            if self._deaths >= MAX_FRUITLESS_DEATHS:
                raise EngineUnavailable(
                    f"The engine died {self._deaths} times in a row without a result; "
                    "see its log for the reason."
                )
            pauses = self._back_off_seconds
            time.sleep(pauses[min(self._deaths, len(pauses) - 1)])
            self._loading = True
            try:
                self.num_starts += 1
                self._engine = self._start()
            except EngineDied:
                self._deaths += 1
                if self._deaths >= MAX_FRUITLESS_DEATHS:
                    raise
            finally:
                self._loading = False
        return self._engine

    def note_death(self, *, productive: bool) -> None:
        """Forget an engine that died; `productive` when its life brought a result or a suspect."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._deaths = 0 if productive else self._deaths + 1

    def progress(self) -> object:
        """Return something that changes while the engine works or loads."""
        if self._loading or self._engine is None:
            return time.monotonic()
        return self._engine.progress()

    def close(self) -> None:
        """End the engine process."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
