"""Looks after what nobody is working on: expired leases, overdue batches, finished shards.

Workers that ended without a word are forgotten after a day.
"""

import random
from dataclasses import dataclass
from datetime import timedelta

from storage import batches, units, workers
from storage.database import Database

_FORGOTTEN = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What one turn found."""

    reaped: int
    expired: int
    finished: int


def tick(db: Database, *, rng: random.Random, reap: bool = True, limit: int = 100) -> Swept:
    """Reap expired leases, stop overdue batches, hand finished ones to the finalizer.

    Any number of processes may do this at the same time; each turn is bounded by `limit`.

    Args:
        reap: whether expired leases are given up in this turn.
    """
    now = db.now()
    reaped = units.reap(db, now=now, limit=limit, rng=rng) if reap else []
    expired = batches.expire_overdue(db, now=now, limit=limit)
    finished = batches.advance_finished(db, limit=limit, now=now)
    workers.remove_silent(db, before=now - _FORGOTTEN)
    return Swept(reaped=len(reaped), expired=len(expired), finished=len(finished))
