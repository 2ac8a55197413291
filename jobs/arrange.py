"""Writes the lines of a batch in the order in which they will run, where that is another one."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jobs.domain.batch import Batch
from jobs.domain.ids import BatchId
from jobs.domain.mixed import endpoint_of
from jobs.domain.plan import RunOrder
from jobs.domain.request import custom_id_of, parse_line
from jobs.domain.responses import RESPONSES
from jobs.domain.result import Result, render_result
from jobs.domain.shard import Cut, Cutter, Lease
from jobs.reuse import Found
from jobs.telemetry import log
from storage.batches import Reused
from storage.blobs.base import BlobStore, plan_key, reused_key
from storage.jsonl import (
    KIND_OUTPUT,
    Entry,
    Follower,
    ScannedLine,
    encode_run_head,
    encode_segment,
)
from storage.reorder import Ranked, Reorder

_PROGRESS_LINES = 1000
_WRITE_BYTES = 1 << 20
_LEADER, _FOLLOWER, _RESULT = 0, 1, 2
_KIND_BITS = 2
"""Of a tag, behind the index of the line."""


class Arranging:
    """Writes the lines of a file as they will run, each with those it runs for.

    Behind them come the lines that need not run, and their results go where a worker's would.
    """

    def __init__(
        self,
        blobs: BlobStore,
        batch: Batch,
        lease: Lease,
        *,
        cutter: Cutter,
        model: str,
        starts: Sequence[int],
    ) -> None:
        """Prepare to write a batch.

        Args:
            cutter: what cuts the lines into shards.
            model: what they run on; empty: several.
            starts: the place at which each model begins.
        """
        self._blobs = blobs
        self._batch = batch
        self._lease = lease
        self._cutter = cutter
        self._model = model
        self._starts = starts
        self._cuts: list[Cut] = []
        self._reused: list[Reused] = []
        self._results: list[Entry] = []

    def write(
        self,
        scanned: Iterator[ScannedLine],
        *,
        run_order: RunOrder,
        num_bytes: int,
        found: Found | None,
        on_progress: Callable[[int], None] | None,
    ) -> tuple[list[Cut], list[Reused]]:
        """Return the shards that run, and those whose results are there.

        Raises:
            StorageError: the input cannot be read, a blob not written, or there is no room to sort.
        """
        if found is not None:
            num_bytes += found.num_bytes
        with Reorder(num_ranks=run_order.num_leaders, num_bytes=num_bytes) as reorder:
            self._sort(scanned, reorder, run_order, found, on_progress)
            self._write_sorted(reorder, run_order, on_progress)
        log.info(
            "run_order_written",
            batch_id=self._batch.id,
            num_lines=len(run_order.rank) if run_order.rank is not None else 0,
            num_run=run_order.num_leaders - run_order.num_reused,
            num_groups=run_order.num_groups,
            shared_percent=round(100 * run_order.shared, 1),
        )
        return self._cuts, self._reused

    def _sort(
        self,
        scanned: Iterator[ScannedLine],
        reorder: Reorder,
        run_order: RunOrder,
        found: Found | None,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        ranks = run_order.rank.data if run_order.rank is not None else memoryview(b"")
        follows = None if run_order.is_follower is None else run_order.is_follower.data
        answers = found.read() if found is not None else iter(())
        answer = next(answers, None)
        for index, (_, _, _, line) in enumerate(scanned):
            content = line or b""
            rank, tag = ranks[index], index << _KIND_BITS
            if follows is not None and follows[index]:
                reorder.add(rank, tag | _FOLLOWER, custom_id_of(content).encode())
            else:
                reorder.add(rank, tag | _LEADER, content)
            if answer is not None and answer[0] == index:
                result = self._render(content, index, answer[1], answer[2])
                reorder.add(rank, tag | _RESULT, result)
                answer = next(answers, None)
            if on_progress is not None and index % _PROGRESS_LINES == 0:
                on_progress(index)

    def _render(self, content: bytes, index: int, batch_id: BatchId, result: Result) -> bytes:
        endpoint, request = endpoint_of(content, self._batch.endpoint), None
        if endpoint == RESPONSES:
            request = parse_line(content, endpoint=endpoint).to_request(0)
        return render_result(
            result,
            custom_id=custom_id_of(content),
            request_id=f"{self._batch.id[6:]}{index:08x}",
            endpoint=endpoint,
            model=self._model,
            created=int(time.time()),
            reused_from=batch_id,
            request=request,
        )

    def _write_sorted(
        self,
        reorder: Reorder,
        run_order: RunOrder,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        cutter = self._cutter
        borders = {*self._starts, run_order.num_leaders - run_order.num_reused}
        with self._blobs.open_writer(plan_key(self._batch.id, self._lease.epoch)) as writer:
            at = num_held = 0
            held: list[bytes] = []
            for rank, line in enumerate(_run_lines(reorder.read())):
                head = encode_run_head(line.place, line.followers)
                num_bytes = len(head) + len(line.content) + 1
                held += (head, line.content, b"\n")
                num_held += num_bytes
                if num_held >= _WRITE_BYTES:
                    writer.write(b"".join(held))
                    held.clear()
                    num_held = 0
                if rank in borders:
                    self._end_shard(cutter.finish())
                self._end_shard(
                    cutter.add(index=rank, line=rank + 1, byte_start=at, num_bytes=num_bytes)
                )
                self._results += [(line.place, KIND_OUTPUT, one) for one in line.results]
                at += num_bytes
                if on_progress is not None and rank % _PROGRESS_LINES == 0:
                    on_progress(rank)
            writer.write(b"".join(held))
            writer.commit()
        self._end_shard(cutter.finish())

    def _end_shard(self, cut: Cut | None) -> None:
        """Note a shard that has all its lines, and write the results that these have."""
        if cut is None:
            return
        if not self._results:
            self._cuts.append(cut)
            return
        key = reused_key(self._batch.id, self._lease.epoch, len(self._reused))
        blob = self._blobs.put(key, encode_segment(self._results))
        self._reused.append(Reused(cut, blob))
        self._results = []


class _RunLine(NamedTuple):
    """A line that runs, with those it runs for, or with the result that it has already.

    `place` is its index in the file.
    """

    place: int
    content: bytes
    followers: list[Follower]
    results: list[bytes]


def _run_lines(entries: Iterator[Ranked]) -> Iterator[_RunLine]:
    """Yield the lines of a run order; the leader is the first of its rank, as in the file."""
    last: _RunLine | None = None
    for _, tag, content in entries:
        index, kind = tag >> _KIND_BITS, tag & ((1 << _KIND_BITS) - 1)
        if kind == _LEADER:
            if last is not None:
                yield last
            last = _RunLine(index, content, [], [])
        elif last is not None and kind == _FOLLOWER:
            last.followers.append((index, content.decode()))
        elif last is not None:
            last.results.append(content)
    if last is not None:
        yield last
