"""What is kept for reuse, within bounds."""

import threading
from collections import OrderedDict
from typing import TypeVar

_T = TypeVar("_T")


class BoundedCache(OrderedDict[bytes, tuple[_T, int]]):
    """The most recently used values, bounded in number and in what they weigh.

    Any thread may find and keep: requests are prepared in one, answers validated in another.
    """

    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def find(self, key: bytes) -> _T | None:
        """Return the value under `key`, or None."""
        with self._lock:
            found = self.get(key)
            if found is None:
                return None
            self.move_to_end(key)
            return found[0]

    def forget(self, key: bytes) -> None:
        """Forget the value under `key`, if there is one."""
        with self._lock:
            if key in self:
                self._num_bytes -= self.pop(key)[1]

    def keep(self, key: bytes, value: _T, *, weight: int) -> _T:
        """Keep a value that weighs `weight` bytes, forgetting the least recently used ones."""
        with self._lock:
            if key in self:
                self._num_bytes -= self.pop(key)[1]
            self[key] = (value, weight)
            self._num_bytes += weight
            while len(self) > self._max_entries or (
                self._num_bytes > self._max_bytes and len(self) > 1
            ):
                self._num_bytes -= self.popitem(last=False)[1][1]
            return value
