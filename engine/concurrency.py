"""How many requests a server bears at once: found by asking for more until it has too much."""

_START = 16
_FACTOR = 0.5


class AdaptiveLimit:
    """A limit that grows by one a round of successes, and is halved when there was too much.

    Until the first time that there was too much, it grows by one a success: it doubles each round.

    Source: additive increase, multiplicative decrease with slow start, as in RFC 5681.
    """

    def __init__(self, most: int) -> None:
        """Begin somewhere between 1 and `most`."""
        self._most = most
        self._limit = float(min(most, _START))
        self._may_double = True
        self._decreased_at = float("-inf")

    @property
    def limit(self) -> int:
        """How many requests may be out now; at least 1."""
        return int(self._limit)

    def note_success(self) -> None:
        """Count a request that was answered."""
        self._limit = min(
            self._most, self._limit + (1.0 if self._may_double else 1.0 / self._limit)
        )

    def note_overload(self, *, started_at: float, now: float) -> bool:
        """Count a request that the server could not bear; return whether the limit was lowered.

        Of the requests that were out together, all of which may come back at once, only the first
        lowers it: the others were sent before anybody knew.
        """
        if started_at < self._decreased_at:
            return False
        self._decreased_at = now
        self._may_double = False
        self._limit = max(1.0, self._limit * _FACTOR)
        return True
