"""Tells idle workers that there is work; a hint that may be lost, since everybody also polls."""

import threading


class Doorbell:
    """The doorbell of one process: whoever waits is woken by the next ring."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._rings = 0

    def announce(self) -> None:
        """Wake everybody who waits."""
        with self._condition:
            self._rings += 1
            self._condition.notify_all()

    def wait(self, timeout_seconds: float, *, seen: int | None = None) -> int:
        """Wait for a ring later than `seen` (default: any later one); return the count of rings."""
        with self._condition:
            before = self._rings if seen is None else seen
            self._condition.wait_for(lambda: self._rings != before, timeout_seconds)
            return self._rings
