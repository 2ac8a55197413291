import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.domain.errors import BlobCorrupt
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.shard import Shard, bitmap
from storage.blobs.local import FolderBlobs
from storage.jsonl import (
    Entry,
    ScannedLine,
    decode_segment,
    encode_segment,
    read_lines,
    scan,
)

BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> FolderBlobs:
    return FolderBlobs(tmp_path_factory.mktemp("blobs"))


def split_naively(data: bytes, *, cap: int) -> list[ScannedLine]:
    start = len(BOM) if data.startswith(BOM) else 0
    found: list[ScannedLine] = []
    for number, physical in enumerate(data[start:].split(b"\n"), 1):
        is_last = start + len(physical) == len(data)
        num_bytes = len(physical) + (not is_last)
        if len(physical) > cap:
            found.append((number, start, num_bytes, None))
        elif physical.strip():
            found.append((number, start, num_bytes, physical.removesuffix(b"\r")))
        start += num_bytes
    return found


PIECES = st.lists(
    st.sampled_from([b"\n", b"\r", b"\r\n", b" ", b"\t", b"{}", b"abc", b"x" * 20, BOM, b"\xc3"]),
    max_size=60,
).map(b"".join)


@given(data=PIECES, has_bom=st.booleans(), chunk_bytes=st.integers(1, 70), cap=st.integers(4, 30))
@settings(max_examples=200, deadline=None)
def test_scan_finds_what_a_naive_splitter_finds(
    blobs: FolderBlobs, *, data: bytes, has_bom: bool, chunk_bytes: int, cap: int
) -> None:
    if has_bom:
        data = BOM + data
    blobs.put("k", data)
    found = list(scan(blobs, "k", max_line_bytes=cap, chunk_bytes=chunk_bytes))
    assert found == split_naively(data, cap=cap)


@given(data=PIECES, chunk_bytes=st.integers(1, 40), size=st.integers(1, 5), skip=st.data())
@settings(max_examples=80, deadline=None)
def test_shards_together_read_every_line_once(
    blobs: FolderBlobs, *, data: bytes, chunk_bytes: int, size: int, skip: st.DataObject
) -> None:
    blobs.put("k", data)
    lines = list(scan(blobs, "k"))
    seen = []
    for first in range(0, len(lines), size):
        group = lines[first : first + size]
        start, last = group[0][1], group[-1]
        shard = make_shard(
            first_index=first,
            first_line=group[0][0],
            num_lines=len(group),
            byte_start=start,
            num_bytes=last[1] + last[2] - start,
        )
        done = skip.draw(st.lists(st.integers(0, len(group) - 1)))
        read = list(
            read_lines(blobs, shard, skip=bitmap(done, len(group)), chunk_bytes=chunk_bytes)
        )
        assert [position for position, _, _ in read] == sorted(set(range(len(group))) - set(done))
        for position, line_number, line in read:
            assert (line_number, line) == (group[position][0], group[position][3])
        seen += group
    assert seen == lines


def make_shard(
    *, first_index: int, first_line: int, num_lines: int, byte_start: int, num_bytes: int
) -> Shard:
    return Shard(
        unit_id=UnitId("unit_a"),
        batch_id=BatchId("batch_a"),
        ordinal=0,
        first_index=first_index,
        first_line=first_line,
        num_lines=num_lines,
        byte_start=byte_start,
        num_bytes=num_bytes,
        blob_key="k",
    )


@pytest.mark.parametrize("num_lines", [1, 3])
def test_a_range_with_another_number_of_lines_is_corrupt(
    blobs: FolderBlobs, num_lines: int
) -> None:
    blobs.put("k", b"a\nb\n")
    shard = make_shard(first_index=0, first_line=1, num_lines=num_lines, byte_start=0, num_bytes=4)
    with pytest.raises(BlobCorrupt, match="unit_a"):
        list(read_lines(blobs, shard))


def test_a_line_longer_than_the_cap_takes_no_memory_and_the_next_one_is_read(
    blobs: FolderBlobs,
) -> None:
    with blobs.open_writer("long") as writer:
        for _ in range(64):
            writer.write(b"x" * (1 << 20))
        writer.write(b'\n{"a":1}')
        writer.commit()
    tracemalloc.start()
    found = list(scan(blobs, "long", max_line_bytes=1 << 20, chunk_bytes=1 << 18))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [
        (1, 0, (64 << 20) + 1, None),
        (2, (64 << 20) + 1, 7, b'{"a":1}'),
    ]
    assert peak < 4 << 20


def test_scanning_costs_a_fraction_of_parsing(blobs: FolderBlobs) -> None:
    num_lines = 20_000
    blobs.put("many", (b'{"x":"' + b"y" * 2040 + b'"}\n') * num_lines)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        assert sum(1 for _ in scan(blobs, "many")) == num_lines
        best = min(best, time.process_time() - start)
    # About 1 µs with a machine to itself; parsing such a line takes several.
    assert best / num_lines < 6e-6


ENTRIES = st.lists(
    st.tuples(st.integers(0, 2**40), st.integers(0, 1), st.binary(max_size=50)), max_size=20
)


@given(entries=ENTRIES)
def test_a_segment_is_decoded_as_it_was_encoded(entries: list[Entry]) -> None:
    assert decode_segment(encode_segment(entries)) == entries


@given(entries=ENTRIES, cut=st.integers(1, 40), flip=st.integers(0, 10_000))
def test_a_segment_that_was_cut_or_changed_is_corrupt(
    entries: list[Entry], cut: int, flip: int
) -> None:
    data = encode_segment(entries)
    with pytest.raises(BlobCorrupt):
        decode_segment(data[:-cut])
    changed = bytearray(data)
    changed[flip % len(data)] ^= 0x41
    with pytest.raises(BlobCorrupt):
        decode_segment(bytes(changed))
    with pytest.raises(BlobCorrupt):
        decode_segment(data + b"x")
