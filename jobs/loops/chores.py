"""What the whole system does once in a while: audits of a few batches, removing what is not needed.

Each chore has a row that says when it is due, so of all processes one does it. Logs of engines are
of one machine, so each process looks after those in its own folder.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from jobs import audit, collector, metrics
from jobs.domain.errors import NotFound
from jobs.domain.ids import BatchId
from jobs.loops.turns import Crew, Stopped
from jobs.telemetry import log
from storage import audits, chores, workers

_AUDIT, _COLLECT = "audit", "collect"
_LOOK_SECONDS = 30.0
_GO_ON = timedelta(seconds=60)
_RECENT = timedelta(days=1)


class ChoreLoop:
    """Does the chores that are due."""

    def __init__(self, crew: Crew, *, on_progress: Callable[[int], None] = lambda _n: None) -> None:
        """Look after the database, blobs and folder of `crew`.

        Args:
            on_progress: called with a number that changes while a chore gets on.
        """
        self._crew = crew
        self._app = crew.app
        self._on_progress = on_progress
        self._logs_after = 0.0

    def turn(self) -> bool:
        """Do what is due, then wait until it is time to look again."""
        with suppress(Stopped):
            self.look_after()
        every = (self._app.settings.audit.every_seconds, self._app.settings.collect.every_seconds)
        self._crew.stopping.wait(min([_LOOK_SECONDS, *(s / 2 for s in every if s)]))
        return True

    def look_after(self) -> None:
        """Do each chore that is due.

        Raises:
            Stopped: the process is to end.
        """
        app = self._app
        every = app.settings.audit.every_seconds
        if every and chores.claim(app.db, _AUDIT, every_seconds=every) is not None:
            self._audit()
        every = app.settings.collect.every_seconds
        turn = chores.claim(app.db, _COLLECT, every_seconds=every) if every else None
        if turn is not None:
            self._collect(turn)
        if every and time.monotonic() >= self._logs_after:
            self._logs_after = time.monotonic() + every
            self._remove_logs()

    def _audit(self) -> None:
        app = self._app
        batch_ids = audits.sample(
            app.db,
            ended_since=app.db.now() - _RECENT,
            limit=app.settings.audit.num_batches,
        )
        for batch_id in batch_ids:
            with suppress(NotFound):
                self._audit_one(batch_id)

    def _audit_one(self, batch_id: BatchId) -> None:
        app = self._app
        report = audit.audit(
            app.db,
            app.blobs,
            batch_id,
            grace_seconds=2 * app.settings.leases.lease_seconds,
            on_progress=self._note,
        )
        metrics.count_audit(report.violated)
        for check in report.checks:
            if not check.ok:
                log.error(
                    "audit_failed",
                    batch_id=batch_id,
                    check=check.name,
                    num_problems=check.num_problems,
                    told=check.told,
                )
        if not report.violated:
            log.info("audited", batch_id=batch_id, num_lines=report.num_lines)

    def _collect(self, turn: chores.Turn) -> None:
        app = self._app
        found = collector.collect(
            app.db,
            app.blobs,
            collector.Rules(**app.settings.collect.model_dump(exclude={"every_seconds"})),
            place=turn.place,
            stop=self._crew.stopping.is_set,
            on_progress=self._on_progress,
        )
        due_at = app.db.now() + _GO_ON if found.place is not None else None
        chores.leave(app.db, turn, place=found.place, due_at=due_at)
        if found.found:
            log.info(
                "collected",
                expired_files=found.expired_files,
                old_segments=found.old_segments,
                expired_answers=found.expired_answers,
                orphans=found.orphans,
                uploads=found.uploads,
                num_bytes=found.num_bytes,
            )

    def _remove_logs(self) -> None:
        now = self._app.db.now()
        since = timedelta(seconds=self._app.settings.collect.orphan_seconds)
        alive = {one.id for one in workers.list_recent(self._app.db, since=now - _RECENT)}
        removed = collector.remove_engine_logs(
            self._app.folder, alive={*alive, self._crew.worker_id}, before=now - since
        )
        metrics.count_collected("log", removed)

    def _note(self, num_lines: int) -> None:
        """Pass on how far an audit is.

        Raises:
            Stopped: the process is to end.
        """
        if self._crew.stopping.is_set():
            raise Stopped("Told to stop.")
        self._on_progress(num_lines)
