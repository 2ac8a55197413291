"""Proves that a batch is what its rows say: every line once, counts as recounted, bytes as hashed.

Reads rows and blobs and changes nothing. An unfinished batch is held against its segments, a
finished one against its published files too. Memory does not grow with the batch, unless
something is wrong: then eight bytes for each line say what exactly.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256

import msgspec
import numpy as np
import xxhash

from jobs.audit_lines import Head, Line, Lines, Recount, decode_line
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import BlobCorrupt, BlobMissing
from jobs.domain.ids import BatchId
from jobs.domain.request import custom_id_of
from jobs.domain.result import Usage
from jobs.domain.shard import (
    Segment,
    UnitState,
    bitmap,
    bitmaps_overlap,
    count_bits,
    merge_bitmaps,
)
from storage import audits, batches, files
from storage.audits import ShardRows
from storage.blobs.base import BlobStore, hash_bytes, segments_prefix
from storage.database import Database
from storage.files import File
from storage.jsonl import (
    KIND_ERROR,
    UNLIMITED,
    Entry,
    decode_segment,
    read_requests,
    scan,
)

_PIECE_BYTES = 1 << 20
_NOTED_LINES = 1000
_MAX_TOLD = 3
_MAX_READS = 5
"""How often a shard is read again that changes meanwhile."""

_WHAT = {
    "input": "the input's bytes are those that were uploaded",
    "shards": "shards cover every line of the input once",
    "segments": "segments have the bytes and lines that were recorded",
    "files": "published files have the bytes that were recorded",
    "complete": "every line that is done has its record",
    "unique": "no line has two records",
    "order": "custom_ids are those of the input, in its order",
    "counts": "counts and usage equal a recount",
    "leases": "no lease is past its expiry, no unit outlives its batch",
}


@dataclass(slots=True, kw_only=True)
class Check:
    """One thing that was to be proved.

    Attributes:
        num_checked: how many shards, segments, files, lines or units were looked at.
        num_problems: how many of them are not as they should be.
        told: the first few problems: ids, keys and numbers, never what is in a line.
        skipped: why it could not be proved, or need not be.
    """

    name: str
    num_checked: int = 0
    num_problems: int = 0
    told: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def what(self) -> str:
        """What is proved."""
        return _WHAT[self.name]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.num_problems

    def note(self, problem: str, number: int = 1) -> None:
        """Add a problem, or a number of the same."""
        self.num_problems += number
        if len(self.told) < _MAX_TOLD:
            self.told.append(problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an audit found."""

    batch_id: BatchId
    status: BatchStatus
    num_lines: int
    checks: tuple[Check, ...]

    @property
    def violated(self) -> tuple[str, ...]:
        """The names of the checks that the batch does not pass."""
        return tuple(check.name for check in self.checks if not check.ok)


def audit(
    db: Database,
    blobs: BlobStore,
    batch_id: BatchId,
    *,
    grace_seconds: float | None = 60.0,
    on_progress: Callable[[int], None] | None = None,
) -> Report:
    """Return what holds of a batch and what does not.

    Args:
        grace_seconds: how long past its expiry a lease may be: somebody has to come and reap it.
            None: as long as it likes, where nobody works.
        on_progress: called with the number of lines looked at, now and then.

    Raises:
        NotFound: there is no such batch.
        StorageError: rows or blobs could not be read.
    """
    batch = batches.get(db, batch_id)
    checking = _Audit(db, blobs, batch, on_progress=on_progress)
    checking.check_input()
    checking.check_shards()
    checking.check_files()
    checking.check_leases(grace_seconds)
    return Report(
        batch_id=batch.id,
        status=batch.status,
        num_lines=batch.request_counts.total,
        checks=tuple(checking.checks.values()),
    )


class _Changed(Exception):
    """A segment was taken out after its shard was read."""


