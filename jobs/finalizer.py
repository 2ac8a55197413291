"""Writes the output and error file of a batch whose shards have ended, in input order.

Shards of the input are in that order already; those of a run order are sorted back, on disk.
Copies the bytes of results that are already rendered; lines without one get an error that says
why. Publishes nothing unless every line was written exactly once. What was lost of the segments
by then is run again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice

from jobs import metrics
from jobs.domain.batch import Batch
from jobs.domain.errors import BatchctlError, BlobCorrupt, BlobMissing
from jobs.domain.ids import mint_file_id
from jobs.domain.request import custom_id_of
from jobs.domain.result import LineError, Result, Usage, render_result
from jobs.domain.shard import Lease, Segment, Shard, UnitState, count_bits
from jobs.reuse import Cache, Harvest, harvesting
from jobs.telemetry import log
from storage import batches, repairs, segments, shards, units
from storage.blobs.base import BlobStore, BlobWriter, hash_bytes, output_key
from storage.database import Database
from storage.files import File
from storage.jsonl import Entry, decode_segment, read_requests
from storage.reorder import Reorder

OUTPUT_SECONDS = 30 * 86_400
"""How long output files are kept unless the batch says otherwise."""
MAX_REPAIRS = 3
"""How often lost results of one batch are run again; a store that loses more needs a person."""
_MESSAGES = {
    "engine_misconfigured": "The model of this batch cannot be loaded.",
    "engine_out_of_memory": "The model of this batch does not fit in memory.",
    "engine_unavailable": "The engine of this batch's model could not be kept running.",
    "blob_missing": "The input of this batch is gone.",
    "blob_corrupt": "The input of this batch changed after it was planned.",
}
_LINES_AT_ONCE = 1000
_REASONS = {
    UnitState.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request ran."),
    UnitState.EXPIRED: ("batch_expired", "The batch's window ended before this request ran."),
}


class CountMismatch(BatchctlError):
    """The results do not add up to the lines; nothing is published."""

    code = "count_mismatch"


class InputLost(BatchctlError):
    """Lines without a result cannot be named, because the input is gone or changed."""

    code = "input_lost"


@dataclass(slots=True, kw_only=True)
class _Writing:
    """The two files of one batch while they are written, and what is in them."""

    db: Database
    blobs: BlobStore
    batch: Batch
    output: BlobWriter
    errors: BlobWriter
    harvest: Harvest | None = None
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)


def finalize(
    db: Database,
    blobs: BlobStore,
    lease: Lease,
    *,
    cache: Cache | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the files of the batch that `lease` is about, and close it.

    Args:
        cache: where the answers of a batch go that gives them to later ones; None: nowhere.
        on_progress: called with the number of lines written, now and then.

    Raises:
        CountMismatch: a line is missing or doubled.
        InputLost: lines have no result, and the input that would name them cannot be read.
        LeaseLost: another worker finalizes this batch.
        BlobCorrupt, BlobMissing: a segment is not what was written.
    """
    batch = batches.get(db, lease.batch_id, tenant_id=None)
    listed = shards.list_for_batch(db, batch.id)
    total = 0
    output_writer = blobs.open_writer(output_key(batch.id, lease.epoch, "output"))
    error_writer = blobs.open_writer(output_key(batch.id, lease.epoch, "error"))
    gathering = harvesting(cache, db, blobs, batch, lease)
    with output_writer as output, error_writer as errors, gathering as harvest:
        writing = _Writing(
            db=db, blobs=blobs, batch=batch, output=output, errors=errors, harvest=harvest
        )
        for total in _write_all(writing, listed):
            if writing.completed + writing.failed != total:
                raise CountMismatch(
                    f"Batch {batch.id}: {writing.completed + writing.failed} results for the first "
                    f"{total} lines. Nothing was published."
                )
            if on_progress is not None:
                on_progress(total)
        # Not the sum over its shards: of those, some may be missing or too many.
        if total != batch.request_counts.total:
            raise CountMismatch(
                f"Batch {batch.id}: its shards have {total} lines, its file had "
                f"{batch.request_counts.total}. Nothing was published."
            )
        output_file = _publish(db, batch, output, writing.completed, "output")
        error_file = _publish(db, batch, errors, writing.failed, "errors")
        if harvest is not None:
            harvest.keep()  # before the end: who deletes the files then deletes this too
    batches.complete(
        db,
        lease,
        output_file=output_file,
        error_file=error_file,
        num_completed=writing.completed,
        num_failed=writing.failed,
        usage=writing.usage,
    )


