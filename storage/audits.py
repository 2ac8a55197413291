"""What an audit reads: rows as they were at one instant, to be held against the bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from jobs.domain.ids import BatchId
from jobs.domain.result import Usage
from jobs.domain.shard import Segment, Shard, UnitKind, UnitState
from storage.database import Database, Transaction, reads
from storage.segments import segment_from_row
from storage.shards import shard_from_row
from storage.tables import UNENDED, UNFINISHED, batches, segments, shards, units
from storage.transitions import WORK_KINDS

_SEGMENT_COLUMNS = tuple(column.label(f"segment_{column.name}") for column in segments.c)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRows:
    """A shard, what its row counts, the state of its unit, and its segments."""

    shard: Shard
    state: UnitState
    num_done: int
    num_completed: int
    num_failed: int
    usage: Usage
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRows:
    """The units of a batch that matter to an audit.

    Attributes:
        overdue: leased ones whose lease ran out before an instant.
        working: plans, shards and finalizers that have not ended.
    """

    total: int
    overdue: int
    working: int


@reads
def get_shard(tx: Transaction, batch_id: BatchId, ordinal: int) -> ShardRows | None:
    """Return a shard with its segments, all as of one instant, or None behind the last one."""
    # One statement: on Postgres two of a transaction may see two states.
    rows = (
        tx.execute(
            sa.select(shards, units.c.state, *_SEGMENT_COLUMNS)
            .join(units, units.c.id == shards.c.unit_id)
            .outerjoin(segments, segments.c.unit_id == shards.c.unit_id)
            .where(shards.c.batch_id == batch_id, shards.c.ordinal == ordinal)
            .order_by(segments.c.epoch, segments.c.sequence)
        )
        .mappings()
        .all()
    )
    if not rows:
        return None
    first = rows[0]
    found = [
        segment_from_row({column.name: row[f"segment_{column.name}"] for column in segments.c})
        for row in rows
        if row["segment_unit_id"] is not None
    ]
    return ShardRows(
        shard=shard_from_row(first, ()),
        state=UnitState(first["state"]),
        num_done=first["num_done"],
        num_completed=first["num_completed"],
        num_failed=first["num_failed"],
        usage=Usage(
            prompt_tokens=first["prompt_tokens"],
            completion_tokens=first["completion_tokens"],
            cached_tokens=first["cached_tokens"],
        ),
        segments=tuple(found),
    )


def iterate_shards(db: Database, batch_id: BatchId) -> Iterator[ShardRows]:
    """Yield the shards of a batch in order; no transaction stays open."""
    ordinal = 0
    while (rows := get_shard(db, batch_id, ordinal)) is not None:
        yield rows
        ordinal += 1


@reads
def is_recorded(tx: Transaction, segment: Segment) -> bool:
    """Return whether a segment has its row: it may have been taken out since it was read."""
    query = sa.select(segments.c.sha256).where(
        segments.c.unit_id == segment.unit_id,
        segments.c.epoch == segment.epoch,
        segments.c.sequence == segment.sequence,
    )
    return tx.execute(query).first() is not None


@reads
def count_units(tx: Transaction, batch_id: BatchId, *, expired_before: datetime | None) -> UnitRows:
    """Return how many units a batch has, and how many of them are as they should not be."""
    overdue = units.c.state == UnitState.LEASED
    overdue &= sa.false() if expired_before is None else units.c.lease_expires_at < expired_before
    working = units.c.kind.in_((*WORK_KINDS, UnitKind.FINALIZE)) & UNENDED
    row = tx.execute(
        sa.select(
            sa.func.count().label("total"),
            sa.func.count(sa.case((overdue, 1))).label("overdue"),
            sa.func.count(sa.case((working, 1))).label("working"),
        ).where(units.c.batch_id == batch_id)
    ).one()
    return UnitRows(total=row.total, overdue=row.overdue, working=row.working)


@reads
def sample(tx: Transaction, *, ended_since: datetime, limit: int) -> list[BatchId]:
    """Return up to `limit` batches by chance: half of them running, the others ended since then."""
    ended_at = sa.func.coalesce(
        batches.c.completed_at, batches.c.cancelled_at, batches.c.expired_at
    )
    running = _by_chance(tx, UNFINISHED & batches.c.planned_at.is_not(None), limit)
    ended = _by_chance(tx, ~UNFINISHED & (ended_at >= ended_since), limit)
    num_running = max((limit + 1) // 2, limit - len(ended))
    return [*running[:num_running], *ended][:limit]


def _by_chance(tx: Transaction, which: sa.ColumnElement[bool], limit: int) -> list[BatchId]:
    query = sa.select(batches.c.id).where(which).order_by(sa.func.random()).limit(limit)
    return list(tx.execute(query).scalars())
