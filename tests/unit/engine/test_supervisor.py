from typing import Any, cast

import pytest

from engine.supervisor import MAX_FRUITLESS_DEATHS, EngineSupervisor
from jobs.domain.errors import EngineDied, EngineMisconfigured, EngineUnavailable


class Life:
    """One life of an engine that does nothing."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.num_closed = 0

    def close(self) -> None:
        self.num_closed += 1

    def progress(self) -> int:
        return 7


class Lives:
    """Starts lives; those whose number is in `stillborn` die while they load."""

    def __init__(self, *, stillborn: range = range(0)) -> None:
        self.started: list[Life] = []
        self.num_starts = 0
        self._stillborn = stillborn

    def start(self) -> Any:  # noqa: ANN401
        self.num_starts += 1
        if self.num_starts - 1 in self._stillborn:
            raise EngineDied("It died while it loaded.")
        self.started.append(Life(self.num_starts))
        return self.started[-1]


def supervise(lives: Lives) -> EngineSupervisor:
    return EngineSupervisor(lives.start, back_off_seconds=(0.0,))


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
    supervisor.note_death(productive=False, suspects=True)
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
