"""Routes of workers: who works for this system, and how it goes."""

from datetime import datetime, timedelta
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from jobs.api.context import InContext, unix
from storage import workers
from storage.workers import Worker, WorkerRole, WorkerState

router = APIRouter(prefix="/v1/workers", tags=["workers"])

_SHOWN_LOST = timedelta(minutes=10)
_QUARANTINED = (
    "Its engine died {} times lately and no request is to blame; see its log, and look at the "
    "device. It will try again by itself."
)


class WorkerObject(BaseModel):
    """A process that plans, runs or finalizes, as of its last heartbeat."""

    id: str
    object: Literal["worker"] = "worker"
    host: str
    pid: int
    role: WorkerRole
    device: str | None = Field(description="What it is pinned to.")
    models: list[str] = Field(description="What it serves.")
    model: str | None = Field(description="What is loaded.")
    state: WorkerState | Literal["lost"]
    num_shards: int = Field(description="Shards that it holds.")
    tokens_per_second: float
    recent_deaths: int = Field(
        description="How often its engine died lately without a request being to blame."
    )
    reason: str | None = Field(description="Why it rests, where it is quarantined.")
    started_at: int
    heartbeat_at: int
    heartbeat_age_seconds: float


class WorkerList(BaseModel):
    """All workers."""

    object: Literal["list"] = "list"
    data: list[WorkerObject]


@router.get("", operation_id="listWorkers", summary="List workers")
def list_workers(context: InContext) -> WorkerList:
    """List the workers that live, and for ten minutes those that were lost."""
    db, lost_seconds = context.app.db, context.app.settings.worker.lost_seconds
    now = db.now()
    found = workers.list_recent(db, since=now - timedelta(seconds=lost_seconds) - _SHOWN_LOST)
    return WorkerList(data=[_describe(one, now=now, lost_seconds=lost_seconds) for one in found])


def _describe(worker: Worker, *, now: datetime, lost_seconds: float) -> WorkerObject:
    age = max(0.0, (now - worker.heartbeat_at).total_seconds())
    state: WorkerState | Literal["lost"] = worker.state
    if age > lost_seconds:
        state = "lost"
    elif worker.draining:
        state = "draining"
    return WorkerObject(
        id=worker.id,
        host=worker.host,
        pid=worker.pid,
        role=worker.role,
        device=worker.gpu,
        models=list(worker.models),
        model=worker.model_key,
        state=state,
        num_shards=worker.num_shards,
        tokens_per_second=worker.tokens_per_second,
        recent_deaths=worker.recent_deaths,
        reason=_QUARANTINED.format(worker.recent_deaths) if state == "quarantined" else None,
        started_at=unix(worker.started_at),
        heartbeat_at=unix(worker.heartbeat_at),
        heartbeat_age_seconds=round(age, 1),
    )
