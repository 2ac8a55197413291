"""Keeps one engine process alive: starts it when it is needed, again when it died.

After a death the new process is given to nobody before it has answered a request of ours, so that
no work is claimed for a device that fails everything.
"""

import time
from collections.abc import Callable, Sequence

from engine.deaths import DeathBudget
from engine.process import ProcessEngine
from jobs.domain.errors import (
    EngineDied,
    EngineOutOfMemory,
    EngineQuarantined,
    EngineTimedOut,
    EngineUnavailable,
)

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
        budget: DeathBudget | None = None,
        back_off_seconds: Sequence[float] = _BACK_OFF_SECONDS,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """Use `start` to begin an engine life; it may raise what ProcessEngine raises.

        Args:
            budget: counts the deaths that no request explains, and outlives this object; None:
                there may be as many as there are.
            back_off_seconds: how long to wait after so many fruitless deaths in a row.
            wait: waits so many seconds, or less when everything is to stop.
        """
        self._wait = wait
        self._start = start
        self._budget = budget
        self._back_off_seconds = back_off_seconds
        self._engine: ProcessEngine | None = None
        self._deaths = 0
        self._max_deaths = MAX_FRUITLESS_DEATHS
        self._has_died = False
        self._is_trusted = budget is None or not budget.num_deaths
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        """The process id of the engine, or None when there is none."""
        return self._engine.pid if self._engine is not None else None

    @property
    def is_open(self) -> bool:
        """Whether there is an engine to give work to."""
        return self._engine is not None

    def open(self) -> ProcessEngine:
        """Return the running engine, started first if need be.

        Raises:
            EngineMisconfigured, EngineOutOfMemory: it cannot start.
            EngineTimedOut: it did not load in time, or does not answer.
            EngineQuarantined: it died too often, and no request is to blame.
            EngineUnavailable: it died too often without having done anything.
        """
        while self._engine is None:
            self._check_budget()
            if self._deaths >= self._max_deaths:
                raise EngineUnavailable(
                    f"The engine died {self._deaths} times in a row without a result; "
                    "see its log for the reason."
                )
            pauses = self._back_off_seconds
            if self._max_deaths == MAX_FRUITLESS_DEATHS:  # a suspect is tried at once
                self._wait(pauses[min(self._deaths, len(pauses) - 1)])
            try:
                self._engine = self._begin()
            except EngineDied as death:
                self._note_stillbirth()
                # What took its whole time will take it again: others may have the work meanwhile.
                if isinstance(death, EngineTimedOut) or self._deaths >= MAX_FRUITLESS_DEATHS:
                    raise
        return self._engine

    def _begin(self) -> ProcessEngine:
        """Start a life; after a death, only one that answers is any good."""
        self.num_starts += 1
        engine = self._start()
        if not self._is_trusted:
            try:
                engine.probe()
            except BaseException:
                engine.close()
                raise
            self._is_trusted = True
        return engine

    def note_death(
        self,
        *,
        productive: bool,
        suspects: frozenset[int] = frozenset(),
        convicted: int | None = None,
        cause: str | None = None,
    ) -> None:
        """Forget an engine that died.

        Args:
            productive: whether its life brought a result.
            suspects: requests that may be to blame; with any, it may die more often in a row.
            convicted: the one that is, if that is known by now.
            cause: what the engine said of it, as in EngineDied.
        """
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._has_died, self._is_trusted = True, False
        self._deaths = 0 if productive else self._deaths + 1
        self._max_deaths = MAX_SUSPECT_DEATHS if suspects else MAX_FRUITLESS_DEATHS
        # Too much work at once is the settings' fault, and the same on every device.
        is_overload = cause == EngineOutOfMemory.code and convicted is None
        if self._budget is not None and not is_overload:
            self._budget.note_death(suspects, convicted=convicted)

    def note_result(self, request_id: int) -> None:
        """Note that a request came through.

        Raises:
            EngineQuarantined: so it was not to blame for a death, which is one too many.
        """
        if self._budget is not None and self._budget.note_result(request_id):
            self._check_budget()

    def forget_suspects(self) -> None:
        """Note that the ids of requests begin anew."""
        if self._budget is not None:
            self._budget.forget_suspects()

    def note_work(self) -> None:
        """Forget earlier deaths: the engine has brought results since."""
        self._deaths = 0

    def progress(self) -> object:
        """Return something that changes while the engine works or loads."""
        engine = self._engine  # read once: the worker's thread may forget it meanwhile
        # A new life is progress, even when its first count is where the last one stopped.
        return time.monotonic() if engine is None else (self.num_starts, engine.progress())

    def _note_stillbirth(self) -> None:
        """Count a life that ended before it was given work; no request had a part in it."""
        self._deaths += 1
        # One that never worked here fails for what the model is, more likely than for the device.
        if self._has_died:
            self._is_trusted = False
            if self._budget is not None:
                self._budget.note_death()

    def _check_budget(self) -> None:
        problem = self._budget.problem if self._budget is not None else None
        if problem is not None:
            raise EngineQuarantined(problem)

    def close(self) -> None:
        """End the engine process."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
