from jobs.domain.ids import BatchId, UnitId, WorkerId
from jobs.domain.shard import Fault, Shard, Trial, bitmap
from jobs.domain.suspects import (
    GROUP_LINES,
    halve,
    is_guilty,
    list_accused,
    list_suspects,
    narrow,
)


def make_shard(
    num_lines: int = 10,
    *,
    done: list[int] | None = None,
    suspects: tuple[tuple[int, ...], ...] = (),
    tried: tuple[int, ...] | None = None,
) -> Shard:
    return Shard(
        unit_id=UnitId("unit_a"),
        batch_id=BatchId("batch_a"),
        ordinal=0,
        first_index=0,
        first_line=1,
        num_lines=num_lines,
        byte_start=0,
        num_bytes=1,
        blob_key="k",
        done=bitmap(done or [], num_lines),
        suspects=suspects,
        trial=Trial(owner=WorkerId("worker_a"), positions=tried) if tried is not None else None,
    )


def make_fault(solo_crashes: int, *places: str) -> Fault:
    return Fault(position=0, solo_crashes=solo_crashes, places=places)


def test_a_line_is_guilty_after_three_deaths_in_one_place_or_two_in_two() -> None:
    assert not is_guilty(make_fault(1, "a"))
    assert not is_guilty(make_fault(2, "a"))
    assert is_guilty(make_fault(3, "a"))
    assert is_guilty(make_fault(2, "a", "b"))


def test_a_group_is_halved_down_to_one() -> None:
    assert halve([1, 2, 3]) == [(1, 2), (3,)]
    assert halve([1]) == [(1,)]
    assert halve([]) == []


def test_what_is_done_is_not_suspected() -> None:
    shard = make_shard(done=[1, 2, 3], suspects=((1, 2), (3, 4)), tried=(4, 1))
    assert list_suspects(shard) == [(4,)]
    assert list_accused(shard) == (4,)


def test_without_a_trial_every_line_that_is_left_is_suspected_in_small_groups() -> None:
    shard = make_shard(100, done=[0, 50], suspects=((7, 9),))
    groups = narrow(shard)
    assert groups[0] == (7, 9)
    assert sorted(p for group in groups for p in group) == [
        p for p in range(100) if p not in {0, 50}
    ]
    assert all(len(group) <= GROUP_LINES for group in groups)


def test_what_ran_when_the_worker_died_comes_first_in_halves() -> None:
    shard = make_shard(10, done=[0], suspects=((1, 2, 3, 4), (5, 6)), tried=(1, 2, 3, 4))
    assert narrow(shard) == [(1, 2), (3, 4), (5, 6), (7, 8, 9)]


def test_a_worker_that_was_reaped_after_its_last_group_accuses_nobody() -> None:
    shard = make_shard(6, done=[0, 1], suspects=((0, 1), (2, 3)), tried=(0, 1))
    assert narrow(shard) == [(2, 3), (4, 5)]


def test_halving_ends_with_the_one_that_kills() -> None:
    poison, num_deaths = 77, 0
    shard = make_shard(100)
    while True:
        group = next(g for g in narrow(shard) if poison in g)
        num_deaths += 1
        if len(group) == 1:
            break
        shard = make_shard(100, suspects=tuple(narrow(shard)), tried=group)
    assert num_deaths == 6, "a group of 32, 16, 8, 4, 2, then the line alone"
