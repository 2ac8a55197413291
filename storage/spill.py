"""Bytes that are written once and read again in pieces, on disk and not in memory."""

import tempfile
from collections.abc import Iterator
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
        try:
            self._file.write(data)
        except OSError as error:
            raise BlobStoreUnavailable(
                f"Planning a batch failed in {tempfile.gettempdir()}: {error.strerror}."
            ) from error

    def read(self, num_bytes: int) -> Iterator[bytes]:
        """Yield all that was written, from the start, in pieces of so many bytes."""
        self._file.seek(0)
        while piece := self._file.read(num_bytes):
            yield piece
