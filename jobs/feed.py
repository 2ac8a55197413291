"""The lazy stream of requests across leased shards, and the way back for their results.

    reader thread:  claim shard ─► read lines ─► queue ──take()──► engine
    writer thread:  database ◄── segment blob ◄── buffers ◄──append()── engine

The reader keeps two to three times the engine's slots waiting, here or with the engine, across the
borders of shards and batches, so the engine never drains at one. After an engine death the
requests it held are suspects: the others run first, then the suspects in halves, one half per
engine life, until a line that kills the engine alone is found. Where workers died, each group is
noted in the database before it runs (see domain.suspects).

Source: transitions T3, T4, T6 and T7 of the unit protocol (see DECISIONS.md).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from jobs import metrics
from jobs.domain.batch import Batch
from jobs.domain.errors import BatchctlError, LeaseLost, StorageError
from jobs.domain.ids import BatchId, UnitId, WorkerId
from jobs.domain.request import Request
from jobs.domain.result import LineError, Result
from jobs.domain.retry import Settlement
from jobs.domain.shard import (
    Fault,
    Lease,
    Shard,
    UnitKind,
    UnitState,
    bitmap,
    merge_bitmaps,
)
from jobs.domain.suspects import (
    CAREFUL_STALLS,
    halve,
    is_guilty,
    list_suspects,
)
from jobs.leases import LeaseKeeper
from jobs.open_shards import (
    Buffer,
    Held,
    OpenShard,
    crash_error,
    fill,
    read_line,
    settle_deaths,
    write_segment,
)
from jobs.telemetry import log
from jobs.wakeups import Doorbell, Hint
from storage import batches, shards, units
from storage.blobs.base import BlobStore
from storage.database import Database
from storage.jsonl import RequestLine, read_requests

READ_CHUNK_LINES = 64
_TICK_SECONDS = 0.05
_JOIN_SECONDS = 30.0
_READ_CHUNK_BYTES = 8 << 20
_MAX_QUEUED_BYTES = 64 << 20
_MAX_BUFFERED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedSettings:
    """When results are made durable, and how eagerly work is looked for."""

    flush_results: int = 256
    flush_bytes: int = 8 << 20
    flush_seconds: float = 1.0
    look_ahead: float = 3.0
    poll_seconds: float = 0.5
    lease_seconds: float = 60.0
    write_patience_seconds: float = 60.0


class Feed:
    """A `Source` for one engine over all shards of some models; use as a context manager."""

    def __init__(
        self,
        db: Database,
        blobs: BlobStore,
        *,
        keeper: LeaseKeeper,
        doorbell: Doorbell,
        worker_id: WorkerId,
        boot_id: str,
        model_keys: Sequence[str],
        num_slots: int,
        progress: Callable[[], object],
        settings: FeedSettings,
        may_claim: Callable[[], bool] = lambda: True,
        identity: Callable[[], str] = lambda: "",
    ) -> None:
        """Prepare to feed an engine of `num_slots` with shards of `model_keys`.

        Args:
            progress: something that changes while the engine works; see LeaseKeeper.hold.
            identity: whose answers they are; another life of the engine may be another model.
            may_claim: asked before every claim; False lets the feed come to its end.
        """
        self._may_claim = may_claim
        self._identity = identity
        self._db = db
        self._blobs = blobs
        self._keeper = keeper
        self._doorbell = doorbell
        self._worker_id = worker_id
        self._boot_id = boot_id
        self._model_keys = tuple(model_keys)
        self._num_slots = num_slots
        self._target = max(READ_CHUNK_LINES, int(settings.look_ahead * num_slots))
        self._is_filling = True
        self._reader_waits = False
        self._progress = progress
        self._settings = settings
        self._lock = threading.Condition()
        self._queue: deque[Held] = deque()
        self._groups: deque[list[Held]] = deque()
        self._group: list[Held] | None = None
        self._untried: list[Held] | None = None
        self._alibis: dict[tuple[UnitId, int], int] = {}
        self._in_flight: dict[int, Held] = {}
        self._open: dict[UnitId, OpenShard] = {}
        self._batches: dict[BatchId, Batch] = {}
        self._next_id = 0
        self._num_results = 0
        self._buffered_bytes = 0
        self._dry = False
        self._stopping = False
        self._closed = False
        self._failure: Exception | None = None
        self._reader = self._thread(self._read, "feed-read")
        self._writer = self._thread(self._write, "feed-write")

    def __enter__(self) -> Self:
        """Start reading ahead and writing behind."""
        self._reader.start()
        self._writer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush what is finished, give back what is not, then stop renewing.

        Raises:
            StorageError: finished results could not be written.
        """
        self.stop()
        self._reader.join(timeout=_JOIN_SECONDS)
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._writer.join(timeout=self._settings.write_patience_seconds + 10)
        for shard in list(self._open.values()):
            self._leave(shard, shard.stopped)
        if kind is None:
            self._raise_failure()

    # --- what the engine sees ---

    def take(self, n: int) -> Sequence[Request] | None:
        """Return up to `n` requests, none yet, or None when there is nothing left to claim."""
        with self._lock:
            self._raise_failure()
            if self._stopping:
                return None
            if not self._queue and not self._in_flight and self._untried is None:
                if self._group is not None:
                    self._group = None  # it came through, or its shards were stopped
                    self._dry = bool(self._groups)  # behind the last one there may be more
                if self._dry and self._groups:
                    self._begin_group()
            taken: list[Request] = []
            while self._queue and len(taken) < n:
                held = self._queue.popleft()
                if held.shard.lost or held.shard.stopped:
                    continue
                self._in_flight[held.request.id] = held
                taken.append(held.request)
            if taken:
                self._wake_reader()
            elif self._dry and not (
                self._in_flight or self._queue or self._groups or self._untried
            ):
                return None
            return taken

    def is_aborted(self, request_id: int) -> bool:
        """Return whether nobody waits for this request any more."""
        return request_id not in self._in_flight

    # --- what the runner calls ---

    def append(self, result: Result) -> None:
        """Keep a result; it becomes durable when its shard's buffer is flushed.

        Raises:
            StorageError: results have not been written for too long.
        """
        with self._lock:
            self._raise_failure()
            held = self._in_flight.pop(result.id, None)
            if held is None:
                return
            self._num_results += 1
            self._keep(held, result)
            self._wake_reader()
            while self._buffered_bytes > _MAX_BUFFERED_BYTES and not self._failure:
                self._lock.wait(_TICK_SECONDS)

    def note_death(self, suspects: frozenset[int]) -> int | None:
        """Take back what a dead engine held; return the request that is convicted by that, if any.

        Args:
            suspects: the request ids that it had started.
        """
        with self._lock:
            held = list(self._in_flight.values())
            self._in_flight.clear()
            accused = [h for h in held if h.request.id in suspects]
            accused_ids = {h.request.id for h in accused}
            spared = [h for h in held if h.request.id not in accused_ids]
            if self._group is not None:
                spared += self._untried or self._queue
                self._queue.clear()
                self._untried = self._group = None
                if spared:
                    self._groups.append(spared)
            else:
                self._queue.extendleft(reversed(spared))
            if len(accused) > 1:
                self._groups.extendleft(list(half) for half in reversed(halve(accused)))
            else:
                self._groups.extend([one] for one in accused)
            self._dry = False  # the reader looks again, behind the suspects
            touched = {h.shard.lease.unit_id: h.shard for h in accused}
        solo = accused[0] if len(accused) == 1 else None
        for shard in touched.values():
            fault = self._report_suspects(shard, solo)
            if solo is not None and fault is not None and self._convict(solo, fault):
                return solo.request.id
        return None

    @property
    def num_results(self) -> int:
        """How many results have come back."""
        return self._num_results

    def stop(self) -> None:
        """Stop taking work and drop what is in flight; finished results are still flushed."""
        with self._lock:
            self._stopping = True
            self._in_flight.clear()
            self._queue.clear()
            self._untried = None
            self._lock.notify_all()

    # --- suspects ---

    def _convict(self, held: Held, fault: Fault) -> bool:
        """Give a line that killed the engine alone its error, if it is guilty beyond doubt.

        An engine that has brought no result since it first killed one is itself in doubt, unless
        there is nothing else that could have brought one.
        """
        with self._lock:
            alibi = self._alibis.setdefault(
                (held.shard.lease.unit_id, held.position), self._num_results
            )
            works = self._num_results > alibi or len(fault.places) > 1
            is_last = all(group == [held] for group in self._groups) and not self._queue
            if not is_guilty(fault) or not (works or is_last) or [held] not in self._groups:
                return False
            self._groups.remove([held])
            self._dry = False  # the reader may have waited for it
            self._keep(held, Result(id=held.request.id, error=crash_error(fault, "engine")))
            return True

    def _begin_group(self) -> None:
        group = [h for h in self._groups.popleft() if not (h.shard.lost or h.shard.stopped)]
        self._group = group
        if any(h.shard.is_careful or h.unfilled is not None for h in group):
            self._untried = group  # the reader notes it first, and reads its pictures
        else:
            self._queue.extend(group)

    def _try_group(self, group: list[Held]) -> None:
        """Let a group run once its pictures are read and it is written down what runs."""
        refused: list[tuple[Held, LineError]] = []
        for held in group:
            try:
                error = fill(self._db, self._blobs, held)
            except StorageError as failure:
                if failure.retryable:
                    raise
                self._give_up(held.shard, failure)
                continue
            if error is not None:
                refused.append((held, error))
        runs = [h for h in group if h.unfilled is None]
        is_noted = any(h.shard.is_careful for h in runs)
        for shard in {h.shard.lease.unit_id: h.shard for h in runs if is_noted}.values():
            positions = [h.position for h in runs if h.shard is shard]
            try:
                shards.begin_trial(self._db, shard.lease, positions=positions)
            except LeaseLost:
                self._lose(shard)
        with self._lock:
            if self._untried is group:
                self._untried = None
                self._queue.extend(runs)
                for held, error in refused:
                    self._keep(held, Result(id=held.request.id, error=error))

    def _report_suspects(self, shard: OpenShard, solo: Held | None) -> Fault | None:
        with self._lock:
            # Those of a shard that is still being read are suspects as well.
            groups = [
                tuple(h.position for h in group if h.shard is shard)
                for group in (*self._groups, *shard.groups.values())
            ]
        position = solo.position if solo is not None else None
        num_crashes = 1 if position is None else shard.crashes.get(position, 0) + 1
        if position is not None:
            shard.crashes[position] = num_crashes
        try:
            return shards.report_death(
                self._db,
                shard.lease,
                suspects=[group for group in groups if group],
                solo_crash=position,
                num_crashes=num_crashes,
            )
        except LeaseLost:
            self._lose(shard)
            return None

    # --- results ---

    def _keep(self, held: Held, result: Result) -> None:
        shard = held.shard
        if shard.lost:
            return
        self._buffered_bytes += shard.keep(held, result, self._identity)
        if not shard.num_left or len(shard.buffer.entries) >= self._settings.flush_results:
            self._lock.notify_all()

    def _write(self) -> None:
        failing_since: float | None = None
        while True:
            with self._lock:
                due = [shard for shard in self._open.values() if self._is_due(shard)]
                if not due:
                    if self._closed:
                        return
                    self._lock.wait(_TICK_SECONDS)
                    continue
            for shard in due:
                try:
                    self._flush(shard)
                    failing_since = None
                except LeaseLost:
                    self._lose(shard)
                except StorageError as error:
                    failing_since = self._note_failure(error, since=failing_since)
                if shard.stopped and not (shard.buffer.entries or shard.writing):
                    self._leave(shard, shard.stopped)
            if self._closed and self._failure is not None and failing_since is not None:
                return  # each was tried once more

    def _is_due(self, shard: OpenShard) -> bool:
        buffer = shard.buffer
        if shard.writing is not None:
            return True  # an earlier try failed
        if not buffer.entries:
            return shard.stopped is not None
        settings = self._settings
        return (
            self._closed
            or not shard.num_left
            or shard.stopped is not None
            or len(buffer.entries) >= settings.flush_results
            or buffer.num_bytes >= settings.flush_bytes
            or time.monotonic() - buffer.oldest_at >= settings.flush_seconds
        )

    def _flush(self, shard: OpenShard) -> None:
        with self._lock:
            if shard.writing is None:
                if not shard.buffer.entries:
                    return
                shard.writing, shard.buffer = shard.buffer, Buffer()
            writing = shard.writing
        lease = shard.lease
        done = write_segment(
            self._db, self._blobs, shard, writing, lease_seconds=self._settings.lease_seconds
        )
        with self._lock:
            if not shard.lost:  # else its bytes have been counted out
                shard.writing = None
                shard.sequence += 1
                self._buffered_bytes -= writing.num_bytes
            self._lock.notify_all()
        self._doorbell.hint(Hint.PROGRESS, lease.batch_id)
        if done:
            self._count(shard, "done")
            self._keeper.drop(lease)
            with self._lock:
                self._take_out(shard)
            self._doorbell.announce()

    # --- what goes wrong in a thread ---

    def _thread(self, loop: Callable[[], None], name: str) -> threading.Thread:
        def run() -> None:
            try:
                loop()
            except Exception as error:  # noqa: BLE001  surfaces where the engine takes
                log.exception("feed_failed", thread=name)
                self._fail(error)

        return threading.Thread(target=run, name=name, daemon=True)

    def _note_failure(self, error: StorageError, *, since: float | None) -> float:
        """Return since when it fails; end the feed when that is too long, or will not pass."""
        now = time.monotonic()
        since = now if since is None else since
        metrics.count_storage_failure(error.code)
        log.warning("storage_failed", code=error.code, error=error.message)
        if not error.retryable or now - since > self._settings.write_patience_seconds:
            self._fail(error)
        time.sleep(_TICK_SECONDS * 4)
        return since

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._lock.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # --- shards ---

    def _read(self) -> None:
        current: OpenShard | None = None
        failing_since: float | None = None
        while not self._stopping:
            untried = self._untried
            if untried is None and self._must_wait(is_between_shards=current is None):
                continue
            try:
                if untried is not None:
                    self._try_group(untried)
                    continue
                rings = self._doorbell.wait(0)
                if current is None and self._may_claim():
                    current = self._claim()
                if current is None:
                    with self._lock:
                        self._dry = True
                    self._doorbell.wait(self._settings.poll_seconds, seen=rings)
                    continue
                if not self._read_some(current):
                    current = None
                failing_since = None
            except StorageError as error:
                if untried is None and current is not None and not error.retryable:
                    self._give_up(current, error)
                    current = None
                    continue
                failing_since = self._note_failure(error, since=failing_since)
                if current is not None:
                    current.lines = self._open_lines(current.shard, current.num_read)

    def _must_wait(self, *, is_between_shards: bool) -> bool:
        """Wait a moment and return True while there is no room, or suspects have their turn."""
        with self._lock:
            # Suspects wait until everything else that is held has run, and run by themselves.
            has_suspects = bool(self._groups) or self._group is not None
            if is_between_shards and has_suspects:
                self._dry = True
            elif self._has_room():
                return False
            self._reader_waits = True
            self._lock.wait(_TICK_SECONDS)
            self._reader_waits = False
            return True

    def _has_room(self) -> bool:
        """Return whether to read on: up to the target, and then not before a third of it is used.

        What the engine holds beyond its slots waits as much as what is queued here.
        """
        num_ahead = len(self._queue) + max(0, len(self._in_flight) - self._num_slots)
        self._is_filling = num_ahead < (
            self._target if self._is_filling else self._target - self._target // 3
        )
        return self._is_filling and sum(h.num_bytes for h in self._queue) < _MAX_QUEUED_BYTES

    def _wake_reader(self) -> None:
        """Let the reader go on where it waits for room, and there is some."""
        if self._reader_waits and self._has_room():
            self._reader_waits = False
            self._lock.notify_all()

    def _claim(self) -> OpenShard | None:
        lease = units.claim(
            self._db,
            worker_id=self._worker_id,
            boot_id=self._boot_id,
            kinds=(UnitKind.SHARD,),
            model_keys=self._model_keys,
            lease_seconds=self._settings.lease_seconds,
        )
        if lease is None:
            return None
        try:
            shard = shards.get(self._db, lease.unit_id)
            batch = self._get_batch(lease.batch_id)
            is_careful = shard.trial is not None or lease.num_stalls >= CAREFUL_STALLS
            groups, guilty = (
                settle_deaths(self._db, lease, shard) if is_careful else (list_suspects(shard), {})
            )
        except LeaseLost:
            return None
        except BatchctlError:
            self._release(lease)
            raise
        num_done = sum(byte.bit_count() for byte in shard.done)
        opened = OpenShard(
            lease=lease,
            shard=shard,
            batch=batch,
            lines=self._open_lines(shard, 0),
            num_left=shard.num_lines - num_done,
            group_of={p: number for number, group in enumerate(groups) for p in group},
            guilty=guilty,
            is_careful=is_careful,
            crashes={fault.position: fault.solo_crashes for fault in shard.faults},
        )
        with self._lock:
            is_late = self._closed  # the claim took longer than the feed's end waited for it
            if not is_late:
                self._dry = False
                self._open[lease.unit_id] = opened
        if is_late:
            self._release(lease)
            return None
        self._keeper.hold(
            lease,
            progress=lambda: (self._progress(), self._num_results),
            on_lost=lambda _: self._lose(opened),
            on_stopping=self._stop_shard,
        )
        return opened

    def _release(self, lease: Lease) -> None:
        """Give back what nobody would renew; where that fails too, it is reaped."""
        with suppress(LeaseLost, StorageError):
            released = Settlement(state=UnitState.PENDING, exit="released")
            units.settle(self._db, lease, released)

    def _get_batch(self, batch_id: BatchId) -> Batch:
        batch = self._batches.get(batch_id)
        if batch is None:
            if len(self._batches) > 100:  # noqa: PLR2004 - a small cache
                self._batches.clear()
            batch = self._batches[batch_id] = batches.get(self._db, batch_id, tenant_id=None)
        return batch

    def _open_lines(self, shard: Shard, num_read: int) -> Iterator[RequestLine]:
        read = bitmap(list(range(num_read)), shard.num_lines)
        skip = merge_bitmaps(shard.done, read)
        return read_requests(self._blobs, shard, skip=skip)

    def _read_some(self, shard: OpenShard) -> bool:
        """Queue the next lines of a shard; return whether there may be more."""
        read: list[Held] = []
        suspects: list[tuple[int, Held]] = []
        refused: list[tuple[Held, LineError]] = []
        more = False
        position = -1
        num_bytes = 0
        for line in shard.lines:
            position = line[0]
            self._next_id += 1
            held, refusal = read_line(self._db, self._blobs, shard, line, self._next_id)
            num_bytes += held.num_bytes
            if refusal is not None:
                refused.append((held, refusal))
                continue
            group = shard.group_of.get(position)
            if group is None:
                read.append(held)
            else:
                suspects.append((group, held))
            more = len(read) >= READ_CHUNK_LINES or num_bytes >= _READ_CHUNK_BYTES
            if more:
                break
        with self._lock:
            for held, refusal in refused:
                self._keep(held, Result(id=held.request.id, error=refusal))
            self._queue.extend(read)
            shard.num_read = max(shard.num_read, position + 1)
            for group, held in suspects:
                shard.groups.setdefault(group, []).append(held)
            if not more:
                # A group has lines from anywhere in the shard.
                self._groups.extend(shard.groups[group] for group in sorted(shard.groups))
                shard.groups.clear()
            return more and not (shard.lost or shard.stopped)

    def _give_up(self, shard: OpenShard, error: StorageError) -> None:
        """End a shard whose lines cannot be read, now or ever; the others go on."""
        log.error("shard_failed", unit_id=shard.lease.unit_id, code=error.code, error=error.message)
        shard.exit = f"{error.code}: {error.message}"
        self._stop_shard(shard.lease.unit_id, UnitState.FAILED)

    def _stop_shard(self, unit_id: UnitId, state: UnitState) -> None:
        with self._lock:
            shard = self._open.get(unit_id)
            if shard is None:
                return
            shard.stopped = state
            self._drop_requests(shard)

    def _lose(self, shard: OpenShard) -> None:
        self._keeper.drop(shard.lease)
        with self._lock:
            if not self._take_out(shard):
                return
            shard.lost = True
            self._count(shard, "lost")
            self._buffered_bytes -= shard.buffer.num_bytes
            self._buffered_bytes -= shard.writing.num_bytes if shard.writing else 0
            self._drop_requests(shard)

    def _take_out(self, shard: OpenShard) -> bool:
        """Take a shard out of those that are open; False where it is none of them any more.

        Its unit may be open again by then, under a later lease.
        """
        is_open = self._open.get(shard.lease.unit_id) is shard
        if is_open:
            del self._open[shard.lease.unit_id]
        return is_open

    def _count(self, shard: OpenShard, outcome: str) -> None:
        metrics.count_unit(
            UnitKind.SHARD,
            shard.lease.model_key,
            outcome=outcome,
            seconds=time.monotonic() - shard.opened_at,
        )

    def _drop_requests(self, shard: OpenShard) -> None:
        for request_id in [i for i, held in self._in_flight.items() if held.shard is shard]:
            del self._in_flight[request_id]
        self._lock.notify_all()

    def _leave(self, shard: OpenShard, state: UnitState | None) -> None:
        """Settle a shard that is not finished: stopped with its batch, or given back."""
        self._keeper.drop(shard.lease)
        with self._lock:
            if not self._take_out(shard):
                return
        self._count(shard, str(state or "released"))
        settlement = Settlement(
            state=state or UnitState.PENDING, exit=shard.exit or str(state or "released")
        )
        try:
            units.settle(self._db, shard.lease, settlement)
        except LeaseLost:
            pass
        except StorageError as error:
            log.warning("unit_not_settled", unit_id=shard.lease.unit_id, code=error.code)
        self._doorbell.announce()
