"""What becomes of a unit after an attempt: one pure function decides."""

import random
from dataclasses import dataclass

from jobs.domain.shard import UnitState


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how soon an attempt that ended badly is repeated.

    Back-off is full jitter: uniform between 0 and the doubled, capped base.
    """

    max_attempts: int = 10
    base_seconds: float = 1.0
    max_seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What to write about a unit: its state, and for a pending one the seconds to wait."""

    state: UnitState
    delay_seconds: float = 0.0
    exit: str = ""


def decide(
    *,
    finished: bool,
    stopped: UnitState | None,
    retryable: bool,
    attempt: int,
    policy: RetryPolicy,
    rng: random.Random,
    reason: str = "",
) -> Settlement:
    """Return what becomes of a unit whose attempt ended.

    Args:
        finished: every line has a final result.
        stopped: CANCELLED or EXPIRED when the batch was stopped meanwhile.
        retryable: the attempt ended for a reason that may pass.
        attempt: which attempt this was, counted from 1.
    """
    if finished:
        return Settlement(state=UnitState.DONE, exit=reason or "done")
    if stopped is not None:
        return Settlement(state=stopped, exit=reason or str(stopped))
    if not retryable or attempt >= policy.max_attempts:
        return Settlement(state=UnitState.FAILED, exit=reason or "attempts_exhausted")
    ceiling = min(policy.max_seconds, policy.base_seconds * 2 ** (attempt - 1))
    return Settlement(
        state=UnitState.PENDING, delay_seconds=rng.uniform(0, ceiling), exit=reason or "released"
    )
