"""Workers, for people who look; a lease, not a heartbeat, says whether one is alive."""

from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from jobs.domain.ids import WorkerId
from storage.database import Transaction, reads, writes
from storage.tables import workers

WorkerRole = Literal["engine", "control"]
WorkerState = Literal["starting", "loading", "idle", "working", "quarantined", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A process that runs units, as of its last heartbeat.

    Attributes:
        gpu: what the device is called, such as "cuda:0 NVIDIA H100 (GPU-...)" or "cpu".
        model_key: the model that is loaded.
        models: names of the models that it serves.
        num_shards: shards that it holds now.
        tokens_per_second: computed tokens, over the last seconds.
        recent_deaths: of its engine, as far as no request explains them.
    """

    id: WorkerId
    boot_id: str
    started_at: datetime
    heartbeat_at: datetime
    host: str = ""
    pid: int = 0
    role: WorkerRole = "engine"
    gpu: str | None = None
    models: tuple[str, ...] = ()
    model_key: str | None = None
    state: WorkerState = "starting"
    num_shards: int = 0
    tokens_per_second: float = 0.0
    draining: bool = False
    engine_epoch: int = 0
    recent_deaths: int = 0


_NAMES = tuple(field.name for field in fields(Worker))


def _from_row(row: sa.RowMapping) -> Worker:
    values = {name: row[name] for name in _NAMES}
    return Worker(**values | {"models": tuple(row["models"])})


@writes
def heartbeat(tx: Transaction, worker: Worker) -> None:
    """Write how a worker is."""
    columns = asdict(worker)
    first = tx.execute(sa.select(workers.c.id).where(workers.c.id == worker.id)).first() is None
    if first:
        tx.execute(sa.insert(workers).values(columns))
        return
    del columns["started_at"]
    tx.execute(sa.update(workers).where(workers.c.id == worker.id).values(columns))


@reads
def list_recent(tx: Transaction, *, since: datetime) -> list[Worker]:
    """Return the workers heard of since then, by their ids."""
    rows = tx.execute(
        sa.select(workers).where(workers.c.heartbeat_at >= since).order_by(workers.c.id)
    ).mappings()
    return [_from_row(row) for row in rows]


@writes
def remove(tx: Transaction, worker_id: WorkerId) -> None:
    """Forget a worker that ended."""
    tx.execute(sa.delete(workers).where(workers.c.id == worker_id))


@writes
def remove_silent(tx: Transaction, *, before: datetime) -> int:
    """Forget the workers last heard of before then; return how many."""
    return tx.execute(sa.delete(workers).where(workers.c.heartbeat_at < before)).rowcount
