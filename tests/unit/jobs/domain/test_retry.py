import random

import pytest

from jobs.domain.retry import RetryPolicy, Settlement, decide
from jobs.domain.shard import UnitState

POLICY = RetryPolicy(max_attempts=4, base_seconds=1.0, max_seconds=5.0)


def settle(
    *,
    finished: bool = False,
    stopped: UnitState | None = None,
    retryable: bool = True,
    attempt: int = 1,
    reason: str = "",
    seed: int = 0,
) -> Settlement:
    return decide(
        finished=finished,
        stopped=stopped,
        retryable=retryable,
        attempt=attempt,
        policy=POLICY,
        rng=random.Random(seed),
        reason=reason,
    )


@pytest.mark.parametrize("stopped", [None, UnitState.CANCELLED])
@pytest.mark.parametrize("retryable", [False, True])
def test_finished_unit_is_done_whatever_else_happened(
    stopped: UnitState | None,
    retryable: bool,  # noqa: FBT001
) -> None:
    done = settle(finished=True, stopped=stopped, retryable=retryable, attempt=99)
    assert done == Settlement(state=UnitState.DONE, exit="done")


@pytest.mark.parametrize("stopped", [UnitState.CANCELLED, UnitState.EXPIRED])
def test_unit_of_a_stopped_batch_ends_as_the_batch_does(stopped: UnitState) -> None:
    assert settle(stopped=stopped, retryable=False) == Settlement(state=stopped, exit=str(stopped))


def test_unit_fails_at_once_when_trying_again_cannot_help() -> None:
    assert settle(retryable=False, reason="x: y") == Settlement(state=UnitState.FAILED, exit="x: y")


def test_unit_fails_after_its_last_attempt() -> None:
    assert settle(attempt=3).state is UnitState.PENDING
    assert settle(attempt=4) == Settlement(state=UnitState.FAILED, exit="attempts_exhausted")


@pytest.mark.parametrize(("attempt", "ceiling"), [(1, 1.0), (2, 2.0), (3, 4.0)])
def test_pause_is_spread_below_a_ceiling_that_doubles(attempt: int, ceiling: float) -> None:
    pauses = [settle(attempt=attempt, seed=seed).delay_seconds for seed in range(200)]
    assert all(0 <= pause <= ceiling for pause in pauses)
    assert max(pauses) > 0.9 * ceiling
    assert min(pauses) < 0.1 * ceiling


def test_pause_has_a_limit() -> None:
    policy = RetryPolicy(max_attempts=1000, base_seconds=1.0, max_seconds=5.0)
    late = decide(
        finished=False,
        stopped=None,
        retryable=True,
        attempt=900,
        policy=policy,
        rng=random.Random(1),
    )
    assert 0 <= late.delay_seconds <= 5.0
