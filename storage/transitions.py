"""What transitions share: a batch under its lock, and moving it on once its units have ended.

Locks are taken in one order, so that no two transactions wait for each other: a leased unit, its
shard, its batch, then pending units. A claim locks a pending unit alone.
"""

from dataclasses import asdict, fields
from datetime import datetime

import sqlalchemy as sa

from jobs.domain.batch import (
    Batch,
    BatchEnding,
    BatchEvent,
    BatchStatus,
    LineProblem,
    RequestCounts,
    advance,
)
from jobs.domain.errors import LeaseLost
from jobs.domain.ids import BatchId, TenantId, mint, mint_unit_id
from jobs.domain.mixed import MIXED
from jobs.domain.result import Usage
from jobs.domain.shard import (
    MIXED_FORMAT,
    PLAIN_FORMAT,
    TERMINAL_UNIT_STATES,
    Lease,
    UnitKind,
    UnitState,
)
from storage.database import Transaction
from storage.tables import UNENDED, batches, outbox, units

WORK_KINDS = (UnitKind.PLAN, UnitKind.SHARD)
"""Kinds that end with their batch; the others run whatever becomes of it."""

_NOT_COLUMNS = frozenset({"request_counts", "usage", "errors", "status", "ending", "models"})
_PLAIN = tuple(field.name for field in fields(Batch) if field.name not in _NOT_COLUMNS)


def batch_from_row(row: sa.RowMapping, counts: RequestCounts, usage: Usage) -> Batch:
    """Return the batch that `row` of the table and its counts make."""
    plain = {name: row[name] for name in _PLAIN}
    return Batch(
        **plain,
        status=BatchStatus(row["status"]),
        ending=BatchEnding(row["ending"]) if row["ending"] else None,
        errors=tuple(LineProblem(**problem) for problem in row["errors"]),
        request_counts=counts,
        usage=usage,
    )


def batch_to_row(batch: Batch) -> dict[str, object]:
    """Return the columns of `batch`; its counts and usage are not among them."""
    columns: dict[str, object] = {name: getattr(batch, name) for name in _PLAIN}
    columns["status"] = str(batch.status)
    columns["ending"] = str(batch.ending) if batch.ending else None
    columns["errors"] = [asdict(problem) for problem in batch.errors]
    return columns


def lock_batch(
    tx: Transaction, batch_id: BatchId, *, tenant_id: TenantId | None = None
) -> Batch | None:
    """Return the batch, locked until the transaction ends, or None; its counts are left empty."""
    query = sa.select(batches).where(batches.c.id == batch_id)
    if tenant_id is not None:
        query = query.where(batches.c.tenant_id == tenant_id)
    row = tx.execute(query.with_for_update(key_share=True)).mappings().one_or_none()
    if row is None:
        return None
    return batch_from_row(row, RequestCounts(total=row["total"] or 0), Usage())


def save_batch(tx: Transaction, batch: Batch, **columns: object) -> None:
    """Write a batch that is locked, and further columns of its row."""
    tx.execute(
        sa.update(batches).where(batches.c.id == batch.id).values(batch_to_row(batch) | columns)
    )


def stopped_state(batch: Batch) -> UnitState | None:
    """Return what becomes of a unit of work of this batch, or None while the batch goes on."""
    if batch.status is BatchStatus.FAILED:
        return UnitState.CANCELLED
    if batch.ending is BatchEnding.CANCELLED or batch.status is BatchStatus.CANCELLED:
        return UnitState.CANCELLED
    if batch.ending is BatchEnding.EXPIRED:
        return UnitState.EXPIRED
    return None


def stop_pending(tx: Transaction, batch: Batch) -> None:
    """End the pending units of work of a batch that was stopped; holders of others find out."""
    state = stopped_state(batch)
    if state is None:
        return
    tx.execute(
        sa.update(units)
        .where(
            units.c.batch_id == batch.id,
            units.c.kind.in_(WORK_KINDS),
            units.c.state == UnitState.PENDING,
        )
        .values(state=str(state), last_exit=str(state))
    )


