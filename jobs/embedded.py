"""All of one machine in one process tree: control loop, sweeper, one engine at a time.

    control thread   claims plan and finalize units
    sweeper thread   reaps, expires, advances
    engine thread    runs shards of one model on its engine process, then of the next

`batchctl run` and `batchctl serve` both stand on this; so do the tests.
"""

import fcntl
import os
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from engine.process import ProcessEngine
from engine.sandbox import Sandbox
from engine.supervisor import EngineSupervisor
from jobs import finalizer, intake, runner, sweeper
from jobs.app import App
from jobs.domain.errors import (
    AlreadyLocked,
    BatchctlError,
    EngineError,
    InternalError,
    LeaseLost,
    NotFound,
    StorageError,
)
from jobs.domain.ids import UnitId, WorkerId, mint, mint_worker_id
from jobs.domain.retry import RetryPolicy, Settlement, decide
from jobs.domain.shard import Lease, UnitKind, UnitState
from jobs.feed import FeedSettings
from jobs.leases import LeaseKeeper, LeaseTimes
from jobs.telemetry import log
from storage import units

_FAILURE_PAUSE_SECONDS = 1.0


class FolderLock:
    """Keeps a second process out of a data folder; freed by the kernel when the holder dies."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            AlreadyLocked: another process has it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (folder / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise AlreadyLocked(
                f"Another batchctl (process {holder}) works in {folder}; wait for it, end it, or "
                "choose another folder with --data."
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __enter__(self) -> Self:
        """Hold the lock for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self._file.close()


