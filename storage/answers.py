"""Answers that batches gave to later ones: where they are, for whom, and until when.

A blob of answers, all numbers little-endian:

    answers, one behind the other | for each: key 2 x u64 | offset u64 | length u32 | check u64

`check` is of the key and the answer together, so whatever is damaged is found by nobody.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa
import xxhash

from jobs.domain.batch import TERMINAL_STATUSES
from jobs.domain.errors import BlobCorrupt
from jobs.domain.ids import BatchId, FileId, TenantId
from storage.blobs.base import BlobReader, BlobStore
from storage.database import Transaction, reads, writes
from storage.tables import answers, batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

INDEX = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("check", "<u8")]
)
pack_entry = struct.Struct("<16sQIQ").pack
KEY_BYTES = 16
_ENTRIES_AT_ONCE = 65_536
_MAX_GAP = 1 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBlob:
    """The answers of one batch, for batches of its tenant on the same model."""

    batch_id: BatchId
    tenant_id: TenantId
    identity: str
    blob_key: str
    num_entries: int
    num_bytes: int
    created_at: datetime
    expires_at: datetime


_NAMES = tuple(field.name for field in fields(AnswerBlob))


def check_of(key: bytes, answer: bytes) -> int:
    """Return what shows that an answer is whole, and that of this key."""
    return xxhash.xxh3_64_intdigest(key + answer)


def read_index(blobs: BlobStore, found: AnswerBlob) -> Iterator["NDArray[Any]"]:
    """Yield the index of a blob, some entries at a time.

    Raises:
        BlobMissing: it is gone.
        BlobCorrupt: it is shorter than it was.
    """
    size = found.num_entries * INDEX.itemsize
    with blobs.open_reader(found.blob_key, start=found.num_bytes - size, length=size) as reader:
        left = found.num_entries
        while left:
            number = min(left, _ENTRIES_AT_ONCE)
            content = _read_exactly(reader, number * INDEX.itemsize, found.blob_key)
            yield np.frombuffer(content, dtype=INDEX)
            left -= number


def read_answers(
    blobs: BlobStore, found: AnswerBlob, places: Sequence[tuple[int, int]]
) -> Iterator[bytes]:
    """Yield the bytes at each (offset, length) of a blob; offsets must not go back.

    Raises:
        BlobMissing: it is gone.
        BlobCorrupt: it is shorter than it was.
    """
    at = 0
    while at < len(places):
        # One read for what lies close together, since each costs a request.
        behind = at + 1
        while behind < len(places) and places[behind][0] - sum(places[behind - 1]) < _MAX_GAP:
            behind += 1
        with blobs.open_reader(found.blob_key, start=places[at][0]) as reader:
            yield from _read_run(reader, places[at:behind], found.blob_key)
        at = behind


def _read_run(reader: BlobReader, places: Sequence[tuple[int, int]], key: str) -> Iterator[bytes]:
    position, last, content = places[0][0], (-1, 0), b""
    for offset, length in places:
        if (offset, length) != last:
            _read_exactly(reader, offset - position, key)
            content = _read_exactly(reader, length, key)
            position, last = offset + length, (offset, length)
        yield content


def _read_exactly(reader: BlobReader, size: int, key: str) -> bytes:
    pieces: list[bytes] = []
    while size > 0:
        piece = reader.read(min(size, _PIECE_BYTES))
        if not piece:
            raise BlobCorrupt(f"Blob {key} is shorter than it was.")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


@writes
def record(tx: Transaction, found: AnswerBlob, *, max_bytes: int) -> list[str]:
    """Keep the row of a blob; return the blobs that nobody needs now: the oldest of the tenant.

    A batch has one: that of an earlier finalizer makes way too. A repeated call changes nothing.
    Once a batch has ended its files may be deleted, so that a late finalizer keeps nothing.

    Args:
        max_bytes: what a tenant may have.
    """
    batch = tx.execute(
        sa.select(batches.c.status).where(batches.c.id == found.batch_id).with_for_update(read=True)
    ).one_or_none()
    if batch is not None and batch.status in TERMINAL_STATUSES:
        return [found.blob_key]
    earlier = tx.execute(
        sa.delete(answers)
        .where(answers.c.batch_id == found.batch_id, answers.c.blob_key != found.blob_key)
        .returning(answers.c.blob_key)
    ).scalars()
    gone = list(earlier)
    known = sa.select(answers.c.batch_id).where(answers.c.batch_id == found.batch_id)
    if tx.execute(known).first() is None:
        tx.execute(sa.insert(answers).values(asdict(found)))
    total = 0
    for row in tx.execute(
        sa.select(answers.c.batch_id, answers.c.blob_key, answers.c.num_bytes)
        .where(answers.c.tenant_id == found.tenant_id)
        .order_by(answers.c.created_at.desc(), answers.c.batch_id)
    ).all():
        total += row.num_bytes
        if total > max_bytes:
            tx.execute(sa.delete(answers).where(answers.c.batch_id == row.batch_id))
            gone.append(row.blob_key)
    return gone


@reads
def list_newest(
    tx: Transaction, *, tenant_id: TenantId, identity: str, limit: int
) -> list[AnswerBlob]:
    """Return what batches of a tenant gave that ran on this very model, the newest first."""
    rows = tx.execute(
        sa.select(answers)
        .where(
            answers.c.tenant_id == tenant_id,
            answers.c.identity == identity,
            answers.c.expires_at > tx.now(),
        )
        .order_by(answers.c.created_at.desc(), answers.c.batch_id)
        .limit(limit)
    ).mappings()
    return [_from_row(row) for row in rows]


@reads
def list_expired(tx: Transaction, *, now: datetime, limit: int) -> list[AnswerBlob]:
    """Return what nobody may take any more."""
    rows = tx.execute(sa.select(answers).where(answers.c.expires_at <= now).limit(limit)).mappings()
    return [_from_row(row) for row in rows]


@writes
def forget(tx: Transaction, found: AnswerBlob) -> None:
    """Remove the row of a blob; the blob itself is removed afterwards."""
    tx.execute(
        sa.delete(answers).where(
            answers.c.batch_id == found.batch_id, answers.c.blob_key == found.blob_key
        )
    )


def forget_of_file(tx: Transaction, file_id: FileId, blob_key: str) -> None:
    """Remove the rows of the batches that read or wrote a file; part of its deletion."""
    tx.execute(sa.delete(answers).where(_is_of_file(file_id, blob_key)))


@reads
def list_of_file(tx: Transaction, file_id: FileId, blob_key: str) -> list[AnswerBlob]:
    """Return what those batches gave that read or wrote a file."""
    rows = tx.execute(sa.select(answers).where(_is_of_file(file_id, blob_key))).mappings()
    return [_from_row(row) for row in rows]


def _is_of_file(file_id: FileId, blob_key: str) -> sa.ColumnElement[bool]:
    # The key of an output names its batch, which spares an index over the output files.
    writer = blob_key.split("/")[1]
    readers = sa.select(batches.c.id).where(batches.c.input_file_id == file_id)
    return (answers.c.batch_id == writer) | answers.c.batch_id.in_(readers)


def _from_row(row: sa.RowMapping) -> AnswerBlob:
    return AnswerBlob(**{name: row[name] for name in _NAMES})
