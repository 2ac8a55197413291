"""A batch, its statuses, and the one table and function through which they change.

    validating ──► in_progress ──► finalizing ──► completed
        │  │            │              └────────► expired
        │  └────────────┴─► cancelling ─────────► cancelled
        └─► failed

A batch that lost results before its files were written goes from finalizing back to in_progress.
A batch whose input is gone before its missing lines could be named fails at the end as well.
A batch past its deadline keeps its status until its shards have ended; `ending` says how the
batch will end once its files are written.

Source: the OpenAI Batch API's eight statuses.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from jobs.domain.errors import IllegalTransition
from jobs.domain.ids import DEFAULT_TENANT, BatchId, FileId, TenantId
from jobs.domain.result import Usage


class BatchStatus(StrEnum):
    """OpenAI's eight statuses."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether a batch in this status never changes again."""
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES = frozenset(
    {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)


class BatchEvent(StrEnum):
    """What can happen to a batch."""

    PLANNED = "planned"
    REFUSED = "refused"
    SHARDS_ENDED = "shards_ended"
    CANCEL_REQUESTED = "cancel_requested"
    DEADLINE_PASSED = "deadline_passed"
    WRITTEN = "written"
    INPUT_LOST = "input_lost"
    RESULTS_LOST = "results_lost"


class BatchEnding(StrEnum):
    """How a batch will end once its files are written."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class LineProblem:
    """One thing wrong with an input file, as the Batch API lists it.

    `line` is the physical line number from 1, or None when the whole file is meant.
    """

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """How many requests a batch has, and how many of them ended which way."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch of requests over one input file.

    With `reuse` it takes answers of earlier batches, `num_reused` of them, and gives its own to
    later ones. Where its lines run on several models it has no `model`, and `models` lists them.
    """

    id: BatchId
    input_file_id: FileId
    endpoint: str
    status: BatchStatus
    created_at: datetime
    completion_window: str
    deadline_at: datetime
    tenant_id: TenantId = DEFAULT_TENANT
    ending: BatchEnding | None = None
    model: str | None = None
    model_override: str | None = None
    on_unsupported_schema: str = "validate"
    priority: int = 0
    errors: tuple[LineProblem, ...] = ()
    num_errors: int = 0
    metadata: dict[str, str] | None = None
    output_expires_after_seconds: int | None = None
    idempotency_key: str | None = None
    request_counts: RequestCounts = field(default_factory=RequestCounts)
    usage: Usage = field(default_factory=Usage)
    planned_at: datetime | None = None
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None
    output_file_id: FileId | None = None
    error_file_id: FileId | None = None
    reuse: bool = False
    num_reused: int = 0
    models: tuple[str, ...] = ()


_S, _E = BatchStatus, BatchEvent
_NEXT: dict[tuple[BatchStatus, BatchEvent], BatchStatus] = {
    (_S.VALIDATING, _E.PLANNED): _S.IN_PROGRESS,
    (_S.VALIDATING, _E.REFUSED): _S.FAILED,
    (_S.VALIDATING, _E.CANCEL_REQUESTED): _S.CANCELLING,
    (_S.VALIDATING, _E.DEADLINE_PASSED): _S.VALIDATING,
    (_S.VALIDATING, _E.SHARDS_ENDED): _S.FINALIZING,
    (_S.IN_PROGRESS, _E.SHARDS_ENDED): _S.FINALIZING,
    (_S.IN_PROGRESS, _E.CANCEL_REQUESTED): _S.CANCELLING,
    (_S.IN_PROGRESS, _E.DEADLINE_PASSED): _S.IN_PROGRESS,
    # A cancel that races the end of the work changes nothing: the files are being written.
    (_S.FINALIZING, _E.CANCEL_REQUESTED): _S.FINALIZING,
    (_S.CANCELLING, _E.CANCEL_REQUESTED): _S.CANCELLING,
    (_S.CANCELLED, _E.CANCEL_REQUESTED): _S.CANCELLED,
    (_S.CANCELLING, _E.DEADLINE_PASSED): _S.CANCELLING,
    (_S.CANCELLING, _E.SHARDS_ENDED): _S.CANCELLING,
    (_S.CANCELLING, _E.WRITTEN): _S.CANCELLED,
    # The lines without a result cannot even be named any more.
    (_S.FINALIZING, _E.INPUT_LOST): _S.FAILED,
    (_S.CANCELLING, _E.INPUT_LOST): _S.FAILED,
    # Segments were damaged before the files were written: their requests run again.
    (_S.FINALIZING, _E.RESULTS_LOST): _S.IN_PROGRESS,
    (_S.CANCELLING, _E.RESULTS_LOST): _S.CANCELLING,
}
_ENDED = {
    BatchEnding.COMPLETED: _S.COMPLETED,
    BatchEnding.CANCELLED: _S.CANCELLED,
    BatchEnding.EXPIRED: _S.EXPIRED,
}


def advance(batch: Batch, event: BatchEvent, *, now: datetime) -> Batch:
    """Return the batch after `event`: its status, its ending and the instant of each first entry.

    Raises:
        IllegalTransition: the table has no such move.
    """
    if event is _E.WRITTEN and batch.status is _S.FINALIZING:
        status = _ENDED[batch.ending or BatchEnding.COMPLETED]
    else:
        try:
            status = _NEXT[batch.status, event]
        except KeyError:
            raise IllegalTransition(
                f"Batch {batch.id} is {batch.status}; it cannot become what {event} would make it."
            ) from None
    changed = replace(batch, status=status, ending=_ending(batch, event, status))
    return changed if status is batch.status else _stamped(changed, now)


def _ending(batch: Batch, event: BatchEvent, status: BatchStatus) -> BatchEnding | None:
    if event is _E.RESULTS_LOST and batch.ending is BatchEnding.COMPLETED:
        return None  # it may be cancelled or expire once more
    if batch.ending is not None:
        return batch.ending
    if event is _E.CANCEL_REQUESTED and status is _S.CANCELLING:
        return BatchEnding.CANCELLED
    if event is _E.DEADLINE_PASSED:
        return BatchEnding.EXPIRED
    return BatchEnding.COMPLETED if status is _S.FINALIZING else None


def _stamped(batch: Batch, now: datetime) -> Batch:
    """Return the batch with the instant of its entry into its status.

    Back in_progress, it keeps the instant of the first time, and has no finalizing_at for now.
    """
    if batch.status is _S.IN_PROGRESS and batch.in_progress_at is not None:
        return replace(batch, finalizing_at=None)
    instants = {
        _S.IN_PROGRESS: "in_progress_at",
        _S.FINALIZING: "finalizing_at",
        _S.COMPLETED: "completed_at",
        _S.FAILED: "failed_at",
        _S.EXPIRED: "expired_at",
        _S.CANCELLING: "cancelling_at",
        _S.CANCELLED: "cancelled_at",
    }
    changes: dict[str, Any] = {instants[batch.status]: now}
    return replace(batch, **changes)
