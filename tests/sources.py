"""A source of requests that are all there, for tests and benchmarks that talk to an engine."""

from collections.abc import Iterable, Sequence

from jobs.domain.request import Request


class ListSource:
    """Hands out a list of requests; those in `aborted` are so once they were taken."""

    def __init__(self, requests: Iterable[Request], aborted: Iterable[int] = ()) -> None:
        self._waiting = list(requests)
        self._taken: set[int] = set()
        self.aborted = set(aborted)

    def take(self, n: int) -> Sequence[Request] | None:
        if not self._waiting:
            return None
        taken, self._waiting = self._waiting[:n], self._waiting[n:]
        self._taken.update(request.id for request in taken)
        return taken

    def is_aborted(self, request_id: int) -> bool:
        return request_id in self.aborted and request_id in self._taken
