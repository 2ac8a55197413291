from typing import Any, cast

import pytest

from engine.deaths import DeathBudget
from engine.supervisor import MAX_FRUITLESS_DEATHS, EngineSupervisor
from jobs.domain.errors import (
    EngineDied,
    EngineMisconfigured,
    EngineQuarantined,
    EngineTimedOut,
    EngineUnavailable,
)


class Life:
    """One life of an engine that does nothing."""

    def __init__(self, pid: int, *, is_mute: bool = False) -> None:
        self.pid = pid
        self.num_closed = 0
        self.num_probes = 0
        self._is_mute = is_mute

    def close(self) -> None:
        self.num_closed += 1

    def probe(self) -> None:
        self.num_probes += 1
        if self._is_mute:
            raise EngineDied("It died when it was to answer.")

    def progress(self) -> int:
        return 7


class Lives:
    """Starts lives; some die while they load (`stillborn`), some do not answer (`mute`)."""

    def __init__(self, *, stillborn: range = range(0), mute: range = range(0)) -> None:
        self.started: list[Life] = []
        self.num_starts = 0
        self._stillborn = stillborn
        self._mute = mute

    def start(self) -> Any:  # noqa: ANN401
        self.num_starts += 1
        if self.num_starts - 1 in self._stillborn:
            raise EngineDied("It died while it loaded.")
        is_mute = self.num_starts - 1 in self._mute
        self.started.append(Life(self.num_starts, is_mute=is_mute))
        return self.started[-1]


def supervise(lives: Lives, budget: DeathBudget | None = None) -> EngineSupervisor:
    return EngineSupervisor(lives.start, budget=budget, back_off_seconds=(0.0,))


def make_budget(*, max_deaths: int) -> DeathBudget:
    return DeathBudget(max_deaths=max_deaths, window_seconds=3600)


def test_engine_is_started_once_and_kept() -> None:
    lives = Lives()
    supervisor = supervise(lives)
    assert supervisor.pid is None
    first: object = supervisor.open()
    assert supervisor.open() is first
    assert supervisor.num_starts == 1
    assert lives.started[0].num_closed == 0


def test_engine_that_died_is_closed_and_started_again() -> None:
    lives = Lives()
    supervisor = supervise(lives)
    supervisor.open()
    supervisor.note_death(productive=True)
    assert supervisor.pid is None
    supervisor.open()
    assert supervisor.pid == 2
    assert [life.num_closed for life in lives.started] == [1, 0]


def test_engine_that_dies_while_it_loads_is_tried_again() -> None:
    lives = Lives(stillborn=range(2))
    supervisor = supervise(lives)
    supervisor.open()
    assert lives.num_starts == 3


def test_engine_that_never_loads_is_given_up() -> None:
    lives = Lives(stillborn=range(100))
    supervisor = supervise(lives)
    with pytest.raises(EngineDied):
        supervisor.open()
    assert lives.num_starts == MAX_FRUITLESS_DEATHS


def test_engine_that_dies_again_and_again_without_a_result_is_given_up() -> None:
    lives = Lives()
    supervisor = supervise(lives)
    for _ in range(MAX_FRUITLESS_DEATHS):
        supervisor.open()
        supervisor.note_death(productive=False)
    with pytest.raises(EngineUnavailable, match=f"{MAX_FRUITLESS_DEATHS} times"):
        supervisor.open()


def test_a_result_makes_up_for_earlier_deaths() -> None:
    supervisor = supervise(Lives())
    for _ in range(4 * MAX_FRUITLESS_DEATHS):
        supervisor.open()
        supervisor.note_death(productive=False)
        supervisor.open()
        supervisor.note_death(productive=True)
    assert supervisor.open().pid


def test_engine_that_is_configured_badly_is_not_tried_again() -> None:
    starts = []

    def start() -> Any:  # noqa: ANN401
        starts.append(1)
        raise EngineMisconfigured("There is no such model.")

    supervisor = EngineSupervisor(start)
    with pytest.raises(EngineMisconfigured):
        supervisor.open()
    assert len(starts) == 1


def test_loading_counts_as_progress() -> None:
    seen: list[object] = []

    def start() -> Any:  # noqa: ANN401
        seen.extend(supervisor.progress() for _ in range(2))
        return Life(1)

    supervisor = EngineSupervisor(start)
    supervisor.open()
    assert seen[0] != seen[1], "so that leases are kept while a model loads"


