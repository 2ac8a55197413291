"""What a blob store promises, and every key that is ever written to one.

files/<file id>                                              an uploaded input
outputs/<batch id>/<epoch>-<kind>.jsonl                      a produced file
plans/<batch id>/<epoch>.jsonl                               the lines of an input as they run
plans/<batch id>/<epoch>.keys                                16 bytes that tell each line's answer
reuse/<batch id>/<epoch>                                     answers for batches to come
segments/<batch id>/reused/<epoch>-<sequence>                results that were there before a shard
segments/<batch id>/<unit id>/<epoch>-<sequence>-<sha256>    results of some lines of a shard
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Literal, Protocol, Self

from jobs.domain.ids import BatchId, FileId
from jobs.domain.shard import Lease

OutputKind = Literal["output", "error"]

ROOTS = ("files/", "outputs/", "plans/", "reuse/", "segments/")
"""What every key begins with; a bucket without a prefix may hold other people's blobs too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    """A blob that is there to stay, and what was written to it."""

    key: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobStat:
    """A blob as a listing shows it.

    `modified_at` is by the store's clock. For an object that came in parts it may be the instant
    at which its upload began.
    """

    key: str
    num_bytes: int
    modified_at: datetime


class BlobWriter(Protocol):
    """Writes one blob; leaving without `commit` leaves nothing behind."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        ...

    def commit(self) -> BlobInfo:
        """Make the blob visible under its key, whole, in the place of any other."""
        ...


class BlobReader(Protocol):
    """Reads a blob or a part of it, forward only."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, or the rest; nothing only at the end."""
        ...


class BlobStore(Protocol):
    """Keeps blobs; what was committed is there for every reader from then on.

    Raises BlobStoreUnavailable where it cannot work now, and BlobMissing for a key without a blob.
    Threads share it; leaving it as a context manager ends its connections.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def open_writer(self, key: str) -> BlobWriter:
        """Return a writer for a blob of any size; its memory does not grow with the blob."""
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> BlobInfo:
        """Write a small blob.

        Args:
            if_absent: leave a blob that is there; it is a success when it has the same bytes.

        Raises:
            Conflict: `if_absent`, and it has other bytes.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return all of a small blob."""
        ...

    def open_reader(self, key: str, *, start: int = 0, length: int | None = None) -> BlobReader:
        """Return a reader of the bytes from `start`; a range past the end is shorter, or empty."""
        ...

    def get_size(self, key: str) -> int:
        """Return the number of bytes."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is a blob under `key`."""
        ...

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is removed already."""
        ...

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that begin with `prefix`, in order."""
        ...

    def list_blobs(self, prefix: str = "", *, after: str = "") -> Iterator[BlobStat]:
        """Yield the blobs whose keys begin with `prefix` and come behind `after`, in order."""
        ...

    def abort_uploads(self, *, before: datetime, dry_run: bool = False) -> int:
        """Return how many unfinished writes were begun before then and are removed now.

        A writer that was killed leaves one, which costs its bytes and shows nowhere else.
        """
        ...


def input_key(file_id: FileId) -> str:
    """Return where the bytes of an uploaded file are."""
    return f"files/{file_id}"


def output_key(batch_id: BatchId, epoch: int, kind: OutputKind) -> str:
    """Return where the finalizer that holds `epoch` writes one of its two files."""
    return f"outputs/{batch_id}/{epoch}-{kind}.jsonl"


def plan_key(batch_id: BatchId, epoch: int) -> str:
    """Return where the planner that holds `epoch` writes the lines in the order they will run."""
    return f"plans/{batch_id}/{epoch}.jsonl"


def keys_key(batch_id: BatchId, epoch: int) -> str:
    """Return where the planner that holds `epoch` writes what tells the answer of each line."""
    return f"plans/{batch_id}/{epoch}.keys"


def answers_key(batch_id: BatchId, epoch: int) -> str:
    """Return where the finalizer that holds `epoch` writes answers for batches to come."""
    return f"reuse/{batch_id}/{epoch}"


def reused_key(batch_id: BatchId, epoch: int, sequence: int) -> str:
    """Return where the planner that holds `epoch` writes results that need not be computed."""
    return f"{segments_prefix(batch_id)}reused/{epoch}-{sequence}"


def segment_key(lease: Lease, sequence: int, sha256: str) -> str:
    """Return where a lease writes its segment number `sequence`."""
    return (
        f"{segments_prefix(lease.batch_id)}{lease.unit_id}/{lease.epoch}-{sequence}-{sha256[:16]}"
    )


def segments_prefix(batch_id: BatchId) -> str:
    """Return what the keys of all segments of a batch begin with."""
    return f"segments/{batch_id}/"


def hash_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal, as `BlobInfo` and `Segment` have it."""
    return hashlib.sha256(data).hexdigest()


def check_key(key: str) -> str:
    """Return `key` when it is one: parts that are names, with slashes between.

    Raises:
        ValueError: it is not.
    """
    parts = key.split("/")
    if (
        not key
        or any(part in {"", ".", ".."} for part in parts)
        or any(character < " " or character in "\x7f\\" for character in key)
    ):
        raise ValueError(f"{key!r} is not a blob key")
    return key
