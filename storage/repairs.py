"""Results that were lost after they were committed: their lines are run again."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from jobs.domain.batch import Batch, BatchEvent, advance
from jobs.domain.errors import NotFound
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.shard import Lease, Segment, UnitKind, UnitState, count_bits, merge_bitmaps
from storage import batches as batch_statements
from storage.database import Transaction, reads, writes
from storage.tables import segments, shards, units
from storage.transitions import (
    advance_if_ended,
    end_unit,
    lock_batch,
    lock_unit,
    save_batch,
    stopped_state,
)

_EXIT = "results_lost"
_SUMS = ("num_completed", "num_failed", "prompt_tokens", "completion_tokens", "cached_tokens")


@reads
def count(tx: Transaction, batch_id: BatchId) -> int:
    """Return how often results of a batch were run again: each time one finalize unit ended so."""
    number: int = tx.execute(
        sa.select(sa.func.count()).where(
            units.c.batch_id == batch_id,
            units.c.kind == UnitKind.FINALIZE,
            units.c.last_exit == _EXIT,
        )
    ).scalar_one()
    return number


@writes
def run_again(
    tx: Transaction, lease: Lease, lost: Sequence[Segment], *, now: datetime | None = None
) -> Batch:
    """Return the batch after taking segments out of it whose results are lost.

    Their shards are what the other segments say, and run again under a higher epoch; the batch
    goes back to in_progress, and gets another finalize unit once its shards have ended again.
    Where the batch was stopped, or the shard had failed, nothing runs: the lines end as errors of
    that kind. A repeated call changes nothing.

    Args:
        lease: of the finalize unit, which ends.

    Raises:
        LeaseLost: another process finalizes this batch.
    """
    if not lock_unit(tx, lease):
        return batch_statements.load(tx, lease.batch_id)
    now = now or tx.now()
    by_unit: dict[UnitId, list[tuple[int, int]]] = defaultdict(list)
    for segment in lost:
        by_unit[segment.unit_id].append((segment.epoch, segment.sequence))
    # Locks in the one order there is: units, their shards, their batch.
    states = {
        row.id: UnitState(row.state)
        for row in tx.execute(
            sa.select(units.c.id, units.c.state)
            .where(units.c.id.in_(sorted(by_unit)), units.c.batch_id == lease.batch_id)
            .order_by(units.c.id)
            .with_for_update(key_share=True)
        )
    }
    for unit_id in sorted(states):
        _take_out(tx, unit_id, by_unit[unit_id])
    batch = lock_batch(tx, lease.batch_id)
    if batch is None:
        raise NotFound(f"No such Batch object: {lease.batch_id}", param="batch_id")
    again = sorted(unit_id for unit_id, state in states.items() if state is UnitState.DONE)
    after = advance(batch, BatchEvent.RESULTS_LOST, now=now)
    for unit_id in again:
        tx.execute(
            sa.update(units)
            .where(units.c.id == unit_id, units.c.state == UnitState.DONE)
            .values(
                state=str(stopped_state(after) or UnitState.PENDING),
                # Whoever ran it before may not write any more, whatever it believes to hold.
                epoch=units.c.epoch + 1,
                owner=None,
                boot_id=None,
                lease_expires_at=None,
                not_before=now,
                last_poked_at=None,
                claims=0,
                num_stalls=0,
                last_exit=_EXIT,
            )
        )
    end_unit(tx, lease, UnitState.FAILED, reason=_EXIT)
    save_batch(tx, after)
    advance_if_ended(tx, after, now=now)
    return batch_statements.load(tx, lease.batch_id)


def _take_out(tx: Transaction, unit_id: UnitId, lost: Sequence[tuple[int, int]]) -> None:
    """Delete segments of a shard and make its row say what the others have."""
    shard = tx.execute(
        sa.select(shards.c.done).where(shards.c.unit_id == unit_id).with_for_update(key_share=True)
    ).one()
    tx.execute(
        sa.delete(segments).where(
            segments.c.unit_id == unit_id,
            sa.tuple_(segments.c.epoch, segments.c.sequence).in_(list(lost)),
        )
    )
    done, sums = bytes(len(shard.done)), dict.fromkeys(_SUMS, 0)
    for row in tx.execute(sa.select(segments).where(segments.c.unit_id == unit_id)).mappings():
        done = merge_bitmaps(done, row["positions"])
        for name in _SUMS:
            sums[name] += row[name]
    tx.execute(
        sa.update(shards)
        .where(shards.c.unit_id == unit_id)
        .values(done=done, num_done=count_bits(done), **sums)
    )
