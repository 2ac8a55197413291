"""Segments: the commit of one is the moment its lines are done."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobs.domain.errors import Conflict, LeaseLost
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.result import Usage
from jobs.domain.shard import (
    Lease,
    Segment,
    UnitState,
    bitmaps_overlap,
    count_bits,
    merge_bitmaps,
)
from storage.database import Database, Transaction, reads, writes
from storage.tables import segments, shards, units
from storage.transitions import advance_if_ended, lock_batch

_PLAIN = tuple(field.name for field in fields(Segment) if field.name != "usage")
_USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")


def segment_from_row(row: sa.RowMapping | dict[str, Any]) -> Segment:
    """Return the segment that `row` of the table is."""
    return Segment(
        **{name: row[name] for name in _PLAIN}, usage=Usage(**{name: row[name] for name in _USAGE})
    )


@writes
def record(
    tx: Transaction,
    lease: Lease,
    segment: Segment,
    *,
    lease_seconds: float,
    now: datetime | None = None,
) -> bool:
    """Commit a segment and extend its lease; return whether that was the shard's last one.

    The blob is written before. A repeated call is a success.

    Raises:
        LeaseLost: the shard is no longer ours, and the segment was not committed before.
        Conflict: it holds a line that has its result already.

    Source: transition T3 of the reliability notes. Any one of the epoch, the overlap and the
    primary key could be left out and no line would be doubled; all three are kept.
    """
    held = tx.execute(
        sa.select(units.c.state, units.c.epoch)
        .where(units.c.id == lease.unit_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    known = tx.execute(
        sa.select(segments.c.sha256).where(
            segments.c.unit_id == segment.unit_id,
            segments.c.epoch == segment.epoch,
            segments.c.sequence == segment.sequence,
        )
    ).one_or_none()
    if known is not None:
        if known.sha256 != segment.sha256:
            raise Conflict(
                f"Segment {segment.sequence} of unit {segment.unit_id}, epoch {segment.epoch}, "
                "was committed with other bytes."
            )
        return held is not None and held.state == UnitState.DONE
    if (
        held is None
        or held.state != UnitState.LEASED
        or held.epoch != lease.epoch
        or (segment.unit_id, segment.epoch) != (lease.unit_id, lease.epoch)
    ):
        raise LeaseLost(f"The lease of unit {lease.unit_id} (epoch {lease.epoch}) is not held.")
    shard = tx.execute(
        sa.select(shards).where(shards.c.unit_id == lease.unit_id).with_for_update(key_share=True)
    ).one()
    if bitmaps_overlap(shard.done, segment.positions):
        raise Conflict(f"A line of unit {lease.unit_id} would get a second result.")
    now = now or tx.now()
    done = merge_bitmaps(shard.done, segment.positions)
    num_done = count_bits(done)
    if int.from_bytes(done, "little").bit_length() > shard.num_lines:
        raise Conflict(f"A segment of unit {lease.unit_id} has positions past its last line.")
    usage = {name: getattr(segment.usage, name) for name in _USAGE}
    tx.execute(
        sa.insert(segments).values(
            **{name: getattr(segment, name) for name in _PLAIN}, **usage, created_at=now
        )
    )
    tx.execute(
        sa.update(shards)
        .where(shards.c.unit_id == lease.unit_id)
        .values(
            done=done,
            num_done=num_done,
            num_completed=shards.c.num_completed + segment.num_completed,
            num_failed=shards.c.num_failed + segment.num_failed,
            **{name: shards.c[name] + tokens for name, tokens in usage.items()},
        )
    )
    finished: bool = num_done == shard.num_lines
    changes: dict[str, object] = {
        "lease_expires_at": now + timedelta(seconds=lease_seconds),
        "num_stalls": 0,
    }
    if finished:
        changes |= {"state": str(UnitState.DONE), "last_exit": "done"}
    tx.execute(
        sa.update(units)
        .where(
            units.c.id == lease.unit_id,
            units.c.epoch == lease.epoch,
            units.c.state == UnitState.LEASED,
        )
        .values(changes)
    )
    if finished:
        batch = lock_batch(tx, lease.batch_id)
        if batch is not None:
            advance_if_ended(tx, batch, now=now)
    return finished


@reads
def list_for_unit(tx: Transaction, unit_id: UnitId) -> list[Segment]:
    """Return the segments of a shard in the order they were committed."""
    rows = tx.execute(
        sa.select(segments)
        .where(segments.c.unit_id == unit_id)
        .order_by(segments.c.epoch, segments.c.sequence)
    ).mappings()
    return [segment_from_row(row) for row in rows]


@reads
def sum_bytes(tx: Transaction, batch_id: BatchId) -> int:
    """Return how many bytes the segments of a batch have together."""
    total: int = tx.execute(
        sa.select(sa.func.coalesce(sa.func.sum(segments.c.num_bytes), 0))
        .join(shards, shards.c.unit_id == segments.c.unit_id)
        .where(shards.c.batch_id == batch_id)
    ).scalar_one()
    return int(total)


Cursor = tuple[int, int, int]
"""Where a listing of a batch's segments stands: ordinal of the shard, epoch, sequence."""


@reads
def list_for_batch(
    tx: Transaction, batch_id: BatchId, *, after: Cursor | None = None, limit: int = 1000
) -> tuple[list[Segment], Cursor | None]:
    """Return up to `limit` segments of a batch behind `after`, and where to go on.

    They come by shard, then epoch and sequence. The cursor is None at the end. A segment that is
    committed meanwhile to a shard already passed is not seen.
    """
    place = (shards.c.ordinal, segments.c.epoch, segments.c.sequence)
    query = (
        sa.select(segments, shards.c.ordinal)
        .join(shards, shards.c.unit_id == segments.c.unit_id)
        .where(shards.c.batch_id == batch_id)
        .order_by(*place)
        .limit(limit + 1)
    )
    if after is not None:
        query = query.where(sa.tuple_(*place) > sa.tuple_(*map(sa.literal, after)))
    rows = tx.execute(query).mappings().all()
    found = [segment_from_row(row) for row in rows[:limit]]
    if len(rows) <= limit:
        return found, None
    last = rows[limit - 1]
    return found, (last["ordinal"], last["epoch"], last["sequence"])


def iterate_for_batch(db: Database, batch_id: BatchId, *, page: int = 1000) -> Iterator[Segment]:
    """Yield the segments of a batch by shard, epoch and sequence; no transaction stays open."""
    cursor: Cursor | None = None
    while True:
        found: Sequence[Segment]
        found, cursor = list_for_batch(db, batch_id, after=cursor, limit=page)
        yield from found
        if cursor is None:
            return
