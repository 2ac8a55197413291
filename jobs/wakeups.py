"""Wakes whoever waits for work, for a cancellation or for progress; all of it may be lost.

    announce, hint ──► who waits in this process
                  └──► Others: a fleet's broker (`jobs.broker`), where there is one

Everybody also looks at the database now and then, so a lost ring costs time and nothing else.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import xxhash

from jobs.broker_url import shown_url
from jobs.domain.ids import BatchId

_NOT_IN_QUEUES = re.compile(r"[^A-Za-z0-9_.-]")


class Hint(StrEnum):
    """What may be worth a look at a batch."""

    STOPPING = "stopping"
    """It is being cancelled; whoever works on it stops."""
    PROGRESS = "progress"
    """More of it is durable, or it ended."""


class Others(Protocol):
    """The other processes of a fleet; no call waits or fails."""

    def ring(self) -> None:
        """Tell them that there is work."""

    def hint(self, hint: Hint, batch_id: BatchId) -> None:
        """Tell them that a look at a batch may be worth it."""

    def listen(self) -> None:
        """Begin to hear what they tell."""

    def poke_every(self, seconds: float) -> None:
        """Tell them of work that nobody took, at intervals."""

    @property
    def is_listening(self) -> bool:
        """Whether what they tell is heard at present."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Where the broker is, and what names there begin with."""

    url: str
    sentinel_master: str = "mymaster"
    prefix: str = "batchctl"

    @property
    def shown_url(self) -> str:
        """The URL without user, password and options."""
        return shown_url(self.url)


class Doorbell:
    """The doorbell of one process: whoever waits is woken by the next ring."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._rings = 0
        self._listeners: dict[Hint, list[Callable[[BatchId], None]]] = {hint: [] for hint in Hint}
        self._others: Others | None = None

    def connect(self, others: Others) -> None:
        """Tell the rest of a fleet too, from now on."""
        self._others = others

    @property
    def is_shared(self) -> bool:
        """Whether rings of other processes are heard too, as far as is known."""
        return self._others is not None and self._others.is_listening

    def announce(self) -> None:
        """Wake everybody who waits for work."""
        self.ring_here()
        if self._others is not None:
            self._others.ring()

    def poke_every(self, seconds: float) -> None:
        """Let this process ring at intervals for work that nobody took; for one that sweeps."""
        if self._others is not None:
            self._others.poke_every(seconds)

    def ring_here(self) -> None:
        """Wake who waits in this process."""
        with self._condition:
            self._rings += 1
            self._condition.notify_all()

    def wait(self, timeout_seconds: float, *, seen: int | None = None) -> int:
        """Wait for a ring later than `seen` (default: any later one); return the count of rings."""
        with self._condition:
            before = self._rings if seen is None else seen
            self._condition.wait_for(lambda: self._rings != before, timeout_seconds)
            return self._rings

    def hint(self, hint: Hint, batch_id: BatchId) -> None:
        """Let everybody who listens for this have a look at a batch."""
        self.hint_here(hint, batch_id)
        if self._others is not None:
            self._others.hint(hint, batch_id)

    def hint_here(self, hint: Hint, batch_id: BatchId) -> None:
        """Let who listens in this process have a look."""
        with self._condition:
            listeners = tuple(self._listeners[hint])
        for listener in listeners:
            listener(batch_id)

    @contextmanager
    def listening(self, hint: Hint, listener: Callable[[BatchId], None]) -> Iterator[None]:
        """Within the block, call `listener` with each hint; it must return at once."""
        if self._others is not None:
            self._others.listen()
        with self._condition:
            self._listeners[hint].append(listener)
        try:
            yield
        finally:
            with self._condition:
                self._listeners[hint].remove(listener)


def control_queue(prefix: str) -> str:
    """Return the queue of plan, finalize and sweep messages."""
    return f"{prefix}.control"


def work_queue(prefix: str, model: str) -> str:
    """Return the queue of a model; a name that a queue cannot have is told by its hash."""
    plain = _NOT_IN_QUEUES.sub("-", model)
    if plain != model:
        plain = f"{plain}.{xxhash.xxh3_64_hexdigest(model.encode())[:8]}"
    return f"{prefix}.work.{plain}"
