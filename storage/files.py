"""Uploaded inputs and produced outputs; their bytes are blobs."""

from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from jobs.domain.errors import Conflict, NotFound
from jobs.domain.ids import DEFAULT_TENANT, FileId, TenantId
from storage.answers import forget_of_file
from storage.database import Transaction, reads, writes
from storage.tables import UNFINISHED, batches, files

Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file as its owner sees it, and where its bytes are."""

    id: FileId
    filename: str
    purpose: str
    num_bytes: int
    sha256: str
    blob_key: str
    created_at: datetime
    tenant_id: TenantId = DEFAULT_TENANT
    expires_at: datetime | None = None
    deleted_at: datetime | None = None
    idempotency_key: str | None = None


_NAMES = tuple(field.name for field in fields(File))


def _from_row(row: sa.RowMapping) -> File:
    return File(**{name: row[name] for name in _NAMES})


def _no_such_file(file_id: FileId) -> NotFound:
    return NotFound(f"No such File object: {file_id}", param="file_id")


def insert_file(tx: Transaction, file: File) -> None:
    """Insert the row of a file; part of a larger transaction."""
    tx.execute(sa.insert(files).values(asdict(file)))


@writes
def insert(tx: Transaction, file: File) -> File:
    """Return the file after inserting it, or the one that has its id or its idempotency key."""
    same = files.c.id == file.id
    if file.idempotency_key is not None:
        same |= (files.c.tenant_id == file.tenant_id) & (
            files.c.idempotency_key == file.idempotency_key
        )
    if tx.is_postgres and file.idempotency_key is not None:
        _wait_for_same_key(tx, file.tenant_id, file.idempotency_key)
    row = tx.execute(sa.select(files).where(same)).mappings().first()
    if row is not None:
        return _from_row(row)
    insert_file(tx, file)
    return file


def _wait_for_same_key(tx: Transaction, tenant_id: TenantId, key: str) -> None:
    tx.execute(
        sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(f"{tenant_id}:{key}", 0)))
    )


@reads
def get(tx: Transaction, file_id: FileId, *, tenant_id: TenantId | None = None) -> File:
    """Return a file that was not deleted.

    Args:
        tenant_id: whose it must be; None: anybody's.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    query = sa.select(files).where(files.c.id == file_id, files.c.deleted_at.is_(None))
    if tenant_id is not None:
        query = query.where(files.c.tenant_id == tenant_id)
    row = tx.execute(query).mappings().one_or_none()
    if row is None:
        raise _no_such_file(file_id)
    return _from_row(row)


@reads
def peek(tx: Transaction, file_id: FileId) -> File:
    """Return a file, even after its deletion.

    Raises:
        NotFound: there never was one.
    """
    row = tx.execute(sa.select(files).where(files.c.id == file_id)).mappings().one_or_none()
    if row is None:
        raise _no_such_file(file_id)
    return _from_row(row)


@reads
def list_page(
    tx: Transaction,
    *,
    tenant_id: TenantId,
    purpose: str | None = None,
    after: FileId | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> tuple[list[File], bool]:
    """Return up to `limit` files behind `after`, and whether there are more.

    Raises:
        NotFound: there is no file `after`.
    """
    query = sa.select(files).where(files.c.tenant_id == tenant_id, files.c.deleted_at.is_(None))
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    place = sa.tuple_(files.c.created_at, files.c.id)
    if after is not None:
        cursor = tx.execute(
            sa.select(files.c.created_at).where(files.c.id == after, files.c.tenant_id == tenant_id)
        ).scalar_one_or_none()
        if cursor is None:
            raise _no_such_file(after)
        border = sa.tuple_(
            sa.bindparam(None, cursor, files.c.created_at.type), sa.literal(after, sa.Text)
        )
        query = query.where(place < border if order == "desc" else place > border)
    columns = (files.c.created_at, files.c.id)
    query = query.order_by(*(c.desc() if order == "desc" else c.asc() for c in columns))
    rows = tx.execute(query.limit(limit + 1)).mappings().all()
    return [_from_row(row) for row in rows[:limit]], len(rows) > limit


@writes
def mark_deleted(
    tx: Transaction,
    file_id: FileId,
    *,
    tenant_id: TenantId | None = None,
    now: datetime | None = None,
) -> File:
    """Return the file after deleting its row from view; its blob is the collector's.

    What its batches gave to later ones is nobody's any more either.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: an unfinished batch reads it.
    """
    query = sa.select(files).where(files.c.id == file_id, files.c.deleted_at.is_(None))
    if tenant_id is not None:
        query = query.where(files.c.tenant_id == tenant_id)
    row = tx.execute(query.with_for_update()).mappings().one_or_none()
    if row is None:
        raise _no_such_file(file_id)
    user = tx.execute(
        sa.select(batches.c.id).where(batches.c.input_file_id == file_id, UNFINISHED).limit(1)
    ).scalar_one_or_none()
    if user is not None:
        raise Conflict(
            f"File {file_id} is the input of batch {user}, which has not ended; "
            "cancel the batch or wait for it."
        )
    tx.execute(sa.update(files).where(files.c.id == file_id).values(deleted_at=now or tx.now()))
    forget_of_file(tx, file_id, row["blob_key"])
    return _from_row(row)


@reads
def list_expired(tx: Transaction, *, now: datetime, limit: int = 100) -> list[File]:
    """Return files past their expiry that are still there and that no unfinished batch reads."""
    is_read = sa.exists().where(batches.c.input_file_id == files.c.id, UNFINISHED)
    query = (
        sa.select(files)
        .where(files.c.expires_at <= now, files.c.deleted_at.is_(None), ~is_read)
        .order_by(files.c.expires_at)
        .limit(limit)
    )
    return [_from_row(row) for row in tx.execute(query).mappings()]
