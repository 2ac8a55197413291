"""A leased shard in our hands: its lines become requests, its results wait to be durable.

Nothing here locks: the feed, which has the threads, holds its lock around what is shared.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jobs import metrics
from jobs.domain.batch import Batch
from jobs.domain.errors import InvalidLine
from jobs.domain.mixed import endpoint_of
from jobs.domain.request import Line, Request, custom_id_of, parse_line
from jobs.domain.result import LineError, Result, Usage, render_result
from jobs.domain.shard import Fault, Lease, Segment, Shard, Trial, UnitState, bitmap
from jobs.domain.suspects import is_guilty, list_accused, narrow
from jobs.pictures import Pictures
from jobs.telemetry import log
from storage import segments, shards
from storage.blobs.base import BlobStore, hash_bytes, segment_key
from storage.database import Database
from storage.jsonl import (
    KIND_ERROR,
    KIND_OUTPUT,
    Entry,
    Follower,
    RequestLine,
    encode_segment,
)

_UNWRITABLE = LineError(
    code="internal_error", message="The answer could not be written as a line.", status_code=500
)


@dataclass(slots=True, eq=False)
class Buffer:
    """Results of one shard that are not durable yet."""

    entries: list[Entry] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    num_bytes: int = 0
    num_failed: int = 0
    failed_usage: Usage = field(default_factory=Usage)
    codes: Counter[str] = field(default_factory=Counter)
    identities: set[str] = field(default_factory=set)
    oldest_at: float = 0.0


@dataclass(slots=True, eq=False)
class OpenShard:
    """A shard under our lease.

    Attributes:
        group_of: the group of suspects that a position belongs to, of those that belong to one.
        guilty: the errors of lines that have killed too often, by position.
        is_careful: whether what runs is written down first.
        crashes: how often each position killed an engine alone.
    """

    lease: Lease
    shard: Shard
    batch: Batch
    lines: Iterator[RequestLine]
    num_left: int
    group_of: dict[int, int]
    guilty: dict[int, LineError]
    is_careful: bool
    crashes: dict[int, int]
    groups: dict[int, list["Held"]] = field(default_factory=dict)
    buffer: Buffer = field(default_factory=Buffer)
    writing: Buffer | None = None
    sequence: int = 0
    num_read: int = 0
    stopped: UnitState | None = None
    exit: str = ""
    lost: bool = False
    opened_at: float = field(default_factory=time.monotonic)

    def keep(self, held: "Held", result: Result, identity: Callable[[], str]) -> int:
        """Buffer the lines of one result; return how many bytes they have.

        Args:
            identity: of the engine that answered, asked where answers are for reuse.
        """
        try:
            entries = self._render(held, result)
        except Exception as failure:  # noqa: BLE001  whatever it is, it must not end the others' work
            # Without its message, which may quote the answer.
            log.error(
                "result_not_rendered", unit_id=self.lease.unit_id, error=type(failure).__name__
            )
            result = Result(id=result.id, usage=result.usage, error=_UNWRITABLE)
            entries = self._render(held, result)
        buffer = self.buffer
        if not buffer.entries:
            buffer.oldest_at = time.monotonic()
        error = result.error
        num_bytes = sum(len(line) for *_, line in entries)
        buffer.entries += entries
        buffer.num_bytes += num_bytes
        if self.batch.reuse:
            buffer.identities.add(identity())
        buffer.positions.append(held.position)
        buffer.usage += result.usage
        if error is not None:
            num_failed = 1 + len(held.followers)
            buffer.num_failed += num_failed
            buffer.failed_usage += result.usage
            buffer.codes[error.code] += num_failed
        self.num_left -= 1
        return num_bytes

    def _render(self, held: "Held", result: Result) -> list[Entry]:
        """Return the lines of one result: its own and its followers'."""
        return [
            (
                index,
                KIND_OUTPUT if result.error is None else KIND_ERROR,
                render_result(
                    result,
                    custom_id=custom_id,
                    request_id=f"{self.lease.batch_id[6:]}{index:08x}",
                    endpoint=held.endpoint,
                    model=self.lease.model_key or "",
                    created=int(time.time()),
                    same_as=None if index == held.index else held.custom_id,
                    pooling=held.request.pooling,
                    request=held.request,
                ),
            )
            for index, custom_id in ((held.index, held.custom_id), *held.followers)
        ]


@dataclass(slots=True, eq=False)
class Held:
    """One request in our hands: read, and not yet turned into a result.

    Attributes:
        unfilled: its line, where its pictures are still to be read.
    """

    shard: OpenShard
    position: int
    index: int
    custom_id: str
    request: Request
    num_bytes: int = 0
    followers: Sequence[Follower] = ()
    endpoint: str = ""
    unfilled: Line | None = None


