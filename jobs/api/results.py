"""The lines of a batch's results: out of its segments while it runs, out of its files after.

A line is in a segment the moment it is done; lines that never ran are in the error file only.
So a connection that began while the batch ran reads segments first and, at the end, the files,
leaving out what it has sent.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Literal

import anyio
import numpy as np
import xxhash

from jobs.api.context import Context
from jobs.api.problems import ServerStopping
from jobs.app import App
from jobs.domain.batch import Batch
from jobs.domain.errors import BlobMissing
from jobs.domain.ids import BatchId
from jobs.domain.shard import Segment, count_bits
from jobs.wakeups import Hint
from storage import batches, files, segments, shards
from storage.jsonl import KIND_ERROR, KIND_OUTPUT, decode_segment, scan

Kind = Literal["output", "errors", "all"]

POLL_SECONDS = 0.5
MIN_LOOK_SECONDS = 0.1
HEARTBEAT_SECONDS = 15.0
_PIECE_BYTES = 1 << 20
_MAX_LINE_BYTES = 1 << 30
_LINES_AT_ONCE = 1000


class ResultLines:
    """The lines of one batch, each once; keeps 8 bytes for each line it has given."""

    def __init__(self, app: App, batch: Batch, *, kind: Kind) -> None:
        self._app = app
        self._batch = batch
        self._kinds = {"output": (KIND_OUTPUT,), "errors": (KIND_ERROR,)}.get(
            kind, (KIND_OUTPUT, KIND_ERROR)
        )
        self._num_done: dict[str, int] = {}
        self._seen: set[tuple[str, int, int]] = set()
        self._given = bytearray()
        self.is_complete = False

    @property
    def batch_id(self) -> BatchId:
        """Whose lines they are."""
        return self._batch.id

    def look(self) -> Generator[bytes, None, None]:
        """Return pieces of whole lines that are new since the last look.

        The batch has no more than them when `is_complete` is true afterwards.

        Raises:
            NotFound: a file of the batch was deleted.
        """
        if not self._batch.status.is_terminal:
            self._batch = batches.get(self._app.db, self._batch.id)
        if not self._batch.status.is_terminal:
            return self._read_segments(self._new_segments())
        self.is_complete = True
        found = self._output_files()
        if not self._given:
            return self._copy_files(found)
        # Segments are not looked at any more: every line of theirs is in the files.
        return self._read_files(found)

    def _new_segments(self) -> list[Segment]:
        found = []
        for shard, _ in shards.list_for_batch(self._app.db, self._batch.id):
            num_done = count_bits(shard.done)
            if num_done == self._num_done.get(shard.unit_id, 0):
                continue
            for segment in segments.list_for_unit(self._app.db, shard.unit_id):
                place = (segment.unit_id, segment.epoch, segment.sequence)
                if place not in self._seen:
                    self._seen.add(place)
                    found.append(segment)
            self._num_done[shard.unit_id] = num_done
        return found

    def _read_segments(self, found: list[Segment]) -> Generator[bytes, None, None]:
        for segment in found:
            try:
                content = self._app.blobs.get(segment.blob_key)
            except BlobMissing:
                # Collected: the batch has ended meanwhile, and its files have the lines.
                if batches.get(self._app.db, self._batch.id).status.is_terminal:
                    continue
                raise
            lines = [line for _, kind, line in decode_segment(content) if kind in self._kinds]
            if lines:
                yield self._give(lines)

    def _give(self, lines: list[bytes]) -> bytes:
        self._given += _digest(lines).tobytes()
        return b"\n".join([*lines, b""])

    def _output_files(self) -> list[str]:
        """Return the blobs of the files that the batch has."""
        ids = {KIND_OUTPUT: self._batch.output_file_id, KIND_ERROR: self._batch.error_file_id}
        return [
            files.get(self._app.db, file_id, tenant_id=self._batch.tenant_id).blob_key
            for kind in self._kinds
            if (file_id := ids[kind]) is not None
        ]

    def _copy_files(self, keys: list[str]) -> Generator[bytes, None, None]:
        for key in keys:
            with self._app.blobs.open_reader(key) as reader:
                while piece := reader.read(_PIECE_BYTES):
                    yield piece

    def _read_files(self, keys: list[str]) -> Generator[bytes, None, None]:
        given = np.sort(np.frombuffer(bytes(self._given), dtype=np.uint64))
        self._given = bytearray()
        for key in keys:
            scanned = scan(self._app.blobs, key, max_line_bytes=_MAX_LINE_BYTES)
            while some := list(islice(scanned, _LINES_AT_ONCE)):
                lines = [line for _, _, _, line in some if line is not None]
                digests = _digest(lines)
                places = np.minimum(np.searchsorted(given, digests), len(given) - 1)
                is_new = given[places] != digests
                new = [line for line, wanted in zip(lines, is_new, strict=True) if wanted]
                if new:
                    yield b"\n".join([*new, b""])


def _digest(lines: list[bytes]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.array([xxhash.xxh3_64_intdigest(line) for line in lines], dtype=np.uint64)


async def follow_lines(
    context: Context, lines: ResultLines, pieces: Generator[bytes, None, None], *, follow: bool
) -> AsyncIterator[bytes]:
    """Yield `pieces`, then, when following, what comes until the batch has ended.

    Raises:
        ServerStopping: the server goes down first.
    """
    last_at = time.monotonic()
    with _told_of(context, lines.batch_id) as told:
        try:
            while True:
                told.clear()
                looked_at = time.monotonic()
                while (piece := await context.run(next, pieces, None)) is not None:
                    yield piece
                    last_at = time.monotonic()
                if lines.is_complete or not follow:
                    return
                if last_at + HEARTBEAT_SECONDS < time.monotonic():
                    yield b"\n"
                    last_at = time.monotonic()
                # A batch of so many shards that looking takes long is looked at less often.
                await _sleep(context, max(MIN_LOOK_SECONDS, 10 * (time.monotonic() - looked_at)))
                await _sleep(context, POLL_SECONDS, told=told)
                pieces = await context.run(lines.look)
        finally:
            pieces.close()


@contextmanager
def _told_of(context: Context, batch_id: BatchId) -> Iterator[asyncio.Event]:
    """Yield an event of this loop that is set when somebody says that a batch has moved on."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(other: BatchId) -> None:
        if other == batch_id:
            with suppress(RuntimeError):  # the loop has just ended
                loop.call_soon_threadsafe(told.set)

    with context.app.doorbell.listening(Hint.PROGRESS, tell):
        yield told


async def _sleep(context: Context, seconds: float, *, told: asyncio.Event | None = None) -> None:
    """Wait, or until told.

    Raises:
        ServerStopping: the server goes down first.
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not (told is not None and told.is_set()):
        if context.stopping.is_set():
            raise ServerStopping("The server is going down; connect again later.")
        with anyio.move_on_after(min(left, POLL_SECONDS)):
            await (anyio.sleep_forever() if told is None else told.wait())
