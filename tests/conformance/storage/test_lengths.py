from storage import lengths
from tests.conformance.storage.bench import Bench


def test_what_was_learned_last_stands_in_the_place_of_what_was_known(bench: Bench) -> None:
    lengths.record(bench.db, "a", "m", {1: 10, 2**32 - 1: 20})
    bench.clock.advance(1)
    lengths.record(bench.db, "a", "m", {1: 30, 7: 40})
    lengths.record(bench.db, "a", "m", {})
    assert lengths.read(bench.db, "a", "m") == {1: 30, 2**32 - 1: 20, 7: 40}


def test_tenants_and_models_know_nothing_of_each_other(bench: Bench) -> None:
    lengths.record(bench.db, "a", "m", {1: 10})
    lengths.record(bench.db, "a", "n", {1: 20})
    lengths.record(bench.db, "b", "m", {1: 30})
    assert lengths.read(bench.db, "a", "m") == {1: 10}
    assert lengths.read(bench.db, "b", "n") == {}


def test_the_oldest_are_forgotten_where_there_are_too_many(bench: Bench) -> None:
    lengths.record(bench.db, "b", "m", {1: 1})
    for first in range(0, 8, 2):
        bench.clock.advance(1)
        lengths.record(bench.db, "a", "m", {first: 1, first + 1: 1}, keep=4)
    assert sorted(lengths.read(bench.db, "a", "m")) == [4, 5, 6, 7]
    assert lengths.read(bench.db, "b", "m") == {1: 1}
