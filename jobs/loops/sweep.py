"""Looks after forgotten work at intervals, and reaps nobody who could not have renewed."""

import time

from jobs import metrics, sweeper
from jobs.loops.turns import Crew
from jobs.telemetry import log
from storage import units

_LATE_SECONDS = 1.0
"""How long after its expiry a lease may be looked for; also the shortest pause."""


class SweepLoop:
    """Reaps expired leases, stops overdue batches, hands finished ones to the finalizer."""

    def __init__(self, crew: Crew) -> None:
        """Sweep the database of `crew`."""
        self._crew = crew
        self._app = crew.app
        self._swept_at: tuple[float, float] | None = None
        self._reap_after = 0.0

    def turn(self) -> bool:
        """Sweep once, then wait until the next turn is due."""
        self.sweep()
        self._crew.stopping.wait(self._pause_seconds())
        return True

    def _pause_seconds(self) -> float:
        """Return how long to wait; less than usual where a lease runs out before.

        One that is renewed never comes so far. Else the work of a worker that was killed would
        wait for its lease and for a whole pause besides.
        """
        longest = self._app.settings.leases.reap_seconds
        expiry = units.next_expiry(self._app.db)
        if expiry is None:
            return longest
        left = max(0.0, (expiry - self._app.db.now()).total_seconds())
        return min(longest, left + min(_LATE_SECONDS, longest / 10))

    def sweep(self) -> bool:
        """Return whether there was something to look after."""
        swept = sweeper.tick(self._app.db, rng=self._crew.rng, reap=self.may_reap())
        metrics.count_reaped(swept.reaped)
        found = bool(swept.reaped or swept.expired or swept.finished)
        if found:
            log.info("swept", reaped=swept.reaped, expired=swept.expired, done=swept.finished)
            self._app.doorbell.announce()
        return found

    def may_reap(self) -> bool:
        """Return False for one lease after the machine slept, the clock jumped or we starved.

        Until then, whoever holds a lease may not have had the time to renew it. A database that
        was away shows as such a gap too.
        """
        now, wall = time.monotonic(), self._app.db.now().timestamp()
        lease_seconds = self._crew.times.lease_seconds
        if self._swept_at is not None:
            gap = max(now - self._swept_at[0], wall - self._swept_at[1])
            if gap > lease_seconds / 2 + self._app.settings.leases.reap_seconds:
                self._reap_after = now + lease_seconds
        self._swept_at = (now, wall)
        return now >= self._reap_after
