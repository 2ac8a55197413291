"""Lines of blobs, read lazily in large chunks, and the container that keeps results.

A segment, all numbers little-endian:

    magic "BSG1" | number of entries u32 | CRC-32 of everything behind the header u32
    index u64 each | length u32 each | kind u8 each | the lines, one behind the other

so that writing the output copies bytes and parses none.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec
import numpy as np

from jobs.domain.errors import BlobCorrupt
from jobs.domain.shard import Shard, has_bit
from storage.blobs.base import BlobReader, BlobStore

MAX_LINE_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"
_MAGIC = b"BSG1"
_HEADER = struct.Struct("<4sII")

KIND_OUTPUT = 0
KIND_ERROR = 1

UNLIMITED = 1 << 62
"""A `max_line_bytes` for lines whose length planning has already judged."""
Follower = tuple[int, str]
"""A line that another one runs for: its index in the input, and its custom_id."""
_encode_json = msgspec.json.Encoder().encode
_decode_run = msgspec.json.Decoder(tuple[int, list[Follower]]).decode
Entry = tuple[int, int, bytes]
"""A result's index in the input, its kind (output or error) and its line without the newline."""


class RequestLine(NamedTuple):
    """A line that runs.

    Attributes:
        position: in its shard.
        line_index: its index in the input.
        followers: lines of the input that it runs for as well.
        data: without its newline.
    """

    position: int
    line_index: int
    followers: Sequence[Follower]
    data: bytes


ScannedLine = tuple[int, int, int, bytes | None]
"""A line that is not blank.

Its physical number, from 1 where the scan started; where in the blob it begins, behind a byte
order mark; its bytes with its newline; and itself without one, or None when it is longer than the
scan allows. A plain tuple, since planning reads millions.
"""


def scan(
    blobs: BlobStore,
    key: str,
    *,
    start: int = 0,
    length: int | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    chunk_bytes: int = 1 << 20,
) -> Iterator[ScannedLine]:
    r"""Yield the lines of a blob, or of a range of it that begins at a line.

    Lines end at "\n"; one "\r" before it, a byte order mark at the blob's start and blank lines
    (white space only) are dropped. The last line needs no newline. Of an over-long line no more
    than `max_line_bytes` and a chunk are held at any time.
    """
    with blobs.open_reader(key, start=start, length=length) as reader:
        number, offset = 1, start
        at_start = start == 0
        carry = b""  # the beginning of a line that the last chunk did not end
        num_lost = 0  # bytes of the line at hand that were let go, because it is over-long
        has_begun = False  # whether either is so
        longest = max_line_bytes + 1
        for chunk in _read_chunks(reader, chunk_bytes):
            at = 0
            if at_start and chunk.startswith(_BOM):
                at = offset = len(_BOM)
            at_start = False
            # Not chunk.split: it looks at each byte, and costs four times as much.
            while (end := chunk.find(b"\n", at)) >= 0:
                line = chunk[at:end]
                num_bytes = end + 1 - at
                at = end + 1
                if has_begun:
                    num_bytes += num_lost + len(carry)
                    line = carry + line
                    carry, num_lost, has_begun = b"", 0, False
                if num_bytes > longest:
                    yield number, offset, num_bytes, None
                elif line and not line.isspace():
                    yield number, offset, num_bytes, line.removesuffix(b"\r")
                number += 1
                offset += num_bytes
            carry += chunk[at:]
            has_begun = True
            if num_lost or len(carry) > max_line_bytes:
                num_lost += len(carry)
                carry = b""
        if num_lost:
            yield number, offset, num_lost, None
        elif carry and not carry.isspace():
            yield number, offset, len(carry), carry.removesuffix(b"\r")


def _read_chunks(reader: BlobReader, size: int) -> Iterator[bytes]:
    """Yield what `reader` has; the first chunk is long enough to hold a byte order mark."""
    chunk = reader.read(size)
    while 0 < len(chunk) < len(_BOM) and (more := reader.read(size)):
        chunk += more
    while chunk:
        yield chunk
        chunk = reader.read(size)


