"""Renews leases from a thread beside the work, only while the work makes progress.

    leases   renews, and looks for batches that are stopped; waits for the database
    fence    gives up what could not be renewed; waits for nobody

A lease that is not renewed in time, or that the database gave away, is reported as lost; a batch
that is being cancelled or has passed its deadline is reported as stopping, and faster.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jobs import metrics
from jobs.domain.errors import StorageError
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.shard import Lease, UnitKind, UnitState
from jobs.telemetry import log
from storage import units
from storage.database import Database

SELF_FENCE_SHARE = 0.8
"""Share of a lease after which a holder that could not renew stops by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """How long leases last and how often their holders look at the database, in seconds."""

    lease_seconds: float = 60.0
    renew_seconds: float = 10.0
    watch_seconds: float = 2.0
    stall_seconds: float = 180.0


@dataclass(slots=True)
class _Held:
    lease: Lease
    progress: Callable[[], object]
    on_lost: Callable[[UnitId], None]
    on_stopping: Callable[[UnitId, UnitState], None]
    renewed_at: float
    moved_at: float
    last_progress: object = None
    told: bool = field(default=False)


class LeaseKeeper:
    """Renews all leases of a process, and gives up those that it could not renew in time."""

    def __init__(self, db: Database, times: LeaseTimes) -> None:
        """Keep leases in `db`; call `start` before `hold`."""
        self._db = db
        self._times = times
        self._held: dict[UnitId, _Held] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("leases", self._run), ("fence", self._run_fence))
        ]

    def start(self) -> None:
        """Begin renewing."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop renewing; leases still held run out by themselves."""
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=10)

    def look(self) -> None:
        """Look for stopped batches at once instead of after `watch_seconds`."""
        self._wake.set()

    def hold(
        self,
        lease: Lease,
        *,
        progress: Callable[[], object],
        on_lost: Callable[[UnitId], None],
        on_stopping: Callable[[UnitId, UnitState], None],
    ) -> None:
        """Renew `lease` as long as `progress()` keeps changing.

        Args:
            on_lost: called once, from the keeper's thread, when another worker may own the unit.
            on_stopping: called once with CANCELLED or EXPIRED when the batch is to stop.
        """
        now = time.monotonic()
        with self._lock:
            self._held[lease.unit_id] = _Held(
                lease, progress, on_lost, on_stopping, renewed_at=now, moved_at=now
            )

    def drop(self, lease: Lease) -> None:
        """Stop renewing a lease; a later one of the same unit stays."""
        with self._lock:
            held = self._held.get(lease.unit_id)
            if held is not None and held.lease.epoch == lease.epoch:
                del self._held[lease.unit_id]

    def num_held(self, kind: UnitKind) -> int:
        """Return how many leases of a kind are kept now."""
        with self._lock:
            return sum(held.lease.kind is kind for held in self._held.values())

    def _run(self) -> None:
        renew_at = time.monotonic() + self._times.renew_seconds
        while True:
            self._wake.wait(min(self._times.watch_seconds, self._times.renew_seconds))
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                self._watch()
                if time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + self._times.renew_seconds
                    self._renew()
            except StorageError as error:
                log.warning("lease_renewal_failed", code=error.code)
            except Exception:  # noqa: BLE001  without this thread every lease would be lost
                log.exception("lease_renewal_crashed")

    def _watch(self) -> None:
        with self._lock:
            batch_ids = {held.lease.batch_id for held in self._held.values() if not held.told}
        if not batch_ids:
            return
        stopping: dict[BatchId, UnitState] = units.watch(self._db, sorted(batch_ids))
        for held in self._snapshot():
            state = stopping.get(held.lease.batch_id)
            if state is not None and not held.told:
                held.told = True
                held.on_stopping(held.lease.unit_id, state)

    def _renew(self) -> None:
        now = time.monotonic()
        alive: list[_Held] = []
        for held in self._snapshot():
            progress = held.progress()
            if progress != held.last_progress:
                held.last_progress, held.moved_at = progress, now
            if now - held.moved_at < self._times.stall_seconds:
                alive.append(held)
        if not alive:
            return
        renewed = units.renew(
            self._db, [h.lease for h in alive], lease_seconds=self._times.lease_seconds
        )
        for held in alive:
            if held.lease.unit_id in renewed:
                held.renewed_at = now
            else:
                self._lose(held)

    def _run_fence(self) -> None:
        # A thread of its own: one that waits for a database which does not answer fences nobody.
        lease_seconds = self._times.lease_seconds
        looked_at, not_before = time.monotonic(), 0.0
        while not self._closed.wait(min(self._times.watch_seconds, self._times.renew_seconds)):
            now = time.monotonic()
            if now - looked_at > lease_seconds / 2:
                # This process was stopped. A lease that nobody reaped meanwhile may be renewed yet.
                not_before = now + (1 - SELF_FENCE_SHARE) * lease_seconds
            looked_at = now
            if now < not_before:
                continue
            try:
                self._fence()
            except Exception:  # noqa: BLE001  a fault of who is told must not stop it
                log.exception("lease_fence_crashed")

    def _fence(self) -> None:
        limit = SELF_FENCE_SHARE * self._times.lease_seconds
        for held in self._snapshot():
            if time.monotonic() - held.renewed_at > limit:
                self._lose(held)

    def _lose(self, held: _Held) -> None:
        with self._lock:
            # Given back and claimed again meanwhile, the unit is under another lease of ours.
            if self._held.get(held.lease.unit_id) is not held:
                return
            del self._held[held.lease.unit_id]
        metrics.count_lost_lease()
        log.warning("lease_lost", unit_id=held.lease.unit_id, epoch=held.lease.epoch)
        held.on_lost(held.lease.unit_id)

    def _snapshot(self) -> list[_Held]:
        with self._lock:
            return list(self._held.values())
