"""Which deaths of an engine count against its device."""

from dataclasses import dataclass

import pytest

from engine.deaths import DeathBudget

WINDOW = 100.0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget(clock: Clock) -> DeathBudget:
    return DeathBudget(max_deaths=3, window_seconds=WINDOW, clock=clock)


def ids(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def test_deaths_without_a_suspect_count_at_once(budget: DeathBudget) -> None:
    for number in range(3):
        assert (budget.num_deaths, budget.problem, budget.spent_seconds) == (number, None, 0.0)
        budget.note_death()
    assert budget.num_deaths == 3
    assert budget.problem is not None
    assert "3 times" in budget.problem


def test_death_counts_once_its_last_suspect_came_through(budget: DeathBudget) -> None:
    budget.note_death(ids(1, 2, 3))
    assert not budget.note_result(9)
    for request_id in (1, 3):
        assert budget.note_result(request_id)
        assert budget.num_deaths == 0
    budget.note_result(2)
    assert budget.num_deaths == 1
    assert not budget.note_result(2)


def test_line_that_is_found_by_halves_costs_nothing(budget: DeathBudget) -> None:
    suspects = list(range(256))
    poison = 77
    while len(suspects) > 1:
        budget.note_death(frozenset(suspects))
        half = suspects[: len(suspects) // 2]
        other = suspects[len(suspects) // 2 :]
        for cleared in other if poison in half else half:
            budget.note_result(cleared)
        suspects = half if poison in half else other
    assert budget.num_deaths == 0
    for _ in range(2):
        budget.note_death(ids(poison))
    budget.note_death(ids(poison), convicted=poison)
    assert budget.num_deaths == 0
    for request_id in range(256):
        assert not budget.note_result(request_id), "nobody is suspected any more"


def test_conviction_of_one_does_not_explain_the_deaths_of_others(budget: DeathBudget) -> None:
    budget.note_death(ids(1, 2))
    budget.note_death(ids(3))
    budget.note_death(ids(1), convicted=1)
    budget.note_result(2)
    assert budget.num_deaths == 0
    budget.note_result(3)
    assert budget.num_deaths == 1


def test_line_that_kills_now_and_then_takes_its_deaths_back_when_it_is_convicted(
    budget: DeathBudget,
) -> None:
    budget.note_death(ids(1, 2))
    budget.note_result(1)
    budget.note_result(2)
    assert budget.num_deaths == 1, "it came through once"
    budget.note_death(ids(2), convicted=2)
    assert budget.num_deaths == 0


def test_rest_ends_when_the_oldest_death_leaves_the_window(
    budget: DeathBudget, clock: Clock
) -> None:
    for at in (0.0, 10.0, 20.0, 30.0):
        clock.now = at
        budget.note_death()
    assert budget.spent_seconds == WINDOW + 10.0 - 30.0, "three within the window are too many"
    clock.now = WINDOW + 9.0
    assert budget.problem is not None
    clock.now = WINDOW + 10.0
    assert (budget.spent_seconds, budget.num_deaths) == (0.0, 2)
    assert not budget.problem


def test_death_counts_from_when_it_happened_and_not_from_when_it_was_cleared(
    budget: DeathBudget, clock: Clock
) -> None:
    budget.note_death(ids(1))
    clock.now = WINDOW - 1
    budget.note_result(1)
    assert budget.num_deaths == 1
    clock.now = WINDOW
    assert budget.num_deaths == 0


def test_suspects_that_somebody_else_will_run_are_forgotten_and_deaths_that_count_stay(
    budget: DeathBudget,
) -> None:
    budget.note_death(ids(1))
    budget.note_result(1)
    budget.note_death(ids(2))
    budget.forget_suspects()
    assert not budget.note_result(2)
    assert budget.num_deaths == 1
    budget.note_death(ids(1), convicted=1)
    assert budget.num_deaths == 1, "that is another request under the same id"
