"""Shows that a worker is there, how it is, and which models it serves."""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from jobs.app import App
from jobs.domain.errors import StorageError
from jobs.domain.request import Capabilities
from jobs.domain.shard import UnitKind
from jobs.loops.turns import Crew
from jobs.loops.work import WorkLoop
from jobs.telemetry import log
from jobs.worker import capabilities
from storage import workers
from storage.workers import Worker, WorkerState

_LONGEST_OFFER_PAUSE_SECONDS = 300.0


class Presence:
    """A worker's row, written at intervals; use as a context manager.

    The row goes with the worker that ends in order; that of one that was killed grows old.
    """

    def __init__(
        self, app: App, crew: Crew, *, device: str, work: Callable[[], WorkLoop | None]
    ) -> None:
        """Prepare to show a worker.

        Args:
            device: what it runs on, for people.
            work: returns its work loop, once it has one.
        """
        self._app = app
        self._crew = crew
        self._device = device
        self._work = work
        self._started_at = app.db.now()
        self._wanted: tuple[str, ...] = ()
        self._served: tuple[str, ...] = ()
        self._counted = (time.monotonic(), 0)
        self._offer_at = 0.0
        self._offer_pause = 0.0
        self._is_failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def __enter__(self) -> Self:
        """Write the row, then again at intervals.

        Raises:
            StorageError: the database is away.
        """
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the row away."""
        self._stop.set()
        self._thread.join(timeout=5)
        try:
            workers.remove(self._app.db, self._crew.worker_id)
        except StorageError as failure:
            log.warning("worker_not_removed", code=failure.code)

    # --- models ---

    def offer(self) -> None:
        """Publish the models of this worker and let its loop serve those that it may."""
        chosen = self._app.settings.worker
        self._wanted = chosen.models or tuple(self._app.settings.models)
        self._publish(self._wanted)
        # A rival that was killed counts as alive for so long.
        self._offer_pause = chosen.lost_seconds
        self._offer_at = time.monotonic() + self._offer_pause

    @property
    def serves_nothing(self) -> bool:
        """Whether every model that it is for has been refused, or not been published yet."""
        return bool(self._wanted) and not self._served

    def offer_again(self) -> None:
        """Try the models again that were refused before; what was in their way may be gone."""
        refused = tuple(name for name in self._wanted if name not in self._served)
        if refused and time.monotonic() >= self._offer_at:
            self._publish(refused, say=False)
            self._offer_pause = min(_LONGEST_OFFER_PAUSE_SECONDS, 2 * self._offer_pause)
            self._offer_at = time.monotonic() + self._offer_pause

    def offer_loaded(self, found: Capabilities) -> bool:
        """Publish what a loaded engine says of itself; return whether it may serve."""
        return capabilities.publish_loaded(self._app, found, worker_id=self._crew.worker_id)

    def do_others_serve(self, model: str) -> bool:
        """Return whether another live worker says that it serves a model."""
        alive_since = self._app.db.now() - timedelta(seconds=self._app.settings.worker.lost_seconds)
        return any(
            model in other.models and not other.draining and other.id != self._crew.worker_id
            for other in workers.list_recent(self._app.db, since=alive_since)
        )

    def _publish(self, names: tuple[str, ...], *, say: bool = True) -> None:
        try:
            found = capabilities.publish(self._app, names, worker_id=self._crew.worker_id, say=say)
        except StorageError as error:
            log.warning("models_not_published", code=error.code)
            return
        self._served = tuple(name for name in self._wanted if name in {*self._served, *found})
        work = self._work()
        if work is not None:
            work.serve(self._served)

    # --- signs of life ---

    def _run(self) -> None:
        while not self._stop.wait(self._app.settings.worker.heartbeat_seconds):
            try:
                self._beat()
                self.offer_again()
                self._is_failing = False
            except StorageError as error:
                if not self._is_failing:
                    log.warning("heartbeat_failed", code=error.code)
                self._is_failing = True
            except Exception:  # noqa: BLE001  a worker that works and looks dead helps nobody
                log.exception("heartbeat_crashed")

    def _beat(self) -> None:
        crew, work = self._crew, self._work()
        is_draining = crew.stopping.is_set()
        avoided = work.unavailable_models if work is not None else frozenset()
        workers.heartbeat(
            self._app.db,
            Worker(
                id=crew.worker_id,
                boot_id=crew.boot_id,
                started_at=self._started_at,
                heartbeat_at=self._app.db.now(),
                host=socket.gethostname(),
                pid=os.getpid(),
                role="control" if self._app.settings.worker.role == "control" else "engine",
                gpu=self._device,
                models=tuple(name for name in self._served if name not in avoided),
                model_key=work.model if work is not None else None,
                state=self._state(work),
                num_shards=work.num_shards if work is not None else 0,
                tokens_per_second=self._tokens_per_second(work),
                draining=is_draining,
                engine_epoch=work.num_engine_starts if work is not None else 0,
                recent_deaths=work.num_unexplained_deaths if work is not None else 0,
            ),
        )

    def _state(self, work: WorkLoop | None) -> WorkerState:
        crew = self._crew
        if crew.stopping.is_set():
            return "draining"
        if self._app.settings.worker.role != "control":
            return "starting" if work is None else work.state
        num_units = sum(crew.keeper.num_held(kind) for kind in (UnitKind.PLAN, UnitKind.FINALIZE))
        return "working" if num_units else "idle"

    def _tokens_per_second(self, work: WorkLoop | None) -> float:
        now, num_tokens = time.monotonic(), work.num_tokens if work is not None else 0
        before, num_before = self._counted
        self._counted = (now, num_tokens)
        return (num_tokens - num_before) / max(now - before, 0.001)
