"""How often the engine of one worker may die before its device, and no request, is to blame."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Death:
    """One death.

    Attributes:
        suspects: the requests that the engine held.
        uncleared: those of them that have not come through since.
    """

    at: float
    suspects: frozenset[int]
    uncleared: set[int]


class DeathBudget:
    """Counts the deaths within a window of time that no request explains.

    A death with suspects is open until either each of them has come through in another life of the
    engine, and then it counts, or one of them is convicted, and then none of the deaths that it
    was suspected of counts. So a request that kills the engine eight times in a group and three
    times alone costs nothing here, and a device that fails at random moments is found.
    """

    def __init__(
        self,
        *,
        max_deaths: int,
        window_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with no death at all.

        Args:
            max_deaths: so many within `window_seconds` are too many.
        """
        self.window_seconds = window_seconds
        self._max_deaths = max_deaths
        self._clock = clock
        self._lock = threading.Lock()
        self._deaths: list[_Death] = []
        self._uncleared: frozenset[int] = frozenset()

    @property
    def num_deaths(self) -> int:
        """How many deaths count now."""
        return len(self._counted())

    @property
    def spent_seconds(self) -> float:
        """How long the engine is to rest; 0 while the budget is not spent."""
        counted = self._counted()
        if len(counted) < self._max_deaths:
            return 0.0
        return counted[-self._max_deaths] + self.window_seconds - self._clock()

    @property
    def problem(self) -> str | None:
        """Why the engine is to rest, for people, or None."""
        counted = self._counted()
        if len(counted) < self._max_deaths:
            return None
        return (
            f"The engine died {len(counted)} times within {self.window_seconds / 60:.3g} minutes "
            "and no request is to blame; see its log, and look at the device."
        )

    def note_death(
        self, suspects: frozenset[int] = frozenset(), *, convicted: int | None = None
    ) -> None:
        """Count a death, now or once its suspects are cleared.

        Args:
            convicted: the request that is guilty of it beyond doubt, where there is one; it
                explains the earlier deaths that it was suspected of as well.
        """
        with self._lock:
            if convicted is None:
                self._deaths.append(_Death(self._clock(), suspects, set(suspects)))
            else:
                self._deaths = [one for one in self._deaths if convicted not in one.suspects]
            self._look()

    def note_result(self, request_id: int) -> bool:
        """Clear a request of every suspicion: it came through; return if there was any."""
        if request_id not in self._uncleared:
            return False
        with self._lock:
            for death in self._deaths:
                death.uncleared.discard(request_id)
            self._look()
        return True

    def forget_suspects(self) -> None:
        """Drop the open deaths: somebody else will run their suspects, under other ids."""
        with self._lock:
            self._deaths = [
                _Death(one.at, frozenset(), set()) for one in self._deaths if not one.uncleared
            ]
            self._look()

    def _look(self) -> None:
        since = self._clock() - self.window_seconds
        self._deaths = [one for one in self._deaths if one.at > since]
        self._uncleared = frozenset().union(*(one.uncleared for one in self._deaths))

    def _counted(self) -> list[float]:
        since = self._clock() - self.window_seconds
        with self._lock:
            return [one.at for one in self._deaths if not one.uncleared and one.at > since]
