"""Shards: which lines a unit runs, which are done, and which are suspected of killing engines."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from jobs.domain.errors import LeaseLost, NotFound
from jobs.domain.ids import BatchId, UnitId, WorkerId
from jobs.domain.shard import Fault, Lease, Shard, Trial, UnitState
from storage.database import Transaction, reads, writes
from storage.tables import line_faults, shards, units, workers
from storage.transitions import lock_unit

_CODE = "engine_crash"
_HERE = "here"
"""Where a worker without a row is: on the only machine there is."""
_NOT_COLUMNS = frozenset({"suspects", "faults", "trial"})
_PLAIN = tuple(field.name for field in fields(Shard) if field.name not in _NOT_COLUMNS)


def shard_from_row(row: sa.RowMapping, faults: Sequence[Fault]) -> Shard:
    """Return the shard that `row` of the table is."""
    trial = row["trial"]
    return Shard(
        **{name: row[name] for name in _PLAIN},
        suspects=tuple(tuple(group) for group in row["suspects"]),
        faults=tuple(faults),
        trial=Trial(owner=WorkerId(trial["owner"]), positions=tuple(trial["positions"]))
        if trial is not None
        else None,
    )


def _fault_from_row(row: sa.Row[Any]) -> Fault:
    return Fault(position=row.position, solo_crashes=row.solo_crashes, places=tuple(row.workers))


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
        sa.select(line_faults)
        .where(line_faults.c.unit_id == unit_id)
        .order_by(line_faults.c.position)
    )
    return shard_from_row(row, [_fault_from_row(fault) for fault in faults])


@reads
def list_for_batch(tx: Transaction, batch_id: BatchId) -> list[tuple[Shard, UnitState]]:
    """Return the shards of a batch in the order of its lines, each with its unit's state."""
    faults: dict[str, list[Fault]] = {}
    for fault in tx.execute(
        sa.select(line_faults)
        .join(shards, shards.c.unit_id == line_faults.c.unit_id)
        .where(shards.c.batch_id == batch_id)
        .order_by(line_faults.c.position)
    ):
        faults.setdefault(fault.unit_id, []).append(_fault_from_row(fault))
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
    num_crashes: int = 1,
    exit_reason: str = _CODE,
) -> Fault | None:
    """Write which positions are suspected after an engine died under a lease that is kept.

    Args:
        suspects: groups of positions, each to run in an engine's life of its own; replaces what
            was there.
        solo_crash: the position that was alone in the engine when it died; its fault is returned.
        num_crashes: how often it has been by now, so that a repeated call counts nothing twice.

    Raises:
        LeaseLost: the shard is no longer ours.
    """
    if not lock_unit(tx, lease):
        raise LeaseLost(f"Unit {lease.unit_id} has ended; nothing is suspected of it any more.")
    _update(tx, lease, suspects=[list(group) for group in suspects])
    tx.execute(sa.update(units).where(units.c.id == lease.unit_id).values(last_exit=exit_reason))
    if solo_crash is None:
        return None
    return _note_solo(tx, lease, solo_crash, num_crashes=num_crashes, owner=lease.owner)


@writes
def report_worker_death(
    tx: Transaction,
    lease: Lease,
    *,
    suspects: Sequence[Sequence[int]],
    died: Trial | None,
    num_crashes: int = 1,
) -> Fault | None:
    """Write which positions are suspected because workers died before they had done anything.

    From now on each group of the shard is noted by `begin_trial` before it runs.

    Args:
        suspects: groups of positions; replaces what was there.
        died: what the worker before this one ran when it died, as far as it is not done. Of one
            position alone the fault is returned.
        num_crashes: how often that one has been alone by now.

    Raises:
        LeaseLost: the shard is no longer ours.
    """
    if not lock_unit(tx, lease):
        raise LeaseLost(f"Unit {lease.unit_id} has ended; nothing is suspected of it any more.")
    _update(
        tx,
        lease,
        suspects=[list(group) for group in suspects],
        trial={"owner": lease.owner, "positions": []},
    )
    if died is None:
        return None
    # To know more than before is progress, and there is an end to halving.
    tx.execute(sa.update(units).where(units.c.id == lease.unit_id).values(num_stalls=0))
    if len(died.positions) != 1:
        return None
    (position,) = died.positions
    return _note_solo(tx, lease, position, num_crashes=num_crashes, owner=died.owner)


@writes
def begin_trial(tx: Transaction, lease: Lease, *, positions: Sequence[int]) -> None:
    """Note which lines of a shard will run by themselves, before they do; the last ones are done.

    Raises:
        LeaseLost: the shard is no longer ours.
    """
    if not lock_unit(tx, lease):
        raise LeaseLost(f"Unit {lease.unit_id} has ended; nothing of it is tried any more.")
    _update(tx, lease, trial={"owner": lease.owner, "positions": list(positions)})


def _update(tx: Transaction, lease: Lease, **columns: object) -> None:
    tx.execute(sa.update(shards).where(shards.c.unit_id == lease.unit_id).values(columns))


def _note_solo(
    tx: Transaction, lease: Lease, position: int, *, num_crashes: int, owner: WorkerId
) -> Fault:
    """Return a line's fault after noting a death that it was alone in."""
    place = _place_of(tx, owner)
    here = (line_faults.c.unit_id == lease.unit_id) & (line_faults.c.position == position)
    row = tx.execute(sa.select(line_faults).where(here)).one_or_none()
    known = {*row.workers} if row is not None else set()
    fault = Fault(
        position=position, solo_crashes=num_crashes, places=tuple(sorted({*known, place}))
    )
    columns = {"solo_crashes": fault.solo_crashes, "workers": list(fault.places)}
    if row is None:
        key = {"unit_id": lease.unit_id, "position": position, "code": _CODE}
        tx.execute(sa.insert(line_faults).values(columns | key))
    else:
        tx.execute(sa.update(line_faults).where(here).values(columns))
    return fault


def _place_of(tx: Transaction, owner: WorkerId) -> str:
    """Return on which device of which machine a worker is; one that starts again is no other."""
    row = tx.execute(
        sa.select(workers.c.host, workers.c.gpu).where(workers.c.id == owner)
    ).one_or_none()
    return f"{row.host} {row.gpu or 'cpu'}" if row is not None else _HERE


@reads
def list_faults(tx: Transaction, unit_id: UnitId) -> list[Fault]:
    """Return the lines of a shard that were alone when an engine or a worker died, and where."""
    rows = tx.execute(
        sa.select(line_faults)
        .where(line_faults.c.unit_id == unit_id)
        .order_by(line_faults.c.position)
    )
    return [_fault_from_row(row) for row in rows]