class _Audit:
    def __init__(
        self,
        db: Database,
        blobs: BlobStore,
        batch: Batch,
        *,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._db = db
        self._blobs = blobs
        self._batch = batch
        self._on_progress = on_progress
        self._num_lines = 0
        self._input = files.peek(db, batch.input_file_id)
        self._has_input = False
        self._usage = Usage()
        self._covered: bytearray | None = None
        self.checks = {name: Check(name=name) for name in _WHAT}

    # --- the input ---

    def check_input(self) -> None:
        """Hash the uploaded file; what depends on it is skipped where it is gone."""
        check, file = self.checks["input"], self._input
        if file.deleted_at is not None:
            check.skipped = "the file was deleted"
            self._has_input = self._blobs.exists(file.blob_key)
            return
        self._has_input = self._check_blob(check, file)

    def _check_blob(self, check: Check, file: File) -> bool:
        """Return whether the bytes of a file are there as its row says, after noting if not."""
        check.num_checked += 1
        digest, num_bytes = sha256(), 0
        try:
            with self._blobs.open_reader(file.blob_key) as reader:
                while piece := reader.read(_PIECE_BYTES):
                    digest.update(piece)
                    num_bytes += len(piece)
                    self._progress()
        except BlobMissing:
            check.note(f"{file.blob_key} is gone")
            return False
        except BlobCorrupt:
            check.note(f"{file.blob_key} is damaged in the store")
            return False
        if (digest.hexdigest(), num_bytes) != (file.sha256, file.num_bytes):
            check.note(f"{file.blob_key} is not what was written")
            return False
        return True

    # --- shards and segments ---

    def check_shards(self) -> None:
        """Hold each shard against its segments."""
        batch, check = self._batch, self.checks["shards"]
        if batch.planned_at is None:
            check.skipped = f"the batch is {batch.status} and was never cut into shards"
            self.checks["segments"].skipped = check.skipped
            return
        has_segments = self._has_segments()
        if not has_segments:
            self.checks["segments"].skipped = "removed after the end; the files have their lines"
        ordinal, next_index, num_lines = 0, 0, 0
        while (rows := self._check_shard(ordinal, has_segments=has_segments)) is not None:
            shard = rows.shard
            check.num_checked += 1
            if shard.first_index != next_index or not shard.num_lines:
                check.note(f"shard {ordinal} begins at {shard.first_index}, not {next_index}")
            next_index = shard.first_index + shard.num_lines
            num_lines += self._cover(rows)
            ordinal += 1
            self._progress(shard.num_lines)
        if check.skipped is None and num_lines != batch.request_counts.total:
            check.note(f"shards have {num_lines} of {batch.request_counts.total} lines")
        if batch.status.is_terminal and batch.status is not BatchStatus.FAILED:
            self._expect("usage", batch.usage, self._usage)

    def _cover(self, rows: ShardRows) -> int:
        """Return how many lines of the input a shard answers for that no earlier one does."""
        shard = rows.shard
        if not shard.is_run_order:
            return shard.num_lines  # in order, so none is in two
        total = self._batch.request_counts.total
        if self._covered is None:
            self._covered = bytearray((total + 7) // 8)
        new = 0
        lines = self._lines_of(rows)
        for index in lines.indexes if lines is not None else ():
            if index >= total or self._covered[index >> 3] >> (index & 7) & 1:
                self.checks["shards"].note(f"shard {shard.ordinal}: request {index} is not its own")
                continue
            self._covered[index >> 3] |= 1 << (index & 7)
            new += 1
        return new

    def _lines_of(self, rows: ShardRows) -> Lines | None:
        """Return which lines a shard answers for; none where its run order cannot be read.

        None: that was removed with the segments, after the end of the batch.
        """
        shard = rows.shard
        if not shard.is_run_order:
            return Lines(shard, None)
        try:
            return Lines(shard, read_requests(self._blobs, shard))
        except (BlobMissing, BlobCorrupt) as error:
            if self.checks["segments"].skipped and isinstance(error, BlobMissing):
                self.checks["shards"].skipped = self.checks["segments"].skipped
                return None
            self.checks["shards"].note(f"{shard.blob_key} is gone or damaged")
            return Lines(shard, ())

    def _has_segments(self) -> bool:
        """Return whether segments are there still, as they are until some time after the end."""
        batch = self._batch
        if not batch.status.is_terminal or batch.status is BatchStatus.FAILED:
            return True
        if next(iter(self._blobs.list_keys(segments_prefix(batch.id))), None) is None:
            return False
        return any(rows.segments for rows in audits.iterate_shards(self._db, batch.id))

    def _check_shard(self, ordinal: int, *, has_segments: bool) -> ShardRows | None:
        for _ in range(_MAX_READS):
            rows = audits.get_shard(self._db, self._batch.id, ordinal)
            if rows is None:
                return None
            try:
                found = [self._load(segment) for segment in rows.segments] if has_segments else []
            except _Changed:
                continue
            lines = self._lines_of(rows)
            self._check_rows(rows, lines)
            if lines is not None and has_segments:
                self._check_results(rows, lines, found)
            return rows
        self.checks["segments"].note(f"shard {ordinal} changes all the time")
        return audits.get_shard(self._db, self._batch.id, ordinal)

    def _check_rows(self, rows: ShardRows, lines: Lines | None) -> None:
        """Hold the numbers of a shard's row against its own bitmap."""
        shard, name = rows.shard, f"shard {rows.shard.ordinal}"
        done = count_bits(shard.done)
        self._usage += rows.usage
        self._expect(f"{name}: done", rows.num_done, done)
        if lines is not None:
            recorded = rows.num_completed + rows.num_failed
            self._expect(f"{name}: completed and failed", recorded, lines.count(shard.done))
        if rows.state is UnitState.DONE and done < shard.num_lines:
            self.checks["complete"].note(
                f"{name} is done and {shard.num_lines - done} of its lines are not",
                shard.num_lines - done,
            )

    def _load(self, segment: Segment) -> bytes | None:
        """Return the bytes of a segment, or None where they are not what was written.

        Raises:
            _Changed: it is no segment of its shard any more.
        """
        try:
            content = self._blobs.get(segment.blob_key)
        except (BlobMissing, BlobCorrupt):
            content = b""
        self._progress()
        if hash_bytes(content) == segment.sha256 and len(content) == segment.num_bytes:
            return content
        if not audits.is_recorded(self._db, segment):
            raise _Changed
        return None

    def _check_results(self, rows: ShardRows, lines: Lines, contents: list[bytes | None]) -> None:
        """Hold a shard against the results in its segments."""
        shard, name = rows.shard, f"shard {rows.shard.ordinal}"
        done = bytes(len(shard.done))
        completed = failed = 0
        usage = Usage()
        ids: dict[int, str] = {}
        for segment, content in zip(rows.segments, contents, strict=True):
            self.checks["segments"].num_checked += 1
            if bitmaps_overlap(done, segment.positions):
                self.checks["unique"].note(
                    f"{segment.blob_key} has lines that another segment has",
                    count_bits(done)
                    + count_bits(segment.positions)
                    - count_bits(merge_bitmaps(done, segment.positions)),
                )
            done = merge_bitmaps(done, segment.positions)
            completed += segment.num_completed
            failed += segment.num_failed
            usage += segment.usage
            ids |= self._check_segment(rows, lines, segment, content)
        self.checks["unique"].num_checked += count_bits(done)
        self.checks["complete"].num_checked += count_bits(shard.done)
        if done != shard.done:
            lacking = int.from_bytes(shard.done, "little") & ~int.from_bytes(done, "little")
            if lacking:
                self.checks["complete"].note(
                    f"{name}: {lacking.bit_count()} lines are said to be done and in no segment",
                    lacking.bit_count(),
                )
            self.checks["counts"].note(f"{name}: its bitmap is not that of its segments")
        self._expect(f"{name}: completed", rows.num_completed, completed)
        self._expect(f"{name}: failed", rows.num_failed, failed)
        self._expect(f"{name}: usage", rows.usage, usage)
        if not self._batch.status.is_terminal:  # else its files say it
            self._check_ids(rows, ids)

    def _check_segment(
        self, rows: ShardRows, lines: Lines, segment: Segment, content: bytes | None
    ) -> dict[int, str]:
        """Hold a segment's row against its bytes; return the custom_ids by index."""
        check, shard = self.checks["segments"], rows.shard
        if content is None:
            check.note(f"{segment.blob_key} is gone or damaged")
            self.checks["complete"].note(
                f"{segment.blob_key} cannot be read", count_bits(segment.positions)
            )
            return {}
        entries: list[Entry] = decode_segment(content)
        indexes = [index for index, _, _ in entries]
        positions = {p for index in indexes if (p := lines.place_of(index)) is not None}
        if any(lines.place_of(index) is None for index in indexes):
            check.note(f"{segment.blob_key} has lines of another shard")
            return {}
        if len(set(indexes)) < len(indexes):
            self.checks["unique"].note(
                f"{segment.blob_key} has a line twice", len(indexes) - len(set(indexes))
            )
        found = bitmap(sorted(positions), shard.num_lines)
        if found != segment.positions.ljust(len(shard.done), b"\0"):
            check.note(f"{segment.blob_key} has other lines than its row says")
        elif lines.count(found) > len(set(indexes)):
            lacking = lines.count(found) - len(set(indexes))
            self.checks["complete"].note(
                f"{segment.blob_key} lacks lines that equal one of its own", lacking
            )
        num_failed = sum(kind == KIND_ERROR for _, kind, _ in entries)
        self._expect(f"{segment.blob_key}: failed", segment.num_failed, num_failed)
        self._expect(
            f"{segment.blob_key}: completed", segment.num_completed, len(entries) - num_failed
        )
        ids: dict[int, str] = {}
        recount = Recount()
        for index, _, data in entries:
            line = self._decode(check, segment.blob_key, data)
            if line is not None:
                ids[index] = line.custom_id
                recount.add(line)
        self._expect(
            f"{segment.blob_key}: usage",
            segment.usage,
            segment.usage if recount.agrees(segment.usage) else recount.usage,
        )
        return ids

    def _check_ids(self, rows: ShardRows, ids: dict[int, str]) -> None:
        """Hold the custom_ids of a shard's results against those of its lines."""
        check = self.checks["order"]
        if not ids:
            return
        if not self._has_input:
            check.skipped = "the input is gone"
            return
        try:
            for _, index, followers, content in read_requests(self._blobs, rows.shard):
                for number, custom_id in ((index, custom_id_of(content)), *followers):
                    if number in ids:
                        check.num_checked += 1
                        if ids[number] != custom_id:
                            check.note(f"the result of request {number} has another custom_id")
        except (BlobMissing, BlobCorrupt):
            check.note(f"shard {rows.shard.ordinal}: the input has other lines than it was cut for")

    def _decode(self, check: Check, key: str, data: bytes) -> Line | None:
        try:
            return decode_line(data)
        except msgspec.MsgspecError:
            check.note(f"{key} has a line that is no result")
            return None

    def _expect(self, name: str, told: object, found: object) -> None:
        check = self.checks["counts"]
        check.num_checked += 1
        if told != found:
            check.note(f"{name}: the row says {_shown(told)}, the recount {_shown(found)}")

    # --- the published files ---

    def check_files(self) -> None:
        """Hold the published files against their rows and, line by line, against the input."""
        batch = self._batch
        if not batch.status.is_terminal or batch.status is BatchStatus.FAILED:
            self.checks["files"].skipped = f"the batch is {batch.status} and has none"
            return
        if batch.planned_at is None:
            self.checks["files"].skipped = f"the batch was {batch.status} before it had any lines"
            return
        found: list[File | None] = []
        gone = False
        for file_id in (batch.output_file_id, batch.error_file_id):
            file = None if file_id is None else files.peek(self._db, file_id)
            if file is not None and file.deleted_at is not None:
                self.checks["files"].skipped = f"file {file.id} was deleted, or has expired"
                gone = True
            elif file is not None:
                gone = not self._check_blob(self.checks["files"], file) or gone
            found.append(file)
        if gone:
            for name in ("complete", "unique", "order"):
                self.checks[name].skipped = "not every file is there and whole"
            return
        self._check_lines(*found)

    def _check_lines(self, output: File | None, errors: File | None) -> None:
        batch, first_wrong = self._batch, 0
        heads = [Head(self._read_results(file)) for file in (output, errors)]
        if self._has_input:
            for number, custom_id in enumerate(self._read_ids(), start=1):
                num_found = sum(head.take(custom_id) for head in heads)
                if num_found != 1 and not first_wrong:
                    first_wrong = number
        else:
            self.checks["order"].skipped = "the input is gone"
        num_left = sum(head.drain() for head in heads)
        numbers = [head.num_lines for head in heads]
        counts = batch.request_counts
        self._expect("completed", counts.completed, numbers[0])
        self._expect("failed", counts.failed, numbers[1])
        self._expect("total", counts.total, sum(numbers))
        recount = Recount()
        for head in heads:
            recount.usage += head.recount.usage
            recount.is_exact &= head.recount.is_exact
        self._expect(
            "usage of the files",
            batch.usage,
            batch.usage if recount.agrees(batch.usage) else recount.usage,
        )
        for name in ("complete", "unique", "order"):
            if self.checks[name].skipped is None:
                self.checks[name].num_checked = counts.total
        if self._has_input and (first_wrong or num_left):
            self._explain(output, errors, first_wrong=first_wrong)

    def _explain(self, output: File | None, errors: File | None, *, first_wrong: int) -> None:
        """Say what is wrong with the lines of the files: missing, doubled, foreign or moved."""
        wanted = _digest(self._read_ids())
        found = _digest(
            line.custom_id
            for file in (output, errors)
            for line in self._read_results(file)
            if line is not None
        )
        values, numbers = np.unique(found, return_counts=True)
        missing = int(np.isin(wanted, values, invert=True).sum())
        doubled = int(numbers[numbers > 1].sum() - (numbers > 1).sum())
        foreign = int(np.isin(values, wanted, invert=True).sum())
        where = f"first seen at request {first_wrong}" if first_wrong else "behind the last request"
        if missing:
            self.checks["complete"].note(f"{missing} requests have no record; {where}", missing)
        if doubled:
            self.checks["unique"].note(f"{doubled} records are doubled; {where}", doubled)
        if foreign:
            self.checks["order"].note(f"{foreign} custom_ids are not in the input", foreign)
        if not (missing or doubled or foreign):
            self.checks["order"].note(f"records are out of order; {where}")

    def _read_ids(self) -> Iterator[str]:
        for _, _, _, line in scan(self._blobs, self._input.blob_key, max_line_bytes=UNLIMITED):
            if line is not None:
                yield custom_id_of(line)

    def _read_results(self, file: File | None) -> Iterator[Line | None]:
        """Yield the lines of a published file; None for one that is no result."""
        if file is None:
            return
        for number, (_, _, _, line) in enumerate(
            scan(self._blobs, file.blob_key, max_line_bytes=UNLIMITED), start=1
        ):
            yield self._decode(self.checks["files"], file.blob_key, line or b"")
            if number % _NOTED_LINES == 0:
                self._progress(_NOTED_LINES)

    # --- leases ---

    def check_leases(self, grace_seconds: float | None) -> None:
        """Look for leases that nobody reaped, and for units that outlive their batch."""
        check, batch = self.checks["leases"], self._batch
        before = None
        if grace_seconds is not None:
            before = self._db.now() - timedelta(seconds=grace_seconds)
        found = audits.count_units(self._db, batch.id, expired_before=before)
        check.num_checked = found.total
        if found.overdue:
            check.note(f"{found.overdue} leases are past their expiry", found.overdue)
        if batch.status.is_terminal and found.working:
            check.note(f"{found.working} units have not ended", found.working)

    def _progress(self, num_lines: int = 0) -> None:
        self._num_lines += num_lines
        if self._on_progress is not None:
            self._on_progress(self._num_lines)


def _digest(ids: Iterator[str]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.fromiter((xxhash.xxh3_64_intdigest(one.encode()) for one in ids), dtype=np.uint64)


def _shown(value: object) -> str:
    if isinstance(value, Usage):
        return (
            f"{value.prompt_tokens} + {value.completion_tokens} tokens, "
            f"{value.cached_tokens} of them cached"
        )
    return str(value)