def test_another_life_is_progress_although_its_count_is_the_same() -> None:
    supervisor = supervise(Lives())
    supervisor.open()
    before = supervisor.progress()
    assert supervisor.progress() == before
    supervisor.note_death(productive=False, suspects=frozenset({1}))
    supervisor.open()
    assert supervisor.progress() != before, "else the leases run out behind a second hang"


def test_closing_ends_the_engine_and_may_be_repeated() -> None:
    lives = Lives()
    supervisor = supervise(lives)
    supervisor.open()
    supervisor.close()
    supervisor.close()
    assert lives.started[0].num_closed == 1
    assert supervisor.pid is None
    assert cast("Any", supervisor.open()).pid == 2


# --- a fresh engine has to show that it works ---


def test_engine_after_a_death_is_given_out_only_once_it_has_answered() -> None:
    lives = Lives(mute=range(1, 3))
    supervisor = supervise(lives)
    supervisor.open()
    supervisor.note_death(productive=True, suspects=frozenset({1}))
    assert not supervisor.is_open
    supervisor.open()
    assert [life.num_probes for life in lives.started] == [0, 1, 1, 1]
    assert [life.num_closed for life in lives.started] == [1, 1, 1, 0]
    assert supervisor.pid == 4


def test_first_engine_is_taken_at_its_word() -> None:
    lives = Lives(mute=range(100))
    assert supervise(lives).open().pid == 1


def test_engine_that_never_answers_is_given_up() -> None:
    lives = Lives(mute=range(1, 100))
    supervisor = supervise(lives)
    supervisor.open()
    supervisor.note_death(productive=True)
    with pytest.raises(EngineDied):
        supervisor.open()
    assert not supervisor.is_open
    assert [life.num_closed for life in lives.started] == [1] * (1 + MAX_FRUITLESS_DEATHS)


def test_engine_that_does_not_load_in_time_is_not_waited_for_again_at_once() -> None:
    starts = []

    def start() -> Any:  # noqa: ANN401
        starts.append(1)
        raise EngineTimedOut("It took too long.")

    supervisor = EngineSupervisor(start)
    with pytest.raises(EngineTimedOut):
        supervisor.open()
    assert len(starts) == 1


# --- the budget of deaths ---


def test_deaths_that_no_request_explains_quarantine_the_engine() -> None:
    lives = Lives()
    budget = make_budget(max_deaths=2)
    supervisor = supervise(lives, budget)
    for _ in range(2):
        supervisor.open()
        supervisor.note_death(productive=True)
    with pytest.raises(EngineQuarantined, match="2 times"):
        supervisor.open()
    assert lives.num_starts == 2
    with pytest.raises(EngineQuarantined):
        supervise(lives, budget).open()


def test_request_that_comes_through_may_be_what_a_quarantine_waited_for() -> None:
    supervisor = supervise(Lives(), make_budget(max_deaths=1))
    supervisor.open()
    supervisor.note_death(productive=True, suspects=frozenset({1, 2}))
    supervisor.open()
    supervisor.note_result(3)
    supervisor.note_result(1)
    with pytest.raises(EngineQuarantined):
        supervisor.note_result(2)


def test_device_that_fails_everything_is_found_without_a_request_being_blamed() -> None:
    lives = Lives(mute=range(1, 100))
    budget = make_budget(max_deaths=3)
    supervisor = supervise(lives, budget)
    supervisor.open()
    supervisor.note_death(productive=False, suspects=frozenset(range(8)))
    with pytest.raises(EngineQuarantined):
        supervisor.open()
    assert lives.num_starts == 4, "nothing of the suspects was tried"


def test_deaths_of_an_engine_that_never_worked_are_the_models_and_not_the_devices() -> None:
    budget = make_budget(max_deaths=1)
    with pytest.raises(EngineDied):
        supervise(Lives(stillborn=range(100)), budget).open()
    assert budget.num_deaths == 0


def test_too_much_work_at_once_is_not_the_devices_fault() -> None:
    supervisor = supervise(Lives(), budget := make_budget(max_deaths=1))
    supervisor.open()
    supervisor.note_death(productive=True, suspects=frozenset({1, 2}), cause="engine_out_of_memory")
    supervisor.open()
    for request_id in (1, 2):
        supervisor.note_result(request_id)
    assert budget.num_deaths == 0


def test_engine_with_a_past_has_to_answer_under_a_new_supervisor_too() -> None:
    budget = make_budget(max_deaths=3)
    budget.note_death()
    lives = Lives()
    supervise(lives, budget).open()
    assert [life.num_probes for life in lives.started] == [1]
