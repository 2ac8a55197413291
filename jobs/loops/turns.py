"""Repeats the turns of a loop, waits for the doorbell between them, and keeps faults apart.

crew of one process ─┬─ control loop   plan and finalize units
                     ├─ sweep loop     reaps, expires, advances
                     ├─ chore loop     audits, collects
                     └─ work loop      shards on an engine

A fault of one loop never ends another one.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobs import metrics
from jobs.app import App
from jobs.domain.errors import BatchctlError, InternalError
from jobs.domain.ids import WorkerId, mint, mint_worker_id
from jobs.domain.retry import RetryPolicy
from jobs.leases import LeaseKeeper, LeaseTimes
from jobs.telemetry import log
from jobs.wakeups import Hint

_FAILURE_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 15.0


class Stopped(BatchctlError):
    """The process is to end; what was begun is given back."""

    code = "stopped"


class Crew:
    """What the loops of one process share: who they are, their leases and how they end.

    Attributes:
        failure: the first error that ended the work, or that nobody can wait out.
        stopping: set when every loop is to end.
        num_failures: turns that failed, by the loop's name.
    """

    def __init__(
        self,
        app: App,
        *,
        fail_without_engine: bool = True,
        idle_seconds: Callable[[], float] | None = None,
    ) -> None:
        """Prepare to work on `app`.

        Args:
            idle_seconds: how long a loop without work waits for the doorbell; by default as long
                as the settings say.
            fail_without_engine: whether shards whose engine cannot be had end with errors; if
                not, work stops and `failure` says why.
        """
        self.app = app
        self.fail_without_engine = fail_without_engine
        self.failure: BatchctlError | None = None
        self.stopping = threading.Event()
        self.num_failures: Counter[str] = Counter()
        self.boot_id = mint("boot_")
        self.worker_id: WorkerId = mint_worker_id()
        self.rng = random.Random()  # noqa: S311 - jitter
        leases = app.settings.leases
        self.times = LeaseTimes(
            lease_seconds=leases.lease_seconds,
            renew_seconds=leases.renew_seconds,
            watch_seconds=leases.watch_seconds,
            # The engine's own limit comes first; its restart has a lease's time to show itself.
            stall_seconds=leases.stall_seconds + leases.lease_seconds,
        )
        retries = app.settings.retries
        self.policy = RetryPolicy(
            max_attempts=retries.max_attempts,
            base_seconds=retries.base_seconds,
            max_seconds=retries.max_seconds,
        )
        self.keeper = LeaseKeeper(app.db, self.times)
        self._idle_seconds = idle_seconds or (lambda: app.settings.leases.idle_poll_seconds)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the block, leases are renewed, and a hint lets the keeper look at once."""
        self.keeper.start()
        try:
            with self.app.doorbell.listening(Hint.STOPPING, lambda _batch_id: self.keeper.look()):
                yield
        finally:
            self.keeper.close()

    def stop(self) -> None:
        """Ask every loop to end."""
        self.stopping.set()
        self.app.doorbell.announce()

    def fail(self, error: BatchctlError) -> None:
        """Keep the first error; work ends with it where nobody can wait it out."""
        if self.failure is None:
            self.failure = error
        if not self.fail_without_engine:
            self.stop()

    def repeat(self, turn: Callable[[], bool], *, name: str) -> None:
        """Repeat a turn until told to stop; one that found nothing to do waits for the doorbell.

        A turn that fails is logged, counted and repeated after a pause, which grows.
        """
        num_failed = 0
        rings = self.app.doorbell.wait(0)
        while not self.stopping.is_set():
            busy = self.attempt(turn, name=name)
            if busy is None:
                self.stopping.wait(min(_MAX_PAUSE_SECONDS, _FAILURE_PAUSE_SECONDS * 2**num_failed))
                num_failed = min(num_failed + 1, 10)
                continue
            num_failed = 0
            if not busy:
                rings = self.app.doorbell.wait(self._idle_seconds(), seen=rings)

    def attempt(self, turn: Callable[[], bool], *, name: str) -> bool | None:
        """Return whether one turn found something to do, or None when it failed."""
        try:
            return turn()
        except BatchctlError as error:
            self._note_failure(name)
            if error.retryable or self.fail_without_engine:  # else `failure` says it
                log.error("loop_failed", loop=name, code=error.code, error=error.message)
            if not error.retryable:
                self.fail(error)
        except Exception as error:  # noqa: BLE001  a fault of ours; the other loops go on
            self._note_failure(name)
            log.exception("loop_crashed", loop=name)
            self.fail(InternalError(f"{type(error).__name__} in the {name} loop; see the log."))
        return None

    def _note_failure(self, name: str) -> None:
        self.num_failures[name] += 1
        metrics.count_loop_failure(name)
