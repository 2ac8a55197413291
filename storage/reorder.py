"""Brings entries into the order of their ranks, in bounded memory: buckets on disk, each sorted.

One routine for both ways: the lines of a file into the order they will run in, and the results of
a batch that ran in another order back into that of its file.
"""

import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from operator import itemgetter
from types import TracebackType
from typing import IO, Self

import numpy as np

from jobs.domain.errors import BlobStoreUnavailable
from storage.spill import on_disk

_HEADER = struct.Struct("<IQ")
"""Of a block: how many entries, and the bytes of their contents."""
_BUCKET_BYTES = 8 << 20
_MAX_BUCKETS = 256
_IN_MEMORY_BYTES = 8 << 20
"""What is held before anything is written: small batches never touch the disk."""
_ENTRY_BYTES = 200
"""What an entry costs in memory, beside its content."""
_SPARE_BYTES = 256 << 20

Ranked = tuple[int, int, bytes]
"""The rank of an entry, a number of whoever added it, and its bytes."""
_rank_of = itemgetter(0)


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
        if num_bytes > _IN_MEMORY_BYTES:
            with on_disk("Sorting a batch"):
                folder = tempfile.gettempdir()
                free = shutil.disk_usage(folder).free
            if free < num_bytes + _SPARE_BYTES:
                raise BlobStoreUnavailable(
                    f"Sorting a batch needs {num_bytes >> 20} MiB in {folder}, and "
                    f"{free >> 20} MiB are free there; make room, or set TMPDIR."
                )
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = []
        self._held: list[list[Ranked]] = [[] for _ in range(num_buckets)]
        self._num_held_bytes = 0

    def __enter__(self) -> Self:
        """Nothing is opened before it is needed."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the buckets."""
        self._stack.close()

    def add(self, rank: int, tag: int, content: bytes) -> None:
        """Take an entry; several may have one rank, and stay in the order they came in.

        Raises:
            BlobStoreUnavailable: the disk is full.
        """
        self._held[rank // self._per_bucket].append((rank, tag, content))
        self._num_held_bytes += len(content) + _ENTRY_BYTES
        if self._num_held_bytes >= _IN_MEMORY_BYTES:
            self._spill()

    def read(self) -> Iterator[Ranked]:
        """Yield every entry by rank, once.

        Raises:
            BlobStoreUnavailable: the disk is full, or fails.
        """
        for number, held in enumerate(self._held):
            with on_disk("Sorting a batch"):
                entries = [*_read(self._files[number]), *held] if self._files else held
            self._held[number] = []
            entries.sort(key=_rank_of)
            yield from entries

    def _spill(self) -> None:
        with on_disk("Sorting a batch"):
            if not self._files:
                self._files = [
                    self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  by the stack
                    for _ in self._held
                ]
            for file, held in zip(self._files, self._held, strict=True):
                if held:
                    file.write(_encode(held))
                    held.clear()
        self._num_held_bytes = 0


def _encode(entries: list[Ranked]) -> bytes:
    """Return a block: its header, then ranks, tags, sizes and contents, each in a row."""
    ranks, tags, contents = zip(*entries, strict=True)
    sizes = np.array([len(content) for content in contents], dtype="<u4")
    numbers = np.array((ranks, tags), dtype="<u8")
    header = _HEADER.pack(len(entries), int(sizes.sum(dtype=np.uint64)))
    return b"".join((header, numbers.tobytes(), sizes.tobytes(), *contents))


def _read(file: IO[bytes]) -> Iterator[Ranked]:
    file.seek(0)
    while header := file.read(_HEADER.size):
        count, num_bytes = _HEADER.unpack(header)
        ranks, tags = np.frombuffer(file.read(16 * count), dtype="<u8").reshape(2, count).tolist()
        sizes = np.frombuffer(file.read(4 * count), dtype="<u4").tolist()
        contents, at = file.read(num_bytes), 0
        for rank, tag, size in zip(ranks, tags, sizes, strict=True):
            yield rank, tag, contents[at : at + size]
            at += size
