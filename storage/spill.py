"""Bytes that are written once and read again in pieces, on disk and not in memory."""

import tempfile
from collections.abc import Iterator
from os import SEEK_END, SEEK_SET
from types import TracebackType
from typing import Self

from jobs.domain.errors import BlobStoreUnavailable


class Spill:
    """An anonymous file of the temporary folder; use as a context manager."""

    def __init__(self) -> None:
        """Make the file."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Self:
        """Keep the file for the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the disk back."""
        self._file.close()

    def append(self, data: bytes | bytearray) -> None:
        """Write behind what is there.

        Raises:
            BlobStoreUnavailable: the disk is full.
        """
        self._write(data, 0, SEEK_END)

    def replace(self, at: int, data: bytes | bytearray) -> None:
        """Write over what is there, also while it is read.

        Raises:
            BlobStoreUnavailable: the disk fails.
        """
        self._write(data, at, SEEK_SET)

    def read(self, num_bytes: int) -> Iterator[bytes]:
        """Yield all that was written, from the start, in pieces of so many bytes."""
        at = 0
        while True:
            self._file.seek(at)
            piece = self._file.read(num_bytes)
            if not piece:
                return
            at += len(piece)
            yield piece

    def _write(self, data: bytes | bytearray, at: int, whence: int) -> None:
        try:
            self._file.seek(at, whence)
            self._file.write(data)
        except OSError as error:
            raise BlobStoreUnavailable(
                f"Planning a batch failed in {tempfile.gettempdir()}: {error.strerror}."
            ) from error
