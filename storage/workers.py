"""Workers, for people who look; a lease, not a heartbeat, says whether one is alive."""

from dataclasses import asdict, dataclass, fields
from datetime import datetime

import sqlalchemy as sa

from jobs.domain.ids import WorkerId
from storage.database import Transaction, reads, writes
from storage.tables import workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A process that runs units, as of its last heartbeat."""

    id: WorkerId
    boot_id: str
    started_at: datetime
    heartbeat_at: datetime
    gpu: str | None = None
    model_key: str | None = None
    draining: bool = False
    engine_epoch: int = 0
    recent_deaths: int = 0


_NAMES = tuple(field.name for field in fields(Worker))


def _from_row(row: sa.RowMapping) -> Worker:
    return Worker(**{name: row[name] for name in _NAMES})


@writes
def heartbeat(tx: Transaction, worker: Worker) -> None:
    """Write how a worker is; its recent deaths are counted by `shards.report_death`."""
    columns = asdict(worker)
    first = tx.execute(sa.select(workers.c.id).where(workers.c.id == worker.id)).first() is None
    if first:
        tx.execute(sa.insert(workers).values(columns))
        return
    del columns["recent_deaths"], columns["started_at"]
    tx.execute(sa.update(workers).where(workers.c.id == worker.id).values(columns))


@reads
def list_recent(tx: Transaction, *, since: datetime) -> list[Worker]:
    """Return the workers heard of since then, in the order they started."""
    rows = tx.execute(
        sa.select(workers).where(workers.c.heartbeat_at >= since).order_by(workers.c.id)
    ).mappings()
    return [_from_row(row) for row in rows]


@writes
def remove(tx: Transaction, worker_id: WorkerId) -> None:
    """Forget a worker that ended."""
    tx.execute(sa.delete(workers).where(workers.c.id == worker_id))
