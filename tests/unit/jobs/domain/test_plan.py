"""The run order: who runs for whom, and when."""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.checks import CustomIds
from jobs.domain.errors import BlobStoreUnavailable
from jobs.domain.plan import MAX_FOLLOWERS, Columns, RunOrder, order
from storage.reorder import Reorder
from storage.spill import Spill

SHARED = 1200


def key_of(text: str) -> bytes:
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def make_columns(
    prompts: list[str], *, keys: list[str | None] | None = None, lengths: list[int] | None = None
) -> Columns:
    columns = Columns()
    for number, prompt in enumerate(prompts):
        content = json.dumps(
            {"custom_id": f"r{number}", "messages": [{"role": "user", "content": prompt}]}
        ).encode()
        key = keys[number] if keys is not None else None
        columns.add(
            content,
            key=key_of(key) if key is not None else None,
            max_tokens=lengths[number] if lengths is not None else 0,
        )
    return columns


def grouped(num_groups: int, size: int, *, seed: int = 0) -> list[str]:
    """Return prompts of groups that share a long beginning, shuffled."""
    prompts = [
        f"{group} {hashlib.sha256(str(group).encode()).hexdigest() * 20}"[:SHARED] + f" ask {n}" * 4
        for group in range(num_groups)
        for n in range(size)
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def sequence(found: RunOrder) -> list[int]:
    """Return the lines that run, in the order in which they do."""
    assert found.rank is not None
    lines = range(len(found.rank))
    leads = [n for n in lines if found.is_follower is None or not found.is_follower[n]]
    return sorted(leads, key=lambda n: int(found.rank[n]))  # type: ignore[index]


def groups_of(found: RunOrder, prompts: list[str]) -> list[str]:
    return [prompts[n].split(" ", 1)[0] for n in sequence(found)]


def test_lines_that_share_nothing_stay_as_they_are() -> None:
    prompts = [f"{hashlib.sha256(str(n).encode()).hexdigest() * 20} {n}" for n in range(50)]
    assert order(make_columns(prompts)).is_arrival
    assert order(make_columns([])).is_arrival


def test_lines_that_begin_differently_share_nothing_that_comes_later() -> None:
    prompts = [f"{hashlib.sha256(str(n).encode()).hexdigest()} " + "x" * 3000 for n in range(50)]
    assert order(make_columns(prompts)).shared == 0


def test_a_stem_that_ends_within_a_piece_still_tells_groups_apart() -> None:
    columns = Columns()
    for number in range(40):
        system = "s" * 300 + "ab"[number % 2] * 100
        content = f'{system}"role" question {number}'.encode()
        columns.add(content, num_first_chars=len(system), key=None, max_tokens=0)
    found = order(columns)
    turns = [number % 2 for number in sequence(found)]
    assert turns in (sorted(turns), sorted(turns, reverse=True))


@pytest.mark.parametrize("own", [200, 700, 1300])
def test_what_is_alike_behind_words_of_its_own_is_not_shared(own: int) -> None:
    prompts = [
        f"{hashlib.sha256(str(n).encode()).hexdigest() * 30}"[:own] + f" {n % 3} lorem ipsum" * 300
        for n in range(60)
    ]
    found = order(make_columns(prompts))
    assert (found.is_arrival, found.shared) == (True, 0)


def test_one_beginning_of_all_lines_is_no_reason_for_another_order() -> None:
    found = order(make_columns(grouped(1, 30)))
    assert found.is_arrival
    assert found.shared > 0.5


def test_groups_run_one_after_the_other_in_the_order_they_arrive() -> None:
    prompts = grouped(5, 8)
    found = order(make_columns(prompts))
    ran = groups_of(found, prompts)
    first = list(dict.fromkeys(prompt.split(" ", 1)[0] for prompt in prompts))
    assert ran == [group for group in first for _ in range(8)]
    assert found.num_groups == 5
    inside = [n for n in sequence(found) if prompts[n].startswith("3 ")]
    assert inside == sorted(inside)


def test_a_cache_that_holds_every_group_needs_no_order() -> None:
    columns = make_columns(grouped(4, 5))
    assert order(columns, cache_tokens=10**6).is_arrival
    assert not order(columns, cache_tokens=1000).is_arrival


def test_groups_fit_a_cache_only_where_they_do_with_a_token_for_each_byte() -> None:
    prompts = grouped(4, 5)
    assert not order(make_columns(prompts), cache_tokens=4 * SHARED).is_arrival


def test_long_answers_go_first_in_three_classes() -> None:
    lengths = [16, 4000, 200] * 20
    found = order(make_columns(["x"] * 60, lengths=lengths))
    ran = [lengths[n] for n in sequence(found)]
    assert ran == [4000] * 20 + [200] * 20 + [16] * 20
    alike = make_columns(["x"] * 60, lengths=[100] * 60)
    assert order(alike).is_arrival
    unknown = make_columns(["x"] * 60, lengths=[0] * 40 + [16, 4000] * 10)
    assert order(unknown).is_arrival


def test_a_group_goes_where_its_longest_answer_belongs() -> None:
    prompts = grouped(3, 4, seed=1)
    lengths = [16] * 12
    late = prompts[-1].split(" ", 1)[0]
    lengths[-1] = 4000
    found = order(make_columns(prompts, lengths=lengths))
    assert groups_of(found, prompts)[:4] == [late] * 4


def test_equal_lines_run_once_and_the_first_one_leads() -> None:
    keys = ["a", "b", "a", None, None, "b", "a"]
    found = order(make_columns(["x"] * 7, keys=keys))
    assert sequence(found) == [0, 1, 3, 4]
    assert found.num_leaders == 4
    assert found.rank is not None
    assert found.rank.tolist() == [0, 1, 0, 2, 3, 1, 0]


def test_a_line_leads_a_bounded_number_of_others() -> None:
    num = 3 * (MAX_FOLLOWERS + 1) + 5
    found = order(make_columns(["x"] * num, keys=["a"] * num))
    assert found.num_leaders == 4
    assert found.rank is not None
    assert np.bincount(found.rank).tolist() == [MAX_FOLLOWERS + 1] * 3 + [5]


def test_both_can_be_switched_off() -> None:
    columns = make_columns(grouped(4, 5), lengths=[16, 4000] * 10)
    found = order(columns, by_prefix=False, by_length=False)
    assert found.is_arrival


@given(
    kinds=st.lists(
        st.tuples(st.integers(0, 6), st.one_of(st.none(), st.integers(0, 5)), st.integers(0, 5000)),
        max_size=60,
    ),
    cache_tokens=st.sampled_from([0, 300, 3000]),
)
def test_every_line_runs_once_or_follows_an_equal_one(
    kinds: list[tuple[int, int | None, int]], cache_tokens: int
) -> None:
    texts = grouped(7, 1)
    prompts = [texts[group] + str(number) for number, (group, _, _) in enumerate(kinds)]
    keys = [None if key is None else str(key) for _, key, _ in kinds]
    columns = make_columns(prompts, keys=keys, lengths=[length for _, _, length in kinds])
    found = order(columns, cache_tokens=cache_tokens)
    if found.rank is None:
        assert len({key for key in keys if key}) == sum(key is not None for key in keys)
        return
    ran = sequence(found)
    assert [int(found.rank[n]) for n in ran] == list(range(found.num_leaders))
    for number, key in enumerate(keys):
        leader = ran[int(found.rank[number])]
        assert leader == number or (key is not None and keys[leader] == key)
        assert leader <= number


def test_columns_on_disk_are_those_in_memory() -> None:
    rng = random.Random(0)
    num_lines = 150_000  # more than two pieces
    with Spill() as spill:
        spilled, held = Columns(spill=spill), Columns()
        for _ in range(num_lines):
            group, number = rng.randrange(300), rng.randrange(100_000)
            content = b"%d %s %d" % (group, b"x" * 700, number)
            key = key_of(str(content)) if number % 3 else None
            for columns in (spilled, held):
                columns.add(content, key=key, max_tokens=number)
        assert len(spilled) == len(held) == num_lines
        found, wanted = order(spilled), order(held)
        assert found.num_leaders == wanted.num_leaders < num_lines
        assert found.num_groups == wanted.num_groups == 300
        assert found.rank is not None
        assert wanted.rank is not None
        assert found.is_follower is not None
        assert wanted.is_follower is not None
        assert np.array_equal(found.rank, wanted.rank)
        assert np.array_equal(found.is_follower, wanted.is_follower)


@pytest.mark.parametrize(
    ("num_alone", "num_shared"),
    [
        (0, 3_000),  # seen in the first block
        (70_000, 10_000),  # seen behind what is on disk already
        (500, 500),  # seen by nobody: fewer than a block
    ],
)
def test_what_is_hashed_late_is_what_would_have_been_hashed_at_once(
    num_alone: int, num_shared: int
) -> None:
    lines = [b"%d %s" % (n, b"x" * 900) for n in range(num_alone)]
    lines += [b"%s %d %s" % (b"y" * 500, n % 3, b"z" * (n % 7) * 400) for n in range(num_shared)]
    times_read = []

    def read_again() -> Iterator[bytes]:
        times_read.append(1)
        return iter(lines)

    with Spill() as spill:
        late, at_once = Columns(spill=spill, read_again=read_again), Columns()
        for line in lines:
            for columns in (late, at_once):
                columns.add(line)
        found, wanted = order(late), order(at_once)
        assert times_read == [1]
        assert found.rank is not None
        assert wanted.rank is not None
        assert np.array_equal(found.rank, wanted.rank)
        assert (found.num_groups, found.shared) == (wanted.num_groups, wanted.shared)
        for level in range(5):
            assert np.array_equal(late.prefixes(level), at_once.prefixes(level))


def test_lines_that_begin_each_in_its_own_way_are_read_once() -> None:
    columns = Columns(read_again=lambda: pytest.fail("They were read again."))
    for number in range(5_000):
        columns.add(b"%d %s" % (number, b"x" * 3000))
    assert order(columns).is_arrival


@pytest.mark.parametrize("num_lines", [20_000])
def test_what_is_kept_of_a_line_is_small(num_lines: int) -> None:
    columns = make_columns(["x"] * num_lines)
    assert sum(rows.nbytes for _, rows in columns.pieces()) <= 48 * num_lines


def templates_in_turns(*names: str, lengths: list[int] | None = None) -> Columns:
    columns = Columns()
    for number, name in enumerate(names):
        system = f'"messages" {name} ' * 10
        columns.add(
            f'{system}"role" question {number}'.encode(),
            num_first_chars=len(system) - 20,
            key=None,
            max_tokens=lengths[number] if lengths else 4096,
        )
    return columns


def known_of(columns: Columns, **tokens: int) -> dict[int, int]:
    """Return how long answers are to templates, by the order in which these come first."""
    first = dict.fromkeys(columns.templates().tolist())
    return dict(zip(first, tokens.values(), strict=False))


def test_templates_whose_answers_were_long_go_first() -> None:
    columns = templates_in_turns(*"abc" * 4)
    assert order(columns, by_prefix=False).is_arrival
    found = order(columns, by_prefix=False, learned=known_of(columns, a=10, b=2000, c=100))
    assert [number % 3 for number in sequence(found)] == [1] * 4 + [2] * 4 + [0] * 4


def test_what_is_known_of_few_lines_changes_nothing() -> None:
    columns = templates_in_turns(*"abcd" * 4)
    assert order(columns, by_prefix=False, learned=known_of(columns, a=10)).is_arrival
    assert order(columns, by_prefix=False, learned={5: 7}).is_arrival
    assert order(Columns(), learned={5: 7}).is_arrival


def test_a_line_that_allows_less_than_its_template_took_is_short() -> None:
    columns = templates_in_turns(*"ab" * 6, lengths=[4096, 16] * 6)
    found = order(columns, by_prefix=False, learned=known_of(columns, a=500, b=2000))
    assert [number % 2 for number in sequence(found)] == [0] * 6 + [1] * 6


def test_a_template_that_nobody_knows_counts_as_long_as_any() -> None:
    columns = templates_in_turns(*"abc" * 4)
    found = order(columns, by_prefix=False, learned=known_of(columns, a=2000, b=10))
    assert [number % 3 == 1 for number in sequence(found)] == [False] * 8 + [True] * 4


def test_a_temporary_folder_that_is_not_there_may_be_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(BlobStoreUnavailable, match="set TMPDIR"):
        Spill()
    with closing(CustomIds(spill_bytes=16)) as ids, pytest.raises(BlobStoreUnavailable):
        ids.add("a")
    with Reorder(num_ranks=1, num_bytes=1) as sorting, pytest.raises(BlobStoreUnavailable):
        sorting.add(0, 0, b"x" * (9 << 20))
