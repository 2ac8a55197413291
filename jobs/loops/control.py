"""Plans batches and writes their files: one claimed unit in a turn."""

import time
from collections.abc import Callable
from contextlib import suppress

from engine.sandbox import Sandbox
from jobs import finalizer, intake, lengths, metrics
from jobs.domain.batch import LineProblem
from jobs.domain.errors import BatchctlError, BlobCorrupt, BlobMissing, LeaseLost
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.retry import Settlement, decide
from jobs.domain.shard import Lease, UnitKind, UnitState
from jobs.loops.turns import Crew, Stopped
from jobs.telemetry import bound, log
from jobs.wakeups import Hint
from storage import batches, units


class ControlLoop:
    """Runs plan and finalize units."""

    def __init__(
        self,
        crew: Crew,
        *,
        checker: Sandbox,
        on_progress: Callable[[str, int], None] | None = None,
    ) -> None:
        """Work with the leases of `crew`.

        Args:
            checker: tries the schemas of a batch while it is planned.
            on_progress: called with "planning" or "finalizing" and a number of lines.
        """
        self._crew = crew
        self._app = crew.app
        self._checker = checker
        self._on_progress = on_progress

    def turn(self) -> bool:
        """Claim and run one unit; return whether there was one."""
        crew = self._crew
        lease = units.claim(
            self._app.db,
            worker_id=crew.worker_id,
            boot_id=crew.boot_id,
            kinds=(UnitKind.PLAN, UnitKind.FINALIZE),
            model_keys=None,
            lease_seconds=crew.times.lease_seconds,
        )
        if lease is None:
            return False
        progress = _Progress(self._note_progress)
        crew.keeper.hold(
            lease, progress=progress.read, on_lost=_ignore, on_stopping=lambda _u, _s: None
        )
        began, outcome = time.monotonic(), "failed"
        try:
            with bound(unit_id=lease.unit_id, batch_id=lease.batch_id):
                outcome = self._run(lease, progress)
        except LeaseLost:
            outcome = "lost"
            log.info("lease_lost", unit_id=lease.unit_id)
        except Stopped:
            outcome = "released"
            self._release(lease)
        except finalizer.InputLost as error:
            log.error("batch_failed", batch_id=lease.batch_id, code=error.code)
            problem = LineProblem(code=error.code, message=error.message)
            batches.give_up(self._app.db, lease, errors=[problem])
        except BatchctlError as error:
            outcome = "retried"
            self._settle(lease, error)
            if not crew.fail_without_engine:
                raise
            log.error(
                "unit_failed",
                unit_id=lease.unit_id,
                kind=lease.kind,
                code=error.code,
                error=error.message,
            )
        finally:
            crew.keeper.drop(lease)
            metrics.count_unit(
                lease.kind, lease.model_key, outcome=outcome, seconds=time.monotonic() - began
            )
        self._app.doorbell.hint(Hint.PROGRESS, lease.batch_id)
        self._app.doorbell.announce()
        if lease.kind is UnitKind.FINALIZE and outcome == "done":
            self._learn(lease.batch_id)
        return True

    def _learn(self, batch_id: BatchId) -> None:
        """Note how long the answers were, for batches to come; what goes wrong costs only that."""
        if not self._app.plan_limits().by_template:
            return
        try:
            lengths.learn(self._app.db, self._app.blobs, batch_id)
        except BatchctlError as error:
            log.warning("lengths_not_learned", batch_id=batch_id, code=error.code)

    def _run(self, lease: Lease, progress: "_Progress") -> str:
        """Run a unit; return how it ended."""
        app = self._app
        if lease.kind is UnitKind.FINALIZE:
            note = progress.phase("finalizing")
            try:
                finalizer.finalize(app.db, app.blobs, lease, cache=app.cache, on_progress=note)
            except (BlobCorrupt, BlobMissing):
                if not finalizer.run_lost_again(app.db, app.blobs, lease, on_progress=note):
                    raise
                return "repaired"
            return "done"
        intake.plan(
            app.db,
            app.blobs,
            lease,
            describe=app.describe,
            checker=self._checker,
            limits=app.plan_limits(),
            cache=app.cache,
            on_progress=progress.phase("planning"),
        )
        return "done"

    def _note_progress(self, phase: str, num_lines: int) -> None:
        """Pass on how far a unit is.

        Raises:
            Stopped: it is to be given back.
        """
        if self._crew.stopping.is_set():
            raise Stopped("Told to stop.")
        if self._on_progress is not None:
            self._on_progress(phase, num_lines)

    def _settle(self, lease: Lease, error: BatchctlError) -> None:
        policy = self._crew.policy
        settlement = decide(
            finished=False,
            stopped=None,
            # A plan or a file can always be written later; only lines ever end with an error.
            retryable=True,
            attempt=min(lease.attempt, policy.max_attempts - 1),
            policy=policy,
            rng=self._crew.rng,
            reason=f"{error.code}: {error.message}",
        )
        with suppress(LeaseLost):
            units.settle(self._app.db, lease, settlement)

    def _release(self, lease: Lease) -> None:
        with suppress(LeaseLost):
            units.settle(self._app.db, lease, Settlement(state=UnitState.PENDING, exit="released"))


class _Progress:
    """How many lines a unit has gone through."""

    def __init__(self, note: Callable[[str, int], None]) -> None:
        self._note = note
        self._num_lines = 0

    def read(self) -> int:
        return self._num_lines

    def phase(self, name: str) -> Callable[[int], None]:
        """Return what to call with the number of lines."""

        def note(num_lines: int) -> None:
            self._num_lines = num_lines
            self._note(name, num_lines)

        return note


def _ignore(_unit_id: UnitId) -> None:
    """Leave it to the fence: every write of a lost lease is refused."""
