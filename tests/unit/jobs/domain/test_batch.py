from datetime import timedelta

import pytest

from jobs.domain.batch import (
    TERMINAL_STATUSES,
    BatchEnding,
    BatchEvent,
    BatchStatus,
    advance,
)
from jobs.domain.errors import IllegalTransition
from tests.builders import START, make_batch

S, E = BatchStatus, BatchEvent
NOW = START + timedelta(hours=1)

# The contract's table (section 5.3); a cancel while files are written is accepted and changes
# nothing, and a deadline changes the status only once the shards have ended. What is not here is
# illegal.
EXPECTED = {
    (S.VALIDATING, E.PLANNED): S.IN_PROGRESS,
    (S.VALIDATING, E.REFUSED): S.FAILED,
    (S.VALIDATING, E.CANCEL_REQUESTED): S.CANCELLING,
    (S.VALIDATING, E.DEADLINE_PASSED): S.VALIDATING,
    (S.VALIDATING, E.SHARDS_ENDED): S.FINALIZING,
    (S.IN_PROGRESS, E.SHARDS_ENDED): S.FINALIZING,
    (S.IN_PROGRESS, E.CANCEL_REQUESTED): S.CANCELLING,
    (S.IN_PROGRESS, E.DEADLINE_PASSED): S.IN_PROGRESS,
    (S.FINALIZING, E.CANCEL_REQUESTED): S.FINALIZING,
    (S.FINALIZING, E.WRITTEN): S.COMPLETED,
    (S.CANCELLING, E.CANCEL_REQUESTED): S.CANCELLING,
    (S.CANCELLING, E.DEADLINE_PASSED): S.CANCELLING,
    (S.CANCELLING, E.SHARDS_ENDED): S.CANCELLING,
    (S.CANCELLING, E.WRITTEN): S.CANCELLED,
    (S.FINALIZING, E.INPUT_LOST): S.FAILED,
    (S.CANCELLING, E.INPUT_LOST): S.FAILED,
    (S.FINALIZING, E.RESULTS_LOST): S.IN_PROGRESS,
    (S.CANCELLING, E.RESULTS_LOST): S.CANCELLING,
    (S.CANCELLED, E.CANCEL_REQUESTED): S.CANCELLED,
}
INSTANTS = {
    S.IN_PROGRESS: "in_progress_at",
    S.FINALIZING: "finalizing_at",
    S.COMPLETED: "completed_at",
    S.FAILED: "failed_at",
    S.EXPIRED: "expired_at",
    S.CANCELLING: "cancelling_at",
    S.CANCELLED: "cancelled_at",
}


@pytest.mark.parametrize("event", BatchEvent)
@pytest.mark.parametrize("status", BatchStatus)
def test_status_and_event_lead_where_the_contract_says(
    status: BatchStatus, event: BatchEvent
) -> None:
    batch = make_batch(status=status)
    expected = EXPECTED.get((status, event))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"{batch.id} is {status}"):
            advance(batch, event, now=NOW)
        return
    after = advance(batch, event, now=NOW)
    assert after.status is expected
    entered = expected is not status
    for entry, name in INSTANTS.items():
        assert getattr(after, name) == (NOW if entered and entry is expected else None)


def test_nothing_but_a_repeated_cancel_is_legal_in_a_terminal_status() -> None:
    legal = {pair for pair in EXPECTED if pair[0] in TERMINAL_STATUSES}
    assert legal == {(S.CANCELLED, E.CANCEL_REQUESTED)}
    assert {status for status in S if status.is_terminal} == TERMINAL_STATUSES


def test_batch_past_its_deadline_ends_expired() -> None:
    batch = advance(make_batch(status=S.IN_PROGRESS), E.DEADLINE_PASSED, now=NOW)
    assert batch.ending is BatchEnding.EXPIRED
    batch = advance(batch, E.SHARDS_ENDED, now=NOW)
    assert (batch.status, batch.ending) == (S.FINALIZING, BatchEnding.EXPIRED)
    assert advance(batch, E.WRITTEN, now=NOW).status is S.EXPIRED


def test_batch_never_planned_before_its_deadline_ends_expired() -> None:
    batch = advance(make_batch(), E.DEADLINE_PASSED, now=NOW)
    batch = advance(advance(batch, E.SHARDS_ENDED, now=NOW), E.WRITTEN, now=NOW)
    assert batch.status is S.EXPIRED


def test_first_reason_to_end_is_kept() -> None:
    batch = advance(make_batch(status=S.IN_PROGRESS), E.CANCEL_REQUESTED, now=NOW)
    batch = advance(batch, E.DEADLINE_PASSED, now=NOW)
    assert batch.ending is BatchEnding.CANCELLED
    late = advance(make_batch(status=S.FINALIZING), E.CANCEL_REQUESTED, now=NOW)
    assert late.ending is BatchEnding.COMPLETED


def test_instants_are_never_cleared_or_changed() -> None:
    batch = advance(make_batch(), E.PLANNED, now=NOW)
    batch = advance(batch, E.CANCEL_REQUESTED, now=NOW + timedelta(seconds=1))
    batch = advance(batch, E.CANCEL_REQUESTED, now=NOW + timedelta(seconds=2))
    batch = advance(batch, E.WRITTEN, now=NOW + timedelta(seconds=3))
    assert batch.in_progress_at == NOW
    assert batch.cancelling_at == NOW + timedelta(seconds=1)
    assert batch.cancelled_at == NOW + timedelta(seconds=3)
    assert batch.finalizing_at is None


def test_batch_that_lost_results_may_end_in_every_way_again() -> None:
    batch = advance(make_batch(status=S.IN_PROGRESS, in_progress_at=START), E.SHARDS_ENDED, now=NOW)
    batch = advance(batch, E.RESULTS_LOST, now=NOW + timedelta(hours=1))
    assert (batch.status, batch.ending) == (S.IN_PROGRESS, None)
    assert (batch.in_progress_at, batch.finalizing_at) == (START, None)
    assert advance(batch, E.CANCEL_REQUESTED, now=NOW).ending is BatchEnding.CANCELLED
    later = advance(batch, E.SHARDS_ENDED, now=NOW + timedelta(hours=2))
    assert later.finalizing_at == NOW + timedelta(hours=2)


@pytest.mark.parametrize("event", [E.CANCEL_REQUESTED, E.DEADLINE_PASSED])
def test_batch_that_was_stopped_and_lost_results_ends_as_it_would_have(event: BatchEvent) -> None:
    batch = advance(make_batch(status=S.IN_PROGRESS), event, now=NOW)
    stopped = batch.ending
    batch = advance(advance(batch, E.SHARDS_ENDED, now=NOW), E.RESULTS_LOST, now=NOW)
    assert batch.ending is stopped