def run_lost_again(
    db: Database,
    blobs: BlobStore,
    lease: Lease,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> bool:
    """Return whether segments of the batch are lost and its requests in them are run again.

    Looks at every segment, so that one repair is enough however many are lost. Nothing is done
    when all are whole at a second look; when the input is gone too, since then it is the store
    that is not what it was; or after `MAX_REPAIRS`.

    Raises:
        LeaseLost: another worker finalizes this batch.
    """
    lost: list[Segment] = []
    num_lines = 0
    for segment in segments.iterate_for_batch(db, lease.batch_id):
        if not is_whole(blobs, segment):
            lost.append(segment)
        num_lines += segment.num_completed + segment.num_failed
        if on_progress is not None:
            on_progress(num_lines)
    if not lost:
        return False
    num_repairs = repairs.count(db, lease.batch_id)
    damage = {
        "batch_id": lease.batch_id,
        "num_segments": len(lost),
        "num_lines": sum(count_bits(segment.positions) for segment in lost),
        "num_repairs": num_repairs,
    }
    unit_ids = {segment.unit_id for segment in lost}
    inputs = {shards.get(db, unit_id).blob_key for unit_id in unit_ids}
    if num_repairs >= MAX_REPAIRS or not all(map(blobs.exists, inputs)):
        log.error("results_stay_lost", first=lost[0].blob_key, **damage)
        metrics.count_damage("given_up", len(lost))
        return False
    repairs.run_again(db, lease, lost)
    log.error("results_lost", first=lost[0].blob_key, **damage)
    metrics.count_damage("run_again", len(lost))
    return True


def is_whole(blobs: BlobStore, segment: Segment) -> bool:
    """Return whether a segment's bytes are there as they were written."""
    try:
        return hash_bytes(blobs.get(segment.blob_key)) == segment.sha256
    except (BlobMissing, BlobCorrupt):
        return False


def _write_all(writing: _Writing, listed: Sequence[tuple[Shard, UnitState]]) -> Iterator[int]:
    """Write the results of all shards; yield how many lines there should be by now."""
    if not any(shard.is_run_order for shard, _ in listed):
        total = 0
        for shard, state in listed:
            entries = _read_shard(writing, shard, state)
            entries.sort(key=lambda entry: entry[0])
            _write_entries(writing, entries, first_index=shard.first_index)
            total += shard.num_lines
            yield total
        return
    total = writing.batch.request_counts.total
    num_bytes = segments.sum_bytes(writing.db, writing.batch.id)
    with Reorder(num_ranks=total, num_bytes=num_bytes) as reorder:
        for shard, state in listed:
            for index, kind, line in _read_shard(writing, shard, state):
                if index >= total:
                    raise CountMismatch(
                        f"Batch {writing.batch.id}: request {index} of {total} has a result. "
                        "Nothing was published."
                    )
                reorder.add(index, kind, line)
        found, first = reorder.read(), 0
        while entries := list(islice(found, _LINES_AT_ONCE)):
            _write_entries(writing, entries, first_index=first)
            first += len(entries)
            yield first
    yield total


def _read_shard(writing: _Writing, shard: Shard, state: UnitState) -> list[Entry]:
    """Return the results of a shard's lines, and why the others have none."""
    blobs, batch = writing.blobs, writing.batch
    entries: list[Entry] = []
    for segment in segments.list_for_unit(writing.db, shard.unit_id):
        content = blobs.get(segment.blob_key)
        if hash_bytes(content) != segment.sha256:
            raise BlobCorrupt(f"Segment {segment.blob_key} is not what was written.")
        found = decode_segment(content)
        if writing.harvest is not None and segment.identity == writing.harvest.identity:
            writing.harvest.add(found)
        entries += found
        writing.usage += segment.usage
    if count_bits(shard.done) < shard.num_lines:
        failed = state is UnitState.FAILED
        reason = units.get_exit(writing.db, shard.unit_id) if failed else None
        try:
            entries += _missing(blobs, batch, shard, state, reason)
        except (BlobMissing, BlobCorrupt) as error:
            raise InputLost(
                f"The input of batch {batch.id} cannot be read any more, and some of its requests "
                "have no result. What is finished is kept in segments."
            ) from error
    return entries


def _write_entries(writing: _Writing, entries: Iterable[Entry], *, first_index: int) -> None:
    """Write results that are sorted; the first one must be that of `first_index`."""
    lines: tuple[list[bytes], list[bytes]] = ([], [])
    for expected, (index, kind, line) in enumerate(entries, start=first_index):
        if index != expected:
            raise CountMismatch(
                f"Batch {writing.batch.id}: expected the result of request {expected}, found that "
                f"of {index}. Nothing was published."
            )
        lines[kind].append(line)
    for writer, written in zip((writing.output, writing.errors), lines, strict=True):
        if written:
            writer.write(b"\n".join(written) + b"\n")
    writing.completed += len(lines[0])
    writing.failed += len(lines[1])


def _missing(
    blobs: BlobStore, batch: Batch, shard: Shard, state: UnitState, exit_reason: str | None
) -> Iterator[Entry]:
    code, message = _REASONS.get(state, ("attempts_exhausted", "The request could not be run."))
    if exit_reason and ": " in exit_reason:
        # The rest is for the operator's log: it may name folders and hosts.
        code = exit_reason.partition(": ")[0]
        message = _MESSAGES.get(code, message)
    error = LineError(code=code, message=message)
    for _, index, followers, content in read_requests(blobs, shard, skip=shard.done):
        for number, custom_id in ((index, custom_id_of(content)), *followers):
            line = render_result(
                Result(id=0, error=error),
                custom_id=custom_id,
                request_id=f"{batch.id[6:]}{number:08x}",
                endpoint=batch.endpoint,
                model=batch.model or "",
                created=0,
            )
            yield number, 1, line


def _publish(
    db: Database, batch: Batch, writer: BlobWriter, num_lines: int, kind: str
) -> File | None:
    if not num_lines:
        return None
    info = writer.commit()
    now = db.now()
    kept = timedelta(seconds=batch.output_expires_after_seconds or OUTPUT_SECONDS)
    return File(
        id=mint_file_id(),
        tenant_id=batch.tenant_id,
        filename=f"{batch.id}_{kind}.jsonl",
        purpose="batch_output",
        num_bytes=info.num_bytes,
        sha256=info.sha256,
        blob_key=info.key,
        created_at=now,
        expires_at=now + kept,
    )
