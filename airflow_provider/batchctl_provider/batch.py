"""What a batch, as the server describes it, means to a task."""

from typing import Any

from batchctl_provider.client import Batch
from batchctl_provider.exceptions import (
    BatchCancelled,
    BatchExpired,
    BatchFailed,
    BatchNotCompleted,
    TooManyLinesFailed,
)

# An ending batch still runs: what is finished is being written.
_RUNNING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
_COMPLETED, _CANCELLING = "completed", "cancelling"
_FAULTS: dict[str, tuple[type[BatchNotCompleted], str]] = {
    "failed": (BatchFailed, "failed"),
    "expired": (BatchExpired, "was not done within its completion window"),
    "cancelled": (BatchCancelled, "was cancelled"),
}
_SHOWN_PROBLEMS = 10
_MAX_MESSAGE = 300


def is_ended(batch: Batch) -> bool:
    """Return whether the batch never changes again."""
    return batch["status"] not in _RUNNING


def is_spent(batch: Batch, *, max_failed_share: float | None) -> bool:
    """Return whether a task that wants its results has to make another batch."""
    if batch["status"] == _COMPLETED:
        return max_failed_share is not None and failed_share(batch) > max_failed_share
    return is_ended(batch) or batch["status"] == _CANCELLING


def failed_share(batch: Batch) -> float:
    """Return which share of the lines failed, from 0 to 1."""
    counts = batch.get("request_counts") or {}
    total = counts.get("total") or 0
    return (counts.get("failed") or 0) / total if total else 0.0


def check_completed(batch: Batch) -> None:
    """Return if the batch has completed, however its lines did.

    Raises:
        BatchFailed: its input is wrong; the message lists what the server found.
        BatchExpired: it was not done in time.
        BatchCancelled: somebody cancelled it.
        BatchNotCompleted: it has a status that no batch has.
    """
    status = batch["status"]
    if status == _COMPLETED:
        return
    kind, words = _FAULTS.get(status, (BatchNotCompleted, f"has the unknown status {status!r}"))
    raise kind(f"Batch {batch['id']} {words}{_describe_problems(batch)}")


def check_failed_share(batch: Batch, max_failed_share: float) -> None:
    """Return if no larger share of lines failed.

    Raises:
        TooManyLinesFailed: one did.
    """
    if failed_share(batch) > max_failed_share:
        raise TooManyLinesFailed(
            f"{_count_failed(batch)}, which is more than the share of {max_failed_share:g} that "
            "max_failed_share allows; the error file says why."
        )


def warn_of_failed(batch: Batch) -> str | None:
    """Return a sentence on failed lines, if there are any."""
    return f"{_count_failed(batch)}; the error file says why." if failed_share(batch) else None


def _count_failed(batch: Batch) -> str:
    counts = batch["request_counts"]
    return f"{counts['failed']} of {counts['total']} lines of batch {batch['id']} failed"


def _describe_problems(batch: Batch) -> str:
    errors = batch.get("errors") or {}
    problems = errors.get("data") or []
    if not problems:
        return "."
    total = max(errors.get("num_errors") or 0, len(problems))
    lines = [_describe_problem(one) for one in problems[:_SHOWN_PROBLEMS]]
    if total > len(lines):
        lines.append(f"and {total - len(lines)} more")
    return ":\n" + "\n".join(f"  {line}" for line in lines)


def _describe_problem(problem: dict[str, Any]) -> str:
    line, code = problem.get("line"), problem.get("code")
    message = str(problem.get("message") or "")[:_MAX_MESSAGE]
    where = f"line {line}: " if line is not None else ""
    return f"{where}{message}" + (f" ({code})" if code else "")


def summarize(batch: Batch) -> dict[str, Any]:
    """Return the little of a batch that a task hands on."""
    return {
        "batch_id": batch["id"],
        "status": batch["status"],
        "request_counts": dict(batch.get("request_counts") or {}),
        "output_file_id": batch.get("output_file_id"),
        "error_file_id": batch.get("error_file_id"),
    }