def read_lines(
    blobs: BlobStore,
    shard: Shard,
    *,
    skip: bytes = b"",
    max_line_bytes: int = MAX_LINE_BYTES,
    chunk_bytes: int = 1 << 20,
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (position, physical line number, line) of a shard's lines that are not in `skip`.

    Args:
        skip: a bitmap as `Shard.done` is one.

    Raises:
        BlobCorrupt: the range does not have the lines it had when it was cut.
    """
    position = -1
    lines = scan(
        blobs,
        shard.blob_key,
        start=shard.byte_start,
        length=shard.num_bytes,
        max_line_bytes=max_line_bytes,
        chunk_bytes=chunk_bytes,
    )
    for position, (line_number, _, _, line) in enumerate(lines):
        if position >= shard.num_lines or line is None:
            raise BlobCorrupt(f"Blob {shard.blob_key} changed under unit {shard.unit_id}.")
        if not has_bit(skip, position):
            yield position, shard.first_line + line_number - 1, line
    if position + 1 != shard.num_lines:
        raise BlobCorrupt(f"Blob {shard.blob_key} changed under unit {shard.unit_id}.")


def encode_run_head(index: int, followers: Sequence[Follower]) -> bytes:
    """Return what stands before a line of the input in a run-order blob.

    It is [index, [[index, custom_id], ...]] and a tab: JSON has no tabs.
    """
    return b"%b\t" % _encode_json((index, followers)) if followers else b"[%d,[]]\t" % index


def read_requests(blobs: BlobStore, shard: Shard, *, skip: bytes = b"") -> Iterator[RequestLine]:
    """Yield a shard's lines that are not in `skip`, of the input or of a run-order blob.

    Raises:
        BlobCorrupt: the range does not have the lines it had when it was cut.
    """
    lines = read_lines(blobs, shard, skip=skip, max_line_bytes=UNLIMITED)
    if not shard.is_run_order:
        for position, _, data in lines:
            yield RequestLine(position, shard.first_index + position, (), data)
        return
    for position, _, data in lines:
        head, tab, rest = data.partition(b"\t")
        try:
            index, followers = _decode_run(head)
        except msgspec.MsgspecError:
            tab = b""
        if not tab:
            raise BlobCorrupt(f"Blob {shard.blob_key} is not the run order of its batch.")
        yield RequestLine(position, index, followers, rest)


def encode_segment(entries: Sequence[Entry]) -> bytes:
    """Return the container with these results."""
    indexes = np.array([entry[0] for entry in entries], dtype="<u8").tobytes()
    kinds = bytes([entry[1] for entry in entries])
    lines = [entry[2] for entry in entries]
    lengths = np.array([len(line) for line in lines], dtype="<u4").tobytes()
    body = b"".join(chain((indexes, lengths, kinds), lines))
    return _HEADER.pack(_MAGIC, len(lines), zlib.crc32(body)) + body


def decode_segment(data: bytes) -> list[Entry]:
    """Return the results in a container.

    Raises:
        BlobCorrupt: it is cut off, changed, or something else.
    """
    if len(data) < _HEADER.size:
        raise BlobCorrupt(f"A segment of {len(data)} bytes is cut off.")
    magic, count, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise BlobCorrupt("These bytes are not a segment of a version known here.")
    if zlib.crc32(memoryview(data)[_HEADER.size :]) != checksum:
        raise BlobCorrupt("A segment's bytes are not those that were written.")
    lengths_at = _HEADER.size + 8 * count
    kinds_at = lengths_at + 4 * count
    at = kinds_at + count
    if len(data) < at:
        raise BlobCorrupt("A segment is shorter than its header says.")
    indexes: list[int] = np.frombuffer(data, dtype="<u8", count=count, offset=_HEADER.size).tolist()
    lengths: list[int] = np.frombuffer(data, dtype="<u4", count=count, offset=lengths_at).tolist()
    if at + sum(lengths) != len(data):
        raise BlobCorrupt("A segment's lines do not have the lengths that it says.")
    entries: list[Entry] = []
    for index, kind, length in zip(indexes, data[kinds_at:at], lengths, strict=True):
        entries.append((index, kind, data[at : at + length]))
        at += length
    return entries
