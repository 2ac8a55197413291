"""GET /metrics, for Prometheus: this process, and what the database says of the whole system.

With an `api_key` it asks for that key, like everything that tells of the work; without one the
server answers loopback only, and so does this.
"""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from jobs import metrics
from jobs.domain.batch import BatchStatus
from jobs.domain.errors import BatchctlError
from jobs.domain.shard import UnitKind
from jobs.telemetry import log
from storage import statistics
from storage.database import Database
from storage.statistics import Statistics

router = APIRouter(tags=["health"])

_FRESH_SECONDS = 5.0
_WORKERS_SINCE = timedelta(minutes=10)
_SILENT_SECONDS = 30.0


class SystemCollector(Collector):
    """Reads the numbers of the whole system when it is scraped, at most every few seconds."""

    def __init__(self, db: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read from `db`; `clock` says how old the last numbers are."""
        self._db = db
        self._clock = clock
        self._lock = threading.Lock()
        self._read_at = -_FRESH_SECONDS
        self._last: Statistics | None = None

    @override
    def collect(self) -> Iterator[Metric]:
        found = self._read()
        up = GaugeMetricFamily("batchctl_database_up", "Whether the database answered.")
        up.add_metric((), 0.0 if found is None else 1.0)
        yield up
        if found is not None:
            yield from _queues(found)
            yield from _batches(found)
            yield from _workers(found)

    def _read(self) -> Statistics | None:
        # Under the lock: two scrapers at once cost the database one read.
        with self._lock:
            if self._clock() - self._read_at >= _FRESH_SECONDS:
                try:
                    self._last = statistics.read(self._db, workers_since=_WORKERS_SINCE)
                except BatchctlError as error:
                    log.warning("metrics_not_read", code=error.code)
                    self._last = None
                self._read_at = self._clock()
            return self._last


async def _system_of(request: Request) -> SystemCollector:
    system: SystemCollector = request.app.state.system
    return system


@router.get(
    "/metrics",
    operation_id="getMetrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics(system: Annotated[SystemCollector, Depends(_system_of)]) -> Response:
    """Show the metrics of this process and of the whole system, as Prometheus reads them."""
    return Response(metrics.render(system), media_type=metrics.CONTENT_TYPE)


def _queues(found: Statistics) -> Iterator[Metric]:
    depth = GaugeMetricFamily(
        "batchctl_queue_units",
        "Units that have not ended, by kind, model and state: ready, waiting or leased.",
        labels=("kind", "model", "state"),
    )
    oldest = GaugeMetricFamily(
        "batchctl_queue_oldest_seconds",
        "How long the first unit that is ready has waited.",
        labels=("kind", "model"),
    )
    requests = GaugeMetricFamily(
        "batchctl_queue_requests",
        "Requests without a durable result, in shards that have not ended.",
        labels=("model",),
    )
    for queue in found.queues:
        kind, model = str(queue.kind), queue.model_key or ""
        for state in ("ready", "waiting", "leased"):
            depth.add_metric((kind, model, state), getattr(queue, state))
        oldest.add_metric((kind, model), queue.oldest_seconds)
        if queue.kind is UnitKind.SHARD:
            requests.add_metric((model,), queue.num_requests)
    return iter((depth, oldest, requests))


def _batches(found: Statistics) -> Iterator[Metric]:
    family = GaugeMetricFamily("batchctl_batches", "Batches by status.", labels=("status",))
    for status in BatchStatus:
        family.add_metric((str(status),), found.batches.get(status, 0))
    yield family


def _workers(found: Statistics) -> Iterator[Metric]:
    ages = GaugeMetricFamily(
        "batchctl_worker_heartbeat_age_seconds",
        "Time since a worker's last sign of life; one that ended in order is not listed.",
        labels=("worker",),
    )
    for worker_id, age in found.heartbeats.items():
        ages.add_metric((worker_id,), age)
    alive = sum(age < _SILENT_SECONDS for age in found.heartbeats.values())
    states = GaugeMetricFamily("batchctl_workers", "Workers by state.", labels=("state",))
    states.add_metric(("alive",), alive)
    states.add_metric(("silent",), len(found.heartbeats) - alive)
    states.add_metric(("draining",), found.num_draining)
    states.add_metric(("quarantined",), found.num_quarantined)
    return iter((ages, states))
