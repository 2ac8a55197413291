"""Requests made ready ahead of the engine: encoded and constrained in a thread beside its own.

    engine's thread:  source.take ─► hand_over ─┐                     ┌─► start, between two steps
    the thread "engine-ahead":                  └─► prepare, one by one ─► deliver

What is prepared belongs to the engine's thread from its delivery on. Nothing here waits for
anything but the next request, so a source that has none costs no time.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, NoReturn, Self, TypeVar

import msgspec

from jobs.domain.errors import BatchctlError, EngineDied
from jobs.domain.request import Request

LOOK_AHEAD = 3
"""How many times its slots an engine holds: once running, the rest ready or being made so."""
_MAX_BYTES = 32 << 20
"""Of what an engine holds; as tokens they take nine times as much. Its slots may hold more."""
_CLOSE_SECONDS = 1.0

Prepared = TypeVar("Prepared")
Item = TypeVar("Item")


class Failure(msgspec.Struct, frozen=True):
    """Preparing a request failed, and not because of what its line asks for."""

    request_id: int
    error: BaseException

    def surface(self) -> NoReturn:
        """Raise it where the engine runs.

        Raises:
            EngineDied: with this request as the suspect.
        """
        if isinstance(self.error, BatchctlError):
            raise self.error
        raise EngineDied(
            f"A request could not be prepared ({type(self.error).__name__}).",
            suspects=frozenset({self.request_id}),
        ) from self.error


class Ahead(Generic[Prepared]):
    """Prepares what it is handed, in that order; use as a context manager.

    Counts what the engine holds as well, so that it takes neither too little nor too much. All
    but `prepare` and `deliver` is for the engine's thread.

    Attributes:
        num_slots: how many requests the engine runs at once; may change at any time.
        pending: ids of the requests that were handed over and not received yet.
    """

    def __init__(
        self,
        prepare: Callable[[Request], Prepared],
        deliver: Callable[[Prepared | Failure], None],
        *,
        num_slots: int,
    ) -> None:
        """Get ready.

        Args:
            prepare: turns a request into what the engine starts, in the thread beside it.
            deliver: is called there with each; behind a Failure nothing comes any more.
            num_slots: how many requests the engine runs at once.
        """
        self._prepare = prepare
        self._deliver = deliver
        self.num_slots = num_slots
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine-ahead", daemon=True)
        self._sizes: dict[int, int] = {}
        self._num_bytes = 0
        self.pending: set[int] = set()

    def __enter__(self) -> Self:
        """Start preparing."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drop what is not ready; a preparation that does not end is not waited for."""
        self._is_closed = True
        self._requests.put(None)
        self._thread.join(_CLOSE_SECONDS)

    @property
    def room(self) -> int:
        """How many more the engine may take: what fills its slots at least, however large."""
        held = len(self._sizes)
        if not held:
            return self.num_slots
        # As many as are likely to fit: how large the next ones are, nobody knows before.
        fitting = (_MAX_BYTES - self._num_bytes) * held // max(1, self._num_bytes)
        return max(self.num_slots - held, min(LOOK_AHEAD * self.num_slots - held, fitting), 0)

    def hand_over(self, requests: Sequence[Request]) -> None:
        """Have requests prepared, behind those that were handed over before."""
        for request in requests:
            size = _size_of(request)
            self._num_bytes += size - self._sizes.get(request.id, 0)
            self._sizes[request.id] = size
            self.pending.add(request.id)
            self._requests.put(request)

    def receive(self, request_id: int) -> None:
        """Note that the engine has what was delivered for a request."""
        self.pending.discard(request_id)

    def forget(self, request_id: int) -> None:
        """Note that the engine does not hold a request any more."""
        self._num_bytes -= self._sizes.pop(request_id, 0)

    def _run(self) -> None:
        while (request := self._requests.get()) is not None and not self._is_closed:
            try:
                prepared = self._prepare(request)
            except BaseException as error:  # noqa: BLE001 -- a tokenizer's panic is no Exception
                self._deliver(Failure(request.id, error))
                return
            self._deliver(prepared)


def drain(waiting: "queue.SimpleQueue[Item]", wait_seconds: float) -> list[Item]:
    """Return all that waits in a queue; where nothing does, wait so long for the first."""
    found: list[Item] = []
    try:
        found.append(waiting.get(timeout=wait_seconds) if wait_seconds else waiting.get_nowait())
        while True:
            found.append(waiting.get_nowait())
    except queue.Empty:
        return found


def _size_of(request: Request) -> int:
    size = len(request.prompt or ())
    for message in request.messages or ():
        size += len(message.content)
        if message.parts:
            size += sum(len(image.content) for image in message.images)
    return size + (len(request.constraint.spec) if request.constraint is not None else 0)
