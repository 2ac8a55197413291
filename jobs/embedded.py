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
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from engine.process import ProcessEngine
from engine.sandbox import Sandbox
from engine.supervisor import EngineSupervisor
from jobs import finalizer, intake, runner, sweeper
from jobs.app import App
from jobs.domain.batch import LineProblem
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
from storage import batches, units

MODEL_STAY_SECONDS = 60.0
"""How long a model keeps the engine while another one waits for it."""
_FAILURE_PAUSE_SECONDS = 1.0
_STAY_LOOK_SECONDS = 5.0


class Stopped(BatchctlError):
    """The process is to end; what was begun is given back."""

    code = "stopped"


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
            # The engine's own limit comes first; its restart has a lease's time to show itself.
            stall_seconds=leases.stall_seconds + leases.lease_seconds,
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
        self._model_since = 0.0
        self._may_stay = (0.0, True)
        self._engine_failures = 0
        self._swept_at: tuple[float, float] | None = None
        self._reap_after = 0.0
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
            thread.join()  # each looks at `_stop` often, and every wait of theirs is bounded
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
        progress = _Progress(self)
        self._keeper.hold(
            lease, progress=progress.read, on_lost=_ignore, on_stopping=lambda _u, _s: None
        )
        try:
            self._run_unit(lease, progress)
        except LeaseLost:
            log.info("lease_lost", unit_id=lease.unit_id)
        except Stopped:
            self._release(lease)
        except finalizer.InputLost as error:
            log.error("batch_failed", batch_id=lease.batch_id, code=error.code)
            problem = LineProblem(code=error.code, message=error.message)
            batches.give_up(self.app.db, lease, errors=[problem])
        except BatchctlError as error:
            self._settle(lease, error)
            if not self._fail_without_engine:
                raise
            log.error("unit_failed", unit_id=lease.unit_id, kind=lease.kind, error=error.message)
        finally:
            self._keeper.drop(lease.unit_id)
        self.app.doorbell.announce()
        return True

    def _run_unit(self, lease: Lease, progress: "_Progress") -> None:
        app = self.app
        if lease.kind is UnitKind.FINALIZE:
            note = progress.phase("finalizing")
            finalizer.finalize(app.db, app.blobs, lease, on_progress=note)
            return
        intake.plan(
            app.db,
            app.blobs,
            lease,
            describe=app.describe,
            checker=self._sandbox,
            limits=app.plan_limits(),
            on_progress=progress.phase("planning"),
        )

    def note_progress(self, phase: str, num_lines: int) -> None:
        """Pass on how far a plan or finalize unit is.

        Raises:
            Stopped: it is to be given back.
        """
        if self._stop.is_set():
            raise Stopped("Told to stop.")
        if self._on_progress is not None:
            self._on_progress(phase, num_lines)

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

    def _release(self, lease: Lease) -> None:
        with suppress(LeaseLost):
            units.settle(self.app.db, lease, Settlement(state=UnitState.PENDING, exit="released"))

    # --- sweep ---

    def _sweep(self) -> bool:
        swept = sweeper.tick(self.app.db, rng=self._rng, reap=self._may_reap())
        if swept.reaped or swept.expired or swept.finished:
            log.info("swept", reaped=swept.reaped, expired=swept.expired, done=swept.finished)
            self.app.doorbell.announce()
        self._stop.wait(self.app.settings.leases.reap_seconds)
        return True

    def _may_reap(self) -> bool:
        """Return False for one lease after the machine slept, the clock jumped or we starved.

        Until then, whoever holds a lease may not have had the time to renew it.
        """
        now, wall = time.monotonic(), self.app.db.now().timestamp()
        if self._swept_at is not None:
            gap = max(now - self._swept_at[0], wall - self._swept_at[1])
            if gap > self._times.lease_seconds / 2 + self.app.settings.leases.reap_seconds:
                self._reap_after = now + self._times.lease_seconds
        self._swept_at = (now, wall)
        return now >= self._reap_after

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
                    may_claim=self._may_claim,
                ),
                supervisor,
                model_keys=[model],
                stop=self._stop,
            )
            self._engine_failures = 0
        except (EngineError, NotFound) as error:
            self._close_engine()
            if self._stop.is_set():
                return False
            self._engine_failures += 1
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

    def _waiting_models(self) -> dict[str, datetime]:
        """Return which models have shards that may run now, and since when."""
        now = self.app.db.now()
        return {
            one.model_key: one.oldest_at
            for one in units.list_pending(self.app.db)
            if one.kind is UnitKind.SHARD and one.model_key is not None and one.oldest_at <= now
        }

    def _next_model(self) -> str | None:
        """Return a model that has work now: the present one if it may stay, else the next."""
        waiting = self._waiting_models()
        if self._model in waiting and not self._is_stay_over(waiting):
            return self._model
        others = {model: since for model, since in waiting.items() if model != self._model}
        return min(others or waiting, key=lambda model: waiting[model], default=None)

    def _is_stay_over(self, waiting: dict[str, datetime]) -> bool:
        """Return whether another model has waited long enough behind the present one."""
        if time.monotonic() - self._model_since < MODEL_STAY_SECONDS:
            return False
        patience = self.app.db.now() - timedelta(seconds=MODEL_STAY_SECONDS)
        return any(model != self._model and since < patience for model, since in waiting.items())

    def _may_claim(self) -> bool:
        """Return whether the present model may begin another shard; looks every few seconds."""
        looked_at, may_stay = self._may_stay
        if time.monotonic() - looked_at > _STAY_LOOK_SECONDS:
            may_stay = not self._is_stay_over(self._waiting_models())
            self._may_stay = (time.monotonic(), may_stay)
        return may_stay

    def _engine_for(self, model: str) -> EngineSupervisor:
        if self._supervisor is None or self._model != model:
            self._close_engine()
            config = self.app.engine_config(model)
            leases = self.app.settings.leases
            self._model = model
            self._model_since = time.monotonic()
            self._may_stay = (self._model_since, True)
            self._supervisor = EngineSupervisor(
                lambda: ProcessEngine(
                    config,
                    model=model,
                    log_path=self.app.folder / "engine.log",
                    stall_seconds=leases.stall_seconds,
                    stop=self._stop.is_set,
                ),
                wait=self._stop.wait,
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
            attempt=self._engine_failures,  # claims that a restart gave back are nobody's fault
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


class _Progress:
    """How many lines a plan or finalize unit has gone through."""

    def __init__(self, owner: Embedded) -> None:
        self._owner = owner
        self._num_lines = 0

    def read(self) -> int:
        return self._num_lines

    def phase(self, name: str) -> Callable[[int], None]:
        """Return what to call with the number of lines."""

        def note(num_lines: int) -> None:
            self._num_lines = num_lines
            self._owner.note_progress(name, num_lines)

        return note


def _ignore(_unit_id: UnitId) -> None:
    """Leave it to the fence: every write of a lost lease is refused."""


def _open_sandbox(app: App) -> Sandbox:
    limits = app.settings.sandbox
    return Sandbox(
        cpu_seconds=limits.cpu_seconds,
        wall_seconds=limits.wall_seconds,
        memory_bytes=limits.memory_bytes,
    )