class Embedded:
    """The loops and the worker of one machine; use as a context manager."""

    def __init__(
        self,
        app: App,
        *,
        fail_without_engine: bool = True,
        on_progress: Callable[[str, int], None] | None = None,
    ) -> None:
        """Prepare to work on `app`.

        Args:
            fail_without_engine: whether shards whose engine cannot be had end with errors; if
                not, work stops and `failure` says why.
            on_progress: called with "planning" or "finalizing" and a number of lines.
        """
        self.app = app
        self.failure: BatchctlError | None = None
        self._fail_without_engine = fail_without_engine
        self._on_progress = on_progress
        self._boot_id = mint("boot_")
        self._worker_id: WorkerId = mint_worker_id()
        leases = app.settings.leases
        self._times = LeaseTimes(
            lease_seconds=leases.lease_seconds,
            renew_seconds=leases.renew_seconds,
            watch_seconds=leases.watch_seconds,
            stall_seconds=leases.stall_seconds,
        )
        retries = app.settings.retries
        self._policy = RetryPolicy(
            max_attempts=retries.max_attempts,
            base_seconds=retries.base_seconds,
            max_seconds=retries.max_seconds,
        )
        self._rng = random.Random()  # noqa: S311 - jitter
        self._keeper = LeaseKeeper(app.db, self._times)
        self._stop = threading.Event()
        self._supervisor: EngineSupervisor | None = None
        self._model: str | None = None
        self._stack = ExitStack()
        self._threads = [
            threading.Thread(target=self._loop, args=(self._control,), name="control"),
            threading.Thread(target=self._loop, args=(self._sweep,), name="sweeper"),
            threading.Thread(target=self._loop, args=(self._work,), name="engine"),
        ]

    def __enter__(self) -> Self:
        """Take over what an earlier process left, and start."""
        if not self.app.db.is_postgres:  # SQLite is this folder's; Postgres may have other workers
            units.reap_other_boots(self.app.db, boot_id=self._boot_id)
        self._sandbox = self._stack.enter_context(_open_sandbox(self.app))
        self._keeper.start()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush what is finished, give the rest back, end the engine."""
        self.stop()
        for thread in self._threads:
            thread.join(timeout=self.app.settings.leases.drain_seconds + 30)
        if self._supervisor is not None:
            self._supervisor.close()
        self._keeper.close()
        self._stack.close()

    @property
    def engine_pid(self) -> int | None:
        """The process id of the engine, or None while there is none."""
        return self._supervisor.pid if self._supervisor is not None else None

    @property
    def engine_starts(self) -> int:
        """How often the present model's engine was started."""
        return self._supervisor.num_starts if self._supervisor is not None else 0

    def stop(self) -> None:
        """Ask every loop to end."""
        self._stop.set()
        self.app.doorbell.announce()

    def _loop(self, turn: Callable[[], bool]) -> None:
        """Repeat a turn; one that found nothing to do waits for the doorbell."""
        idle = self.app.settings.leases.idle_poll_seconds
        rings = self.app.doorbell.wait(0)
        while not self._stop.is_set():
            try:
                busy = turn()
            except BatchctlError as error:
                if error.retryable or self._fail_without_engine:  # else `failure` says it
                    log.error(
                        "loop_failed", loop=turn.__name__, code=error.code, error=error.message
                    )
                if not error.retryable:
                    self._fail(error)
                self._stop.wait(_FAILURE_PAUSE_SECONDS)
                continue
            except Exception as error:  # noqa: BLE001  a fault of ours; the other loops go on
                log.exception("loop_crashed", loop=turn.__name__)
                self._fail(
                    InternalError(f"{type(error).__name__} in {turn.__name__}; see the log.")
                )
                self._stop.wait(_FAILURE_PAUSE_SECONDS)
                continue
            if not busy:
                rings = self.app.doorbell.wait(idle, seen=rings)

    def _fail(self, error: BatchctlError) -> None:
        if self.failure is None:
            self.failure = error
        if not self._fail_without_engine:
            self.stop()

    # --- plan and finalize ---

    def _control(self) -> bool:
        lease = units.claim(
            self.app.db,
            worker_id=self._worker_id,
            boot_id=self._boot_id,
            kinds=(UnitKind.PLAN, UnitKind.FINALIZE),
            model_keys=None,
            lease_seconds=self._times.lease_seconds,
        )
        if lease is None:
            return False
        lines = [0]

        def count(phase: str) -> Callable[[int], None]:
            def note(n: int) -> None:
                lines[0] = n
                if self._on_progress is not None:
                    self._on_progress(phase, n)

            return note

        self._keeper.hold(
            lease, progress=lambda: lines[0], on_lost=_ignore, on_stopping=lambda _u, _s: None
        )
        try:
            if lease.kind is UnitKind.PLAN:
                intake.plan(
                    self.app.db,
                    self.app.blobs,
                    lease,
                    describe=self.app.describe,
                    checker=self._sandbox,
                    limits=self.app.plan_limits(),
                    on_progress=count("planning"),
                )
            else:
                finalizer.finalize(
                    self.app.db, self.app.blobs, lease, on_progress=count("finalizing")
                )
        except LeaseLost:
            log.info("lease_lost", unit_id=lease.unit_id)
        except BatchctlError as error:
            self._settle(lease, error)
            if not self._fail_without_engine:
                raise
            log.error("unit_failed", unit_id=lease.unit_id, kind=lease.kind, error=error.message)
        finally:
            self._keeper.drop(lease.unit_id)
        self.app.doorbell.announce()
        return True

    def _settle(self, lease: Lease, error: BatchctlError) -> None:
        settlement = decide(
            finished=False,
            stopped=None,
            # A plan or a file can always be written later; only lines ever end with an error.
            retryable=True,
            attempt=min(lease.attempt, self._policy.max_attempts - 1),
            policy=self._policy,
            rng=self._rng,
            reason=f"{error.code}: {error.message}",
        )
        with suppress(LeaseLost):
            units.settle(self.app.db, lease, settlement)

    # --- sweep ---

    def _sweep(self) -> bool:
        swept = sweeper.tick(self.app.db, rng=self._rng)
        if swept.reaped or swept.expired or swept.finished:
            log.info("swept", reaped=swept.reaped, expired=swept.expired, done=swept.finished)
            self.app.doorbell.announce()
        self._stop.wait(self._times.lease_seconds / 6)
        return True

    # --- run shards ---

    def _work(self) -> bool:
        model = self._next_model()
        if model is None:
            return False
        try:
            supervisor = self._engine_for(model)
            runner.work(
                runner.WorkerContext(
                    db=self.app.db,
                    blobs=self.app.blobs,
                    keeper=self._keeper,
                    doorbell=self.app.doorbell,
                    worker_id=self._worker_id,
                    boot_id=self._boot_id,
                    settings=self._feed_settings(),
                ),
                supervisor,
                model_keys=[model],
                stop=self._stop,
            )
        except (EngineError, NotFound) as error:
            self._close_engine()
            if self._stop.is_set():
                return False
            if not self._fail_without_engine:
                self._fail(error)
                return False
            log.error("engine_unavailable", model=model, code=error.code, error=error.message)
            self._end_one_shard(model, error)
        except StorageError as error:
            if self._fail_without_engine:
                raise
            self._fail(error)  # the feed has been patient already
            return False
        return True

    def _next_model(self) -> str | None:
        """Return a model that has work now: the present one if it has, else who waits longest."""
        now = self.app.db.now()
        waiting = [
            (one.oldest_at, one.model_key)
            for one in units.list_pending(self.app.db)
            if one.kind is UnitKind.SHARD and one.model_key is not None and one.oldest_at <= now
        ]
        if not waiting:
            return None
        if any(model == self._model for _, model in waiting):
            return self._model
        return min(waiting)[1]

    def _engine_for(self, model: str) -> EngineSupervisor:
        if self._supervisor is None or self._model != model:
            self._close_engine()
            config = self.app.engine_config(model)
            leases = self.app.settings.leases
            self._model = model
            self._supervisor = EngineSupervisor(
                lambda: ProcessEngine(
                    config,
                    model=model,
                    log_path=self.app.folder / "engine.log",
                    stall_seconds=leases.stall_seconds,
                )
            )
        return self._supervisor

    def _close_engine(self) -> None:
        if self._supervisor is not None:
            self._supervisor.close()
        self._supervisor = None
        self._model = None

    def _end_one_shard(self, model: str, error: BatchctlError) -> None:
        """Let a shard whose engine cannot be had wait, or end it after enough attempts."""
        lease = units.claim(
            self.app.db,
            worker_id=self._worker_id,
            boot_id=self._boot_id,
            kinds=(UnitKind.SHARD,),
            model_keys=[model],
            lease_seconds=self._times.lease_seconds,
        )
        if lease is None:
            return
        settlement: Settlement = decide(
            finished=False,
            stopped=None,
            retryable=error.retryable,
            attempt=lease.attempt,
            policy=self._policy,
            rng=self._rng,
            reason=f"{error.code}: {error.message}",
        )
        if settlement.state is not UnitState.PENDING:
            log.error("shard_failed", unit_id=lease.unit_id, code=error.code)
        units.settle(self.app.db, lease, settlement)
        self.app.doorbell.announce()

    def _feed_settings(self) -> FeedSettings:
        segments = self.app.settings.segments
        leases = self.app.settings.leases
        return FeedSettings(
            flush_results=segments.max_results,
            flush_bytes=segments.max_bytes,
            flush_seconds=segments.max_age_seconds,
            poll_seconds=min(0.5, leases.idle_poll_seconds),
            lease_seconds=leases.lease_seconds,
        )


def _ignore(_unit_id: UnitId) -> None:
    """Leave it to the fence: every write of a lost lease is refused."""


def _open_sandbox(app: App) -> Sandbox:
    limits = app.settings.sandbox
    return Sandbox(
        cpu_seconds=limits.cpu_seconds,
        wall_seconds=limits.wall_seconds,
        memory_bytes=limits.memory_bytes,
    )
