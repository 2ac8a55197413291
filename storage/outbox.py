"""What clients are to be told: written with the change itself, delivered afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobs.domain.ids import BatchId
from storage.database import Transaction, reads, writes
from storage.tables import outbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a batch; it is delivered at least once."""

    id: str
    batch_id: BatchId
    event: str
    payload: Mapping[str, Any]
    created_at: datetime
    attempts: int
    not_before: datetime


_COLUMNS = tuple(outbox.c[field.name] for field in fields(Event))


@reads
def list_due(tx: Transaction, *, now: datetime, limit: int = 100) -> list[Event]:
    """Return events that are to be delivered now, the oldest first."""
    rows = tx.execute(
        sa.select(*_COLUMNS)
        .where(outbox.c.delivered_at.is_(None), outbox.c.not_before <= now)
        .order_by(outbox.c.not_before, outbox.c.id)
        .limit(limit)
    ).mappings()
    return [Event(**row) for row in rows]


@writes
def mark_delivered(tx: Transaction, event_id: str, *, now: datetime) -> None:
    """Note that the client was told."""
    tx.execute(sa.update(outbox).where(outbox.c.id == event_id).values(delivered_at=now))


@writes
def mark_failed(tx: Transaction, event_id: str, *, not_before: datetime) -> None:
    """Note that the client was not reached, and when to try again."""
    tx.execute(
        sa.update(outbox)
        .where(outbox.c.id == event_id)
        .values(attempts=outbox.c.attempts + 1, not_before=not_before)
    )
