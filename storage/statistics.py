"""What the system holds, in numbers: for metrics, in one read."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from jobs.domain.ids import WorkerId
from jobs.domain.shard import UnitKind, UnitState
from storage.database import Transaction, reads
from storage.tables import UNENDED, batches, shards, units, workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The units of one kind and model that have not ended.

    Attributes:
        ready: how many could be claimed now.
        waiting: how many are to be claimed later.
        leased: how many somebody works on.
        oldest_seconds: since when the first ready one could be claimed.
        num_requests: requests in them that have no durable result; of shards only.
    """

    kind: UnitKind
    model_key: str | None
    ready: int
    waiting: int
    leased: int
    oldest_seconds: float
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The numbers of one instant; `heartbeats` are ages in seconds."""

    queues: tuple[Queue, ...]
    batches: Mapping[str, int]
    heartbeats: Mapping[WorkerId, float]
    num_draining: int
    num_quarantined: int


@reads
def read(tx: Transaction, *, workers_since: timedelta) -> Statistics:
    """Return the numbers of now; workers silent for longer than `workers_since` are left out.

    Costs one pass over the units that have not ended and one over the batches.
    """
    now = tx.now()
    by_status = tx.execute(
        sa.select(batches.c.status, sa.func.count().label("number")).group_by(batches.c.status)
    ).all()
    alive = tx.execute(
        sa.select(workers.c.id, workers.c.heartbeat_at, workers.c.draining, workers.c.state)
        .where(workers.c.heartbeat_at >= now - workers_since)
        .order_by(workers.c.id)
    ).all()
    return Statistics(
        queues=_read_queues(tx, now),
        batches={row.status: row.number for row in by_status},
        heartbeats={row.id: max(0.0, (now - row.heartbeat_at).total_seconds()) for row in alive},
        num_draining=sum(row.draining for row in alive),
        num_quarantined=sum(row.state == "quarantined" for row in alive),
    )


def _read_queues(tx: Transaction, now: datetime) -> tuple[Queue, ...]:
    pending = units.c.state == UnitState.PENDING
    is_ready = pending & (units.c.not_before <= now)
    rows = tx.execute(
        sa.select(
            units.c.kind,
            units.c.model_key,
            _count(is_ready).label("ready"),
            _count(pending & (units.c.not_before > now)).label("waiting"),
            _count(units.c.state == UnitState.LEASED).label("leased"),
            sa.func.min(sa.case((is_ready, units.c.not_before))).label("oldest_at"),
            sa.func.coalesce(sa.func.sum(shards.c.num_lines - shards.c.num_done), 0).label(
                "num_requests"
            ),
        )
        .select_from(units.outerjoin(shards, shards.c.unit_id == units.c.id))
        .where(UNENDED)
        .group_by(units.c.kind, units.c.model_key)
        .order_by(units.c.kind, units.c.model_key)
    )
    return tuple(
        Queue(
            kind=UnitKind(row.kind),
            model_key=row.model_key,
            ready=row.ready,
            waiting=row.waiting,
            leased=row.leased,
            oldest_seconds=(
                0.0 if row.oldest_at is None else max(0.0, (now - row.oldest_at).total_seconds())
            ),
            num_requests=int(row.num_requests),
        )
        for row in rows
    )


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.count(sa.case((condition, 1)))
