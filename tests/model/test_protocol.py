"""The protocol holds in every state it can reach, and each of its guards is missed when it is gone.

`pytest -s` prints the shortest way to what breaks.
"""

import pytest

from tests.model.protocol import Guard, Protocol, Rule
from tests.model.search import Found, search

G, R = Guard, Rule
STATUSES = frozenset(
    {"validating", "in_progress", "finalizing", "cancelling"}
    | {"completed", "expired", "cancelled", "failed"}
)
PUBLISHED = frozenset({R.COMPLETE, R.UNIQUE})


def look(
    *without: Guard,
    rules: frozenset[Rule] = frozenset(Rule),
    lines: tuple[int, ...] = (2,),
    loses_rows: bool = False,
) -> Found:
    protocol = Protocol(lines=lines, without=frozenset(without), loses_rows=loses_rows)
    found = search(protocol, rules=rules)
    print(f"\n{found}")
    return found


def test_nothing_is_lost_doubled_or_stuck_with_two_workers_and_a_shard_of_two_lines() -> None:
    found = look()
    assert found.broken is None, found
    assert found.statuses == STATUSES
    assert found.num_states > 40_000


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_stuck_with_two_workers_and_two_shards() -> None:
    found = look(lines=(1, 1))
    assert found.broken is None, found
    assert found.statuses == STATUSES
    assert found.num_states > 100_000


@pytest.mark.parametrize(
    ("guard", "broken", "trace"),
    [
        (
            G.RECORD_EPOCH,
            R.FENCED,
            [
                "A claims the plan",
                "A records the plan",
                "A claims the shard",
                "A writes a blob of lines 0, 1",
                "A settles it as pending; the reply is lost",
                "B claims the shard",
                "A commits lines 0, 1",
            ],
        ),
        (
            G.RECORD_STATE,
            R.FINAL,
            [
                "A claims the plan",
                "A records the plan",
                "A claims the shard",
                "A writes a blob of lines 0, 1",
                "A settles it as failed; the reply is lost",
                "A commits lines 0, 1",
            ],
        ),
        (
            G.SETTLE_FENCE,
            R.FENCED,
            ["A claims the plan", "the lease of the plan is reaped", "A settles it as failed"],
        ),
        (
            G.PLAN_FENCE,
            R.FENCED,
            ["A claims the plan", "the lease of the plan is reaped", "A records the plan"],
        ),
        (
            G.COMPLETE_FENCE,
            R.FENCED,
            [
                "the client cancels",
                "A claims the files",
                "A writes the files",
                "the lease of the files is reaped",
                "A publishes the files",
            ],
        ),
        # A holder whose lease was reaped takes the pending unit for one that it released itself.
        (
            G.REAP_EPOCH,
            R.TOLD,
            ["A claims the plan", "the lease of the plan is reaped", "A records the plan"],
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Guard) else None,
)
def test_without_this_guard_a_rule_breaks(guard: Guard, broken: Rule, trace: list[str]) -> None:
    found = look(guard)
    assert (found.broken, list(found.trace)) == (broken, trace)


SPARES = (
    # Each of these is one of two or more that stand before the same fault.
    G.RECORD_OVERLAP,
    G.RECORD_KEY,
    G.SETTLE_STATE,
    G.PLAN_ONCE,
    G.PLAN_STATUS,
    G.PLAN_KEY,
    G.COMPLETE_STATUS,
    G.CANCEL_STATUS,
    G.FROZEN,
    G.RECOUNT,
    G.CLAIM_STATE,
    G.CLAIM_LOCK,
    G.RELEASE_STOP,
    G.SWEEP_STOP,
    G.END_ADVANCE,
    G.SWEEP_ADVANCE,
)


@pytest.mark.slow
@pytest.mark.parametrize("guard", SPARES, ids=lambda guard: guard.name)
def test_this_guard_alone_may_fail(guard: Guard) -> None:
    # One line is enough for a second commit of it, and a sixth of the states of two.
    found = look(guard, lines=(1,))
    assert found.broken is None, found


@pytest.mark.parametrize(
    ("without", "broken", "num_steps", "last"),
    [
        # A commit that is repeated because its reply was lost.
        ({G.RECORD_OVERLAP, G.RECORD_KEY}, R.ROWS, 6, "A commits line 1"),
        # A commit of a lease that was given away, of a line that the next holder did.
        ({G.RECORD_EPOCH, G.RECORD_OVERLAP}, R.ROWS, 9, "B commits lines 0, 1"),
        ({G.SETTLE_STATE, G.FROZEN}, R.FINAL, 3, "A settles it as pending"),
        ({G.CANCEL_STATUS, G.FROZEN}, R.FINAL, 3, "the client cancels"),
        # A finalizer that published, was not told, and now believes that the input is gone.
        (
            {G.COMPLETE_FENCE, G.COMPLETE_STATUS, G.FROZEN},
            R.FINAL,
            7,
            "A has lost the input",
        ),
        (
            {G.PLAN_FENCE, G.PLAN_ONCE, G.PLAN_STATUS, G.PLAN_KEY},
            R.ONE_PLAN,
            3,
            "A records the plan",
        ),
        ({G.CLAIM_STATE, G.CLAIM_LOCK}, R.ONE_LEASE, 4, "B takes the plan it chose"),
        ({G.RELEASE_STOP, G.SWEEP_STOP}, R.ENDS, 3, "A settles it as pending"),
        ({G.END_ADVANCE, G.SWEEP_ADVANCE}, R.ENDS, 1, "the client cancels"),
    ],
    ids=lambda value: (
        "+".join(sorted(guard.name for guard in value)) if isinstance(value, set) else None
    ),
)
def test_without_these_guards_together_a_rule_breaks(
    without: set[Guard], broken: Rule, num_steps: int, last: str
) -> None:
    found = look(*without, rules=frozenset({broken}))
    assert (found.broken, len(found.trace), found.trace[-1]) == (broken, num_steps, last)


@pytest.mark.slow
def test_a_doubled_line_is_not_published_while_the_finalizer_counts() -> None:
    """Whoever doubled it: here, a commit without its epoch and its overlap."""
    doubled = {G.RECORD_EPOCH, G.RECORD_OVERLAP}
    assert look(*doubled, rules=PUBLISHED, lines=(1,)).broken is None
    found = look(*doubled, G.RECOUNT, rules=PUBLISHED, lines=(1,))
    assert found.broken is R.UNIQUE
    assert found.trace[-1].endswith("publishes the files")


@pytest.mark.slow
def test_a_lost_row_is_not_published_as_a_gap_while_the_finalizer_counts() -> None:
    assert look(rules=PUBLISHED, lines=(1,), loses_rows=True).broken is None
    found = look(G.RECOUNT, rules=PUBLISHED, loses_rows=True)
    assert found.broken is R.COMPLETE
    assert list(found.trace[-4:]) == [
        "A claims the files",
        "the row of a segment of lines 0, 1 is lost",
        "A writes the files",
        "A publishes the files",
    ]
