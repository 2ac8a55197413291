import random

import pytest

from jobs.domain.errors import BlobStoreUnavailable
from storage.reorder import Reorder


@pytest.mark.parametrize("num_bytes", [100, 300 << 20], ids=["one bucket", "many buckets"])
def test_entries_come_back_by_rank(num_bytes: int) -> None:
    entries = [(rank, rank % 2, b"x" * (rank % 50)) for rank in range(2000)]
    mixed = random.Random(0).sample(entries, len(entries))
    with Reorder(num_ranks=2000, num_bytes=num_bytes) as reorder:
        for entry in mixed:
            reorder.add(*entry)
        assert list(reorder.read()) == entries


def test_entries_of_one_rank_stay_in_the_order_they_came_in() -> None:
    with Reorder(num_ranks=2, num_bytes=10) as reorder:
        for content in (b"a", b"b", b"c"):
            reorder.add(1, 0, content)
        assert [content for _, _, content in reorder.read()] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("num_bytes", [100, 300 << 20], ids=["one bucket", "many buckets"])
def test_more_than_memory_may_hold_comes_back_the_same(num_bytes: int) -> None:
    # Twice what is held, and then some that stays in memory.
    entries = [(number // 3, number, bytes([number % 256]) * 70_000) for number in range(600)]
    mixed = sorted(entries, key=lambda entry: (entry[1] % 3, -entry[0]))
    with Reorder(num_ranks=200, num_bytes=num_bytes) as reorder:
        for entry in mixed:
            reorder.add(*entry)
        found = list(reorder.read())
    assert found == entries, "those of one rank in the order they came in"


def test_nothing_to_sort_is_no_fault() -> None:
    with Reorder(num_ranks=0, num_bytes=0) as reorder:
        assert list(reorder.read()) == []


def test_a_disk_without_room_is_found_out_before_it_is_full() -> None:
    with pytest.raises(BlobStoreUnavailable, match="make room"):
        Reorder(num_ranks=10, num_bytes=1 << 60)
