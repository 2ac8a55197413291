"""Bytes that are written once and read again in pieces, on disk and not in memory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import SEEK_END, SEEK_SET
from types import TracebackType
from typing import Self

from jobs.domain.errors import BlobStoreUnavailable


@contextmanager
def on_disk(what: str) -> Iterator[None]:
    """Tell what goes wrong with files of the temporary folder as something that may pass.

    Raises:
        BlobStoreUnavailable: the disk is full, fails, or there is no such folder.
    """
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "the temporary folder"
        raise BlobStoreUnavailable(
            f"{what} failed in {folder}: {error.strerror or error}. Make room, or set TMPDIR."
        ) from error


class Spill:
    """An anonymous file of the temporary folder; use as a context manager."""

    def __init__(self) -> None:
        """Make the file.

        Raises:
            BlobStoreUnavailable: there is no place for it.
        """
        with on_disk("Planning a batch"):
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
        """Yield all that was written, from the start, in pieces of so many bytes.

        Raises:
            BlobStoreUnavailable: the disk fails.
        """
        at = 0
        while True:
            with on_disk("Planning a batch"):
                self._file.seek(at)
                piece = self._file.read(num_bytes)
            if not piece:
                return
            at += len(piece)
            yield piece

    def _write(self, data: bytes | bytearray, at: int, whence: int) -> None:
        with on_disk("Planning a batch"):
            self._file.seek(at, whence)
            self._file.write(data)