def read_line(
    db: Database, blobs: BlobStore, shard: OpenShard, line: RequestLine, request_id: int
) -> tuple[Held, LineError | None]:
    """Return the request of a line, or with an error one that stands for it and is not to run.

    A suspect waits until all of its shard has been read, so its pictures are left for `fill`.

    Raises:
        StorageError: its pictures cannot be read now.
    """
    position, index, followers, content = line
    num_bytes = len(content)

    def refused(error: LineError) -> tuple[Held, LineError]:
        custom_id, request = custom_id_of(content), Request(id=request_id)
        return Held(shard, position, index, custom_id, request, num_bytes, followers), error

    if position in shard.guilty:
        return refused(shard.guilty[position])
    try:
        endpoint = endpoint_of(content, shard.batch.endpoint)
        parsed = parse_line(content, endpoint=endpoint)
    except InvalidLine as error:
        # Planning let this line through, so the code changed since; say so in its place.
        return refused(_refusal(error))
    request = parsed.to_request(request_id)
    held = Held(shard, position, index, parsed.custom_id, request, num_bytes, followers, endpoint)
    if parsed.messages is not None and any(m.parts for m in parsed.messages):
        held.unfilled = parsed
        if position not in shard.group_of:
            return held, fill(db, blobs, held)
    return held, None


def fill(db: Database, blobs: BlobStore, held: Held) -> LineError | None:
    """Read the pictures of a request, where that is still to be done; return why it cannot run.

    Raises:
        StorageError: they cannot be read now.
    """
    if held.unfilled is None:
        return None
    try:
        line, num_read = Pictures(db, blobs, held.shard.batch.tenant_id).fill(held.unfilled)
    except InvalidLine as error:
        return _refusal(error)
    held.request = line.to_request(held.request.id)
    held.num_bytes += num_read
    held.unfilled = None
    return None


def _refusal(error: InvalidLine) -> LineError:
    return LineError(
        code=error.error_code, message=error.message, status_code=400, param=error.param
    )


def write_segment(
    db: Database, blobs: BlobStore, shard: OpenShard, writing: Buffer, *, lease_seconds: float
) -> bool:
    """Make buffered results durable; return whether the shard is done with them.

    Raises:
        LeaseLost: the shard belongs to somebody else by now.
        StorageError: the blob or the row could not be written.
    """
    lease = shard.lease
    began = time.monotonic()
    content = encode_segment(sorted(writing.entries))
    key = segment_key(lease, shard.sequence, hash_bytes(content))
    info = blobs.put(key, content)
    num_completed = len(writing.entries) - writing.num_failed
    done = segments.record(
        db,
        lease,
        Segment(
            unit_id=lease.unit_id,
            epoch=lease.epoch,
            sequence=shard.sequence,
            blob_key=info.key,
            sha256=info.sha256,
            num_bytes=info.num_bytes,
            positions=bitmap(writing.positions, shard.shard.num_lines),
            num_completed=num_completed,
            num_failed=writing.num_failed,
            usage=writing.usage,
            identity=max(writing.identities) or None if len(writing.identities) == 1 else None,
        ),
        lease_seconds=lease_seconds,
    )
    metrics.count_segment(
        lease.model_key,
        outcomes={metrics.COMPLETED: num_completed, **writing.codes},
        usage=writing.usage,
        failed_usage=writing.failed_usage,
        num_bytes=info.num_bytes,
        seconds=time.monotonic() - began,
    )
    return done


def settle_deaths(
    db: Database, lease: Lease, shard: Shard
) -> tuple[list[tuple[int, ...]], dict[int, LineError]]:
    """Return the groups of a shard whose workers died, and the lines that are guilty of it.

    Raises:
        LeaseLost: the shard belongs to somebody else by now.
        StorageError: what is known could not be written down.
    """
    accused = list_accused(shard)
    groups = narrow(shard)
    died = Trial(owner=shard.trial.owner, positions=accused) if accused and shard.trial else None
    before = {fault.position: fault.solo_crashes for fault in shard.faults}
    fault = shards.report_worker_death(
        db,
        lease,
        suspects=groups,
        died=died,
        num_crashes=1 + (before.get(accused[0], 0) if accused else 0),
    )
    log.warning(
        "workers_died",
        unit_id=lease.unit_id,
        num_stalls=lease.num_stalls,
        num_accused=len(accused),
        num_suspects=sum(map(len, groups)),
    )
    if fault is None or not is_guilty(fault):
        return groups, {}
    return groups, {fault.position: crash_error(fault, "worker")}


def crash_error(fault: Fault, what: str) -> LineError:
    """Return the error of a line that has killed too often: the "engine" or the "worker"."""
    return LineError(
        code=f"{what}_crash",
        message=f"The {what} died {fault.solo_crashes} times while this request ran alone.",
        status_code=500,
    )
