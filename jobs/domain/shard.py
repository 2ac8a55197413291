"""Leased units, shards, leases and segments: what a worker holds, and how a file is cut."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from jobs.domain.ids import BatchId, UnitId, WorkerId
from jobs.domain.result import Usage

FORMAT_VERSION = 3
"""Version of what a unit's worker must understand; older workers skip newer units.

1: byte ranges of the input. 2: ranges of a run-order blob too. 3: a line may have an endpoint of
its own, and a batch a model for each shard.
"""
PLAIN_FORMAT = 1
RUN_ORDER_FORMAT = 2
MIXED_FORMAT = 3


class UnitKind(StrEnum):
    """What a unit of work is."""

    PLAN = "plan"
    SHARD = "shard"
    FINALIZE = "finalize"
    WEBHOOK = "webhook"


class UnitState(StrEnum):
    """Where a unit stands; the last four are terminal."""

    PENDING = "pending"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL_UNIT_STATES = frozenset(
    {UnitState.DONE, UnitState.FAILED, UnitState.CANCELLED, UnitState.EXPIRED}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to run a unit until `expires_at`; `epoch` fences every later write.

    Attributes:
        num_stalls: how many leases in a row ended with their worker before anything was done.
    """

    unit_id: UnitId
    batch_id: BatchId
    kind: UnitKind
    ordinal: int
    epoch: int
    owner: WorkerId
    expires_at: datetime
    attempt: int
    crash_count: int = 0
    num_stalls: int = 0
    model_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A line that ran alone when its engine, or its whole worker, died: how often, and where."""

    position: int
    solo_crashes: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The lines that a worker runs by themselves, noted before they begin.

    A lease that ends with its worker leaves this behind: one of these lines may have killed it.
    """

    owner: WorkerId
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A run of request lines: a byte range of the input file, or of a run-order blob.

    A line of a run-order blob says itself which index it has, and for which others it runs.

    `done` has one bit per line of the shard, least significant bit first:
    position p is bit p % 8 of byte p // 8. `suspects` are groups of positions, each to run in an
    engine's life of its own; with a `trial`, each is noted before it begins.
    """

    unit_id: UnitId
    batch_id: BatchId
    ordinal: int
    first_index: int
    first_line: int
    num_lines: int
    byte_start: int
    num_bytes: int
    blob_key: str
    done: bytes = b""
    suspects: tuple[tuple[int, ...], ...] = ()
    faults: tuple[Fault, ...] = ()
    trial: Trial | None = None
    is_run_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """An immutable blob with some of a shard's results: the checkpoint.

    `positions` has one bit per line of the shard, like `Shard.done`. `identity` is that of the
    model which gave all of these results; None: there was none, or more than one.
    """

    unit_id: UnitId
    epoch: int
    sequence: int
    blob_key: str
    sha256: str
    num_bytes: int
    positions: bytes
    num_completed: int
    num_failed: int
    usage: Usage
    identity: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where one shard begins and ends in its source; see `Shard` for the fields."""

    first_index: int
    first_line: int
    num_lines: int
    byte_start: int
    num_bytes: int


def bitmap(positions: list[int], num_lines: int) -> bytes:
    """Return the bitmap of `num_lines` bits in which `positions` are set."""
    bits = bytearray((num_lines + 7) // 8)
    for position in positions:
        bits[position >> 3] |= 1 << (position & 7)
    return bytes(bits)


def merge_bitmaps(left: bytes, right: bytes) -> bytes:
    """Return the union of two bitmaps; the shorter one is padded with zeros."""
    size = max(len(left), len(right))
    return (int.from_bytes(left, "little") | int.from_bytes(right, "little")).to_bytes(
        size, "little"
    )


def bitmaps_overlap(left: bytes, right: bytes) -> bool:
    """Return whether some position is set in both."""
    return bool(int.from_bytes(left, "little") & int.from_bytes(right, "little"))


def count_bits(bits: bytes) -> int:
    """Return how many positions are set."""
    return int.from_bytes(bits, "little").bit_count()


def has_bit(bits: bytes, position: int) -> bool:
    """Return whether `position` is set; positions past the end are not."""
    byte = position >> 3
    return byte < len(bits) and bool(bits[byte] >> (position & 7) & 1)


class Cutter:
    """Groups lines, in the order they are added, into shards of a bounded size."""

    def __init__(self, *, max_lines: int, max_bytes: int) -> None:
        """Cut after `max_lines` lines, or before a shard would pass `max_bytes`."""
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._first: tuple[int, int, int] | None = None
        self._end = 0
        self._num_lines = 0
        self._last_byte = 0

    def add(self, index: int, line: int, byte_start: int, num_bytes: int) -> Cut | None:
        """Add a line; return the shard before it when this line begins another."""
        end = byte_start + num_bytes
        if 0 < self._num_lines < self._max_lines and end <= self._last_byte:
            self._num_lines += 1
            self._end = end
            return None
        finished = self.finish()
        self._first = (index, line, byte_start)
        self._last_byte = byte_start + self._max_bytes
        self._num_lines = 1
        self._end = end
        return finished

    def finish(self) -> Cut | None:
        """Return what is left as a shard, or None when nothing is."""
        if self._first is None:
            return None
        index, line, start = self._first
        cut = Cut(
            first_index=index,
            first_line=line,
            num_lines=self._num_lines,
            byte_start=start,
            num_bytes=self._end - start,
        )
        self._first = None
        self._num_lines = 0
        return cut