def advance_if_ended(tx: Transaction, batch: Batch, *, now: datetime) -> Batch:
    """Return the locked batch, moved on with a finalize unit when all its work has ended."""
    if batch.status not in {
        BatchStatus.VALIDATING,
        BatchStatus.IN_PROGRESS,
        BatchStatus.CANCELLING,
    }:
        return batch
    if batch.status is BatchStatus.VALIDATING and batch.ending is None:
        return batch
    work = (units.c.batch_id == batch.id) & units.c.kind.in_(WORK_KINDS)
    if tx.execute(sa.select(units.c.id).where(work, UNENDED).limit(1)).first() is not None:
        return batch
    expired = sa.select(units.c.id).where(work, units.c.state == UnitState.EXPIRED).limit(1)
    if batch.ending is None and tx.execute(expired).first() is not None:
        # Its holder saw the deadline before the sweeper did.
        batch = advance(batch, BatchEvent.DEADLINE_PASSED, now=now)
    earlier = tx.execute(
        sa.select(units.c.state, units.c.epoch).where(
            units.c.batch_id == batch.id, units.c.kind == UnitKind.FINALIZE
        )
    ).all()
    if all(UnitState(unit.state) in TERMINAL_UNIT_STATES for unit in earlier):
        batch = advance(batch, BatchEvent.SHARDS_ENDED, now=now)
        save_batch(tx, batch)
        # Epochs go on where those of an earlier one ended: they tell the files of two apart.
        unit = new_unit(batch, UnitKind.FINALIZE, now=now, ordinal=len(earlier))
        unit["epoch"] = max((one.epoch for one in earlier), default=0)
        # To write the files asks of a worker what the shards did.
        unit["format_version"] = tx.execute(
            sa.select(sa.func.max(units.c.format_version)).where(units.c.batch_id == batch.id)
        ).scalar_one()
        tx.execute(sa.insert(units).values(unit))
    return batch


def insert_unit(tx: Transaction, batch: Batch, kind: UnitKind, *, now: datetime) -> None:
    """Insert the only unit of this kind that the batch has."""
    # An older program would refuse what it does not know.
    format_version = MIXED_FORMAT if batch.endpoint == MIXED else PLAIN_FORMAT
    unit = new_unit(batch, kind, now=now, format_version=format_version)
    tx.execute(sa.insert(units).values(unit))


def new_unit(
    batch: Batch,
    kind: UnitKind,
    *,
    now: datetime,
    ordinal: int = 0,
    model_key: str | None = None,
    format_version: int = PLAIN_FORMAT,
) -> dict[str, object]:
    """Return the columns of a pending unit."""
    return {
        "id": mint_unit_id(),
        "batch_id": batch.id,
        "kind": str(kind),
        "ordinal": ordinal,
        "model_key": model_key,
        "priority": batch.priority,
        "deadline_at": batch.deadline_at,
        "state": str(UnitState.PENDING),
        "not_before": now,
        "format_version": format_version,
    }


def insert_event(tx: Transaction, batch: Batch, *, now: datetime) -> None:
    """Note that the batch ended, for whoever tells the client."""
    tx.execute(
        sa.insert(outbox).values(
            id=mint("evt_"),
            batch_id=batch.id,
            event=f"batch.{batch.status}",
            payload={"id": batch.id, "status": str(batch.status)},
            created_at=now,
            not_before=now,
        )
    )


def lock_unit(tx: Transaction, lease: Lease) -> bool:
    """Lock the lease's unit and return True; False when this lease has already ended it.

    False means that the reply to an earlier, identical call was lost.

    Raises:
        LeaseLost: the unit was reaped, or is somebody else's.
    """
    row = tx.execute(
        sa.select(units.c.state, units.c.epoch, units.c.owner)
        .where(units.c.id == lease.unit_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    if row is not None and row.epoch == lease.epoch:
        if row.state == UnitState.LEASED:
            return True
        # A reap would have raised the epoch, so this very lease settled it.
        if row.state == UnitState.PENDING or row.owner == lease.owner:
            return False
    raise LeaseLost(f"The lease of unit {lease.unit_id} (epoch {lease.epoch}) is no longer held.")


def end_unit(tx: Transaction, lease: Lease, state: UnitState, *, reason: str) -> None:
    """Write the end of a unit whose lease is locked."""
    tx.execute(
        sa.update(units)
        .where(
            units.c.id == lease.unit_id,
            units.c.epoch == lease.epoch,
            units.c.state == UnitState.LEASED,
        )
        .values(state=str(state), last_exit=reason)
    )
