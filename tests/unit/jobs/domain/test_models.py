"""Lines of several models, brought together."""

import random
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jobs.domain.models import ModelColumn, group_by_model, model_at
from jobs.domain.plan import RunOrder


def column_of(names: list[str]) -> tuple[ModelColumn, list[int]]:
    """Return the column of lines that name these models, and each line's number."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    column = ModelColumn()
    for line, name in enumerate(names):
        column.note(line, numbers[name])
    return column, [numbers[name] for name in names]


@given(
    names=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    rng=st.none() | st.randoms(),
)
def test_lines_of_a_model_stand_together_in_the_order_they_had(
    names: list[str], rng: random.Random | None
) -> None:
    """Without a generator the order is that of the file."""
    column, numbers = column_of(names)
    turns = list(range(len(names)))
    if rng is not None:
        rng.shuffle(turns)
    rank = None if rng is None else np.array(turns, dtype=np.uint32)
    order = RunOrder(rank=rank, is_follower=None, num_leaders=len(names))
    found, starts = group_by_model(order, column, len(names))
    places = turns if found.rank is None else found.rank.tolist()
    assert sorted(places) == list(range(len(names)))
    for line, number in enumerate(numbers):
        assert model_at(places[line], starts) == number
    for number in set(numbers):
        lines = [line for line in range(len(names)) if numbers[line] == number]
        before = sorted(lines, key=lambda line: turns[line])
        assert all(places[a] < places[b] for a, b in pairwise(before))


def test_who_runs_for_another_stays_with_it() -> None:
    column, _ = column_of(["a", "b", "a", "b", "a"])
    order = RunOrder(
        rank=np.array([0, 1, 0, 1, 2], dtype=np.uint32),
        is_follower=np.array([False, False, True, True, False]),
        num_leaders=3,
    )
    found, starts = group_by_model(order, column, 5)
    assert found.rank is not None
    assert found.rank.tolist() == [0, 2, 0, 2, 1]
    assert starts == [0, 2]


def test_what_stands_by_model_is_left_as_it_is() -> None:
    column, _ = column_of(["a", "a", "b", "c", "c"])
    order = RunOrder(rank=None, is_follower=None, num_leaders=5)
    assert group_by_model(order, column, 5) == (order, [0, 2, 3])
