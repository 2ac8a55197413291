"""Brings entries into the order of their ranks, in bounded memory: buckets on disk, each sorted.

One routine for both ways: the lines of a file into the order they will run in, and the results of
a batch that ran in another order back into that of its file.
"""

import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Self

from jobs.domain.errors import BlobStoreUnavailable

_HEADER = struct.Struct("<QBI")
_BUCKET_BYTES = 8 << 20
_MAX_BUCKETS = 256
_IN_MEMORY_BYTES = 1 << 20
"""What a bucket holds before it is a file; small batches never touch the disk."""
_SPARE_BYTES = 256 << 20

Ranked = tuple[int, int, bytes]
"""The rank of an entry, its kind, and its bytes."""


class Reorder:
    """Takes entries in any order and gives them back by rank; use as a context manager."""

    def __init__(self, *, num_ranks: int, num_bytes: int) -> None:
        """Prepare for ranks below `num_ranks`, of about `num_bytes` in all.

        Raises:
            BlobStoreUnavailable: the temporary folder has no room for them.
        """
        wanted = max(1, min(_MAX_BUCKETS, num_bytes // _BUCKET_BYTES + 1))
        self._per_bucket = max(1, -(-num_ranks // wanted))
        num_buckets = max(1, -(-num_ranks // self._per_bucket))
        if num_bytes > num_buckets * _IN_MEMORY_BYTES:
            folder = tempfile.gettempdir()
            free = shutil.disk_usage(folder).free
            if free < num_bytes + _SPARE_BYTES:
                raise BlobStoreUnavailable(
                    f"Sorting a batch needs {num_bytes >> 20} MiB in {folder}, and "
                    f"{free >> 20} MiB are free there; make room, or set TMPDIR."
                )
        self._num_buckets = num_buckets
        self._stack = ExitStack()
        self._buckets: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        """Open the buckets."""
        self._buckets = [
            self._stack.enter_context(
                tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115  by the stack
            )
            for _ in range(self._num_buckets)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove them."""
        self._stack.close()

    def add(self, rank: int, kind: int, content: bytes) -> None:
        """Take an entry; several may have one rank, and stay in the order they came in.

        Raises:
            BlobStoreUnavailable: the disk is full.
        """
        bucket = self._buckets[rank // self._per_bucket]
        try:
            bucket.write(_HEADER.pack(rank, kind, len(content)))
            bucket.write(content)
        except OSError as error:
            raise BlobStoreUnavailable(
                f"Sorting a batch failed in {tempfile.gettempdir()}: {error.strerror}."
            ) from error

    def read(self) -> Iterator[Ranked]:
        """Yield every entry by rank."""
        for bucket in self._buckets:
            bucket.seek(0)
            entries = list(_read(bucket.read()))
            entries.sort(key=_rank_of)
            yield from entries


def _rank_of(entry: Ranked) -> int:
    return entry[0]


def _read(content: bytes) -> Iterator[Ranked]:
    at = 0
    while at < len(content):
        rank, kind, size = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        yield rank, kind, content[at : at + size]
        at += size
