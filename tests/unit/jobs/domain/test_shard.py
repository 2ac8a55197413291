from hypothesis import given
from hypothesis import strategies as st

from jobs.domain.shard import (
    Cut,
    Cutter,
    bitmap,
    bitmaps_overlap,
    count_bits,
    has_bit,
    merge_bitmaps,
)

positions = st.sets(st.integers(0, 300), max_size=60)
gaps_and_sizes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), max_size=80)


def cut_all(
    lines: list[tuple[int, int]], *, max_lines: int, max_bytes: int
) -> tuple[list[Cut], list[tuple[int, int, int]]]:
    """Cut lines of (blank bytes before, size); return the cuts and each line's place."""
    cutter = Cutter(max_lines=max_lines, max_bytes=max_bytes)
    cuts: list[Cut] = []
    places: list[tuple[int, int, int]] = []
    offset, number = 0, 1
    for index, (blank, size) in enumerate(lines):
        offset += blank
        number += blank
        places.append((offset, size, number))
        cut = cutter.add(index=index, line=number, byte_start=offset, num_bytes=size)
        if cut is not None:
            cuts.append(cut)
        offset += size
        number += 1
    last = cutter.finish()
    return cuts + ([last] if last is not None else []), places


@given(gaps_and_sizes, st.integers(1, 9), st.integers(1, 120))
def test_cuts_tile_the_lines_within_their_bounds(
    lines: list[tuple[int, int]], max_lines: int, max_bytes: int
) -> None:
    cuts, places = cut_all(lines, max_lines=max_lines, max_bytes=max_bytes)
    covered = 0
    for cut in cuts:
        inside = places[cut.first_index : cut.first_index + cut.num_lines]
        assert cut.first_index == covered, "no line is left out and none is cut twice"
        assert 1 <= cut.num_lines <= max_lines
        assert (cut.byte_start, cut.first_line) == (inside[0][0], inside[0][2])
        assert cut.byte_start + cut.num_bytes == inside[-1][0] + inside[-1][1]
        assert cut.num_bytes <= max_bytes or cut.num_lines == 1
        covered += cut.num_lines
    assert covered == len(lines)


@given(gaps_and_sizes, st.integers(1, 9), st.integers(1, 120))
def test_shard_is_cut_no_earlier_than_it_must(
    lines: list[tuple[int, int]], max_lines: int, max_bytes: int
) -> None:
    cuts, places = cut_all(lines, max_lines=max_lines, max_bytes=max_bytes)
    for cut in cuts[:-1]:
        start, size, _ = places[cut.first_index + cut.num_lines]
        assert cut.num_lines == max_lines or start + size - cut.byte_start > max_bytes


def test_nothing_is_cut_of_nothing() -> None:
    cutter = Cutter(max_lines=1, max_bytes=1)
    assert cutter.finish() is None


@given(positions)
def test_bitmap_has_the_bits_that_were_set(wanted: set[int]) -> None:
    bits = bitmap(sorted(wanted), 301)
    assert len(bits) == 38
    assert {p for p in range(400) if has_bit(bits, p)} == wanted
    assert count_bits(bits) == len(wanted)


def test_bitmap_is_least_significant_bit_first() -> None:
    assert bitmap([0, 9], 16) == b"\x01\x02"


@given(positions, positions)
def test_merged_bitmap_is_the_union(left: set[int], right: set[int]) -> None:
    short = bitmap(sorted(left), max(left, default=0) + 1)
    long = bitmap(sorted(right), 301)
    merged = merge_bitmaps(short, long)
    assert merged == merge_bitmaps(long, short) == bitmap(sorted(left | right), 301)
    assert bitmaps_overlap(short, long) is bool(left & right)


def test_empty_bitmap_has_nothing() -> None:
    assert not has_bit(b"", 0)
    assert count_bits(b"") == 0
    assert merge_bitmaps(b"", b"\x01") == b"\x01"
