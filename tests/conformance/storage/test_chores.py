from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from storage import chores
from storage.chores import Turn
from tests.conformance.storage.bench import Bench

HOUR = 3600.0


def claim(bench: Bench, name: str = "sweep the yard") -> Turn | None:
    return chores.claim(bench.db, name, every_seconds=HOUR)


def test_a_chore_is_due_an_hour_after_it_was_first_heard_of_and_then_every_hour(
    bench: Bench,
) -> None:
    assert claim(bench) is None
    bench.clock.advance(HOUR - 1)
    assert claim(bench) is None
    bench.clock.advance(1)
    assert claim(bench) == Turn(name="sweep the yard", place=None)
    assert claim(bench) is None
    bench.clock.advance(5 * HOUR)
    assert claim(bench) is not None
    assert claim(bench) is None, "what was missed is not made up for"


def test_a_chore_that_stopped_half_way_goes_on_there_and_sooner(bench: Bench) -> None:
    claim(bench)
    bench.clock.advance(HOUR)
    turn = claim(bench)
    assert turn is not None
    soon = bench.clock.now + timedelta(seconds=60)
    chores.leave(bench.db, turn, place="k", due_at=soon)
    assert claim(bench) is None
    bench.clock.advance(60)
    again = claim(bench)
    assert again == Turn(name="sweep the yard", place="k")
    chores.leave(bench.db, again, place=None, due_at=None)
    assert chores.get_due(bench.db, again.name) == bench.clock.now + timedelta(seconds=HOUR)


def test_chores_of_different_names_have_nothing_to_do_with_each_other(bench: Bench) -> None:
    claim(bench, "one")
    bench.clock.advance(HOUR)
    assert claim(bench, "other") is None
    assert claim(bench, "one") is not None
    assert chores.get_due(bench.db, "third") is None


def test_of_many_processes_one_gets_the_turn(bench: Bench) -> None:
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda _: claim(bench), range(8)))
        assert first == [None] * 8
        bench.clock.advance(HOUR)
        turns = list(pool.map(lambda _: claim(bench), range(8)))
    assert sum(turn is not None for turn in turns) == 1
