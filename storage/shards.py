"""Shards: which lines a unit runs, which are done, and which are suspected of killing engines."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import sqlalchemy as sa

from jobs.domain.errors import LeaseLost, NotFound
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.shard import Lease, Shard, UnitState
from storage.database import Transaction, reads, writes
from storage.tables import line_faults, shards, units, workers
from storage.transitions import lock_unit

_CODE = "engine_crash"
_NOT_COLUMNS = frozenset({"suspects", "solo_crashes"})
_PLAIN = tuple(field.name for field in fields(Shard) if field.name not in _NOT_COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A line that killed an engine while it ran alone: how often, and whose."""

    unit_id: UnitId
    position: int
    solo_crashes: int
    workers: tuple[str, ...]


def shard_from_row(row: sa.RowMapping, solo_crashes: Sequence[tuple[int, int]]) -> Shard:
    """Return the shard that `row` of the table is."""
    return Shard(
        **{name: row[name] for name in _PLAIN},
        suspects=tuple(tuple(group) for group in row["suspects"]),
        solo_crashes=tuple(solo_crashes),
    )


@reads
def get(tx: Transaction, unit_id: UnitId) -> Shard:
    """Return a shard.

    Raises:
        NotFound: there is none.
    """
    row = tx.execute(sa.select(shards).where(shards.c.unit_id == unit_id)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"No such shard: {unit_id}")
    faults = tx.execute(
        sa.select(line_faults.c.position, line_faults.c.solo_crashes)
        .where(line_faults.c.unit_id == unit_id)
        .order_by(line_faults.c.position)
    )
    return shard_from_row(row, [(fault.position, fault.solo_crashes) for fault in faults])


@reads
def list_for_batch(tx: Transaction, batch_id: BatchId) -> list[tuple[Shard, UnitState]]:
    """Return the shards of a batch in the order of its lines, each with its unit's state."""
    faults: dict[str, list[tuple[int, int]]] = {}
    for fault in tx.execute(
        sa.select(line_faults.c.unit_id, line_faults.c.position, line_faults.c.solo_crashes)
        .join(shards, shards.c.unit_id == line_faults.c.unit_id)
        .where(shards.c.batch_id == batch_id)
        .order_by(line_faults.c.position)
    ):
        faults.setdefault(fault.unit_id, []).append((fault.position, fault.solo_crashes))
    rows = tx.execute(
        sa.select(shards, units.c.state)
        .join(units, units.c.id == shards.c.unit_id)
        .where(shards.c.batch_id == batch_id)
        .order_by(shards.c.ordinal)
    ).mappings()
    return [
        (shard_from_row(row, faults.get(row["unit_id"], ())), UnitState(row["state"]))
        for row in rows
    ]


@writes
def report_death(
    tx: Transaction,
    lease: Lease,
    *,
    suspects: Sequence[Sequence[int]],
    solo_crash: int | None = None,
    exit_reason: str = _CODE,
) -> None:
    """Write which positions are suspected after an engine died under a lease that is kept.

    Args:
        suspects: groups of positions, each to run in an engine's life of its own; replaces what
            was there.
        solo_crash: the position that was alone in the engine when it died. Counted once more at
            every call.

    Raises:
        LeaseLost: the shard is no longer ours.
    """
    if not lock_unit(tx, lease):
        raise LeaseLost(f"Unit {lease.unit_id} has ended; nothing is suspected of it any more.")
    _write_suspects(tx, lease, suspects)
    tx.execute(sa.update(units).where(units.c.id == lease.unit_id).values(last_exit=exit_reason))
    tx.execute(
        sa.update(workers)
        .where(workers.c.id == lease.owner)
        .values(recent_deaths=workers.c.recent_deaths + 1)
    )
    if solo_crash is None:
        return
    here = (line_faults.c.unit_id == lease.unit_id) & (line_faults.c.position == solo_crash)
    fault = tx.execute(sa.select(line_faults).where(here)).one_or_none()
    if fault is None:
        tx.execute(
            sa.insert(line_faults).values(
                unit_id=lease.unit_id,
                position=solo_crash,
                solo_crashes=1,
                workers=[lease.owner],
                code=_CODE,
            )
        )
    else:
        tx.execute(
            sa.update(line_faults)
            .where(here)
            .values(
                solo_crashes=fault.solo_crashes + 1,
                workers=sorted({*fault.workers, lease.owner}),
            )
        )


@writes
def set_suspects(tx: Transaction, lease: Lease, *, suspects: Sequence[Sequence[int]]) -> None:
    """Write the groups of positions that are still suspected, after one of them was cleared.

    Raises:
        LeaseLost: the shard is no longer ours.
    """
    if lock_unit(tx, lease):
        _write_suspects(tx, lease, suspects)


def _write_suspects(tx: Transaction, lease: Lease, suspects: Sequence[Sequence[int]]) -> None:
    tx.execute(
        sa.update(shards)
        .where(shards.c.unit_id == lease.unit_id)
        .values(suspects=[list(group) for group in suspects])
    )


@reads
def list_faults(tx: Transaction, unit_id: UnitId) -> list[Fault]:
    """Return the lines of a shard that killed engines alone, and on which workers."""
    rows = tx.execute(
        sa.select(line_faults)
        .where(line_faults.c.unit_id == unit_id)
        .order_by(line_faults.c.position)
    )
    return [
        Fault(
            unit_id=row.unit_id,
            position=row.position,
            solo_crashes=row.solo_crashes,
            workers=tuple(row.workers),
        )
        for row in rows
    ]
