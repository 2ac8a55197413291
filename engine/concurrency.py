"""How many requests a server bears at once: found by asking for more until it has too much."""

_START = 16
_FACTOR = 0.5


class AdaptiveLimit:
    """A limit that grows by one a round of successes, and is halved when there was too much.

    Below what was last known to be half of too much it grows by one a success, which doubles it
    each round: at the start, and when a server comes back.

    Source: additive increase, multiplicative decrease with slow start, as in RFC 5681.
    """

    def __init__(self, most: int) -> None:
        """Begin somewhere between 1 and `most`."""
        self._most = most
        self._limit = float(min(most, _START))
        self._threshold = float(most)
        self._lowered_at = float("-inf")
        self._is_out = False

    @property
    def limit(self) -> int:
        """How many requests may be out now; at least 1."""
        return int(self._limit)

    def note_success(self) -> None:
        """Count a request that was answered."""
        self._is_out = False
        step = 1.0 if self._limit < self._threshold else 1.0 / self._limit
        self._limit = min(self._most, self._limit + step)

    def note_overload(self, *, started_at: float, now: float) -> bool:
        """Count a request that the server could not bear; return whether the limit was lowered.

        Of the requests that were out together, all of which may come back at once, only the first
        lowers it: the others were sent before anybody knew.
        """
        if started_at < self._lowered_at:
            return False
        self._lowered_at = now
        self._threshold = self._limit = max(1.0, self._limit * _FACTOR)
        return True

    def note_outage(self, *, started_at: float, now: float) -> bool:
        """Count a request that did not reach the server: one at a time finds out when it is back.

        Returns the same as `note_overload`.
        """
        if started_at < self._lowered_at:
            return False
        self._lowered_at = now
        if not self._is_out:
            self._threshold = max(1.0, self._limit * _FACTOR)
        self._is_out = True
        self._limit = 1.0
        return True
