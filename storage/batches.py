"""Batches: their statuses change through `jobs.domain.batch.advance` and nowhere else."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from jobs.domain.batch import (
    Batch,
    BatchEnding,
    BatchEvent,
    BatchStatus,
    LineProblem,
    RequestCounts,
    advance,
)
from jobs.domain.errors import NotFound
from jobs.domain.ids import BatchId, TenantId
from jobs.domain.mixed import MIXED
from jobs.domain.result import Usage
from jobs.domain.shard import (
    MIXED_FORMAT,
    PLAIN_FORMAT,
    RUN_ORDER_FORMAT,
    Cut,
    Lease,
    UnitKind,
    UnitState,
    bitmap,
)
from storage import batch_models
from storage.blobs.base import BlobInfo
from storage.database import Transaction, reads, writes
from storage.files import File, insert_file
from storage.tables import UNENDED, UNFINISHED, batches, files, segments, shards, units
from storage.transitions import (
    WORK_KINDS,
    advance_if_ended,
    batch_from_row,
    batch_to_row,
    end_unit,
    insert_event,
    insert_unit,
    lock_batch,
    lock_unit,
    new_unit,
    save_batch,
    stop_pending,
    stopped_state,
)

_SUMS = (
    "num_completed",
    "num_failed",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
)


_ENDED = {"state": str(UnitState.DONE), "last_exit": "reused"}


class Reused(NamedTuple):
    """A shard whose results are there before it is, each line its own, and the blob with them."""

    cut: Cut
    blob: BlobInfo


def _no_such_batch(batch_id: BatchId) -> NotFound:
    return NotFound(f"No such Batch object: {batch_id}", param="batch_id")


def _load(tx: Transaction, rows: Sequence[sa.RowMapping]) -> list[Batch]:
    """Return the batches of `rows` with what their shards have done, or how they ended."""
    open_ids = [row["id"] for row in rows if row["final_completed"] is None]
    sums: dict[str, Mapping[str, Any]] = {}
    if open_ids:
        query = (
            sa.select(
                shards.c.batch_id,
                *(
                    sa.cast(sa.func.sum(shards.c[name]), sa.BigInteger).label(name)
                    for name in _SUMS
                ),
            )
            .where(shards.c.batch_id.in_(open_ids))
            .group_by(shards.c.batch_id)
        )
        sums = {row["batch_id"]: dict(row) for row in tx.execute(query).mappings()}
    found = []
    tokens: Mapping[str, Any]
    for row in rows:
        if row["final_completed"] is not None:
            completed, failed = row["final_completed"], row["final_failed"]
            tokens, stem = dict(row), "final_"
        else:
            tokens, stem = sums.get(row["id"], dict.fromkeys(_SUMS, 0)), ""
            completed, failed = tokens["num_completed"], tokens["num_failed"]
        counts = RequestCounts(total=row["total"] or 0, completed=completed, failed=failed)
        usage = Usage(
            prompt_tokens=tokens[f"{stem}prompt_tokens"],
            completion_tokens=tokens[f"{stem}completion_tokens"],
            cached_tokens=tokens[f"{stem}cached_tokens"],
        )
        found.append(batch_from_row(row, counts, usage))
    return batch_models.fill_in(tx, found)


def load(tx: Transaction, batch_id: BatchId) -> Batch:
    """Return a batch that is there; part of a larger transaction."""
    row = tx.execute(sa.select(batches).where(batches.c.id == batch_id)).mappings().one()
    return _load(tx, [row])[0]


@writes
def insert(tx: Transaction, batch: Batch) -> Batch:
    """Return the batch after inserting it with its plan unit.

    A batch that has the id, or the tenant's idempotency key, is returned as it is instead.

    Raises:
        NotFound: its input file is not there, or is another tenant's.
    """
    # Held against a deletion, and against another insert with the same key of the same file.
    file = tx.execute(
        sa.select(files.c.id)
        .where(
            files.c.id == batch.input_file_id,
            files.c.tenant_id == batch.tenant_id,
            files.c.deleted_at.is_(None),
        )
        .with_for_update(read=True)
    ).first()
    if file is None:
        raise NotFound(f"No such File object: {batch.input_file_id}", param="input_file_id")
    same = batches.c.id == batch.id
    if batch.idempotency_key is not None:
        if tx.is_postgres:
            key = f"{batch.tenant_id}:{batch.idempotency_key}"
            tx.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(key, 1))))
        same |= (batches.c.tenant_id == batch.tenant_id) & (
            batches.c.idempotency_key == batch.idempotency_key
        )
    row = tx.execute(sa.select(batches).where(same)).mappings().first()
    if row is not None:
        return _load(tx, [row])[0]
    tx.execute(sa.insert(batches).values(batch_to_row(batch)))
    insert_unit(tx, batch, UnitKind.PLAN, now=batch.created_at)
    return batch


@reads
def get(tx: Transaction, batch_id: BatchId, *, tenant_id: TenantId | None = None) -> Batch:
    """Return a batch with its counts and usage so far.

    Args:
        tenant_id: whose it must be; None: anybody's.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    query = sa.select(batches).where(batches.c.id == batch_id)
    if tenant_id is not None:
        query = query.where(batches.c.tenant_id == tenant_id)
    row = tx.execute(query).mappings().one_or_none()
    if row is None:
        raise _no_such_batch(batch_id)
    return _load(tx, [row])[0]


@reads
def list_page(
    tx: Transaction, *, tenant_id: TenantId, after: BatchId | None = None, limit: int = 20
) -> tuple[list[Batch], bool]:
    """Return up to `limit` batches older than `after`, newest first, and whether there are more.

    Raises:
        NotFound: there is no batch `after`.
    """
    query = sa.select(batches).where(batches.c.tenant_id == tenant_id)
    if after is not None:
        cursor = tx.execute(
            sa.select(batches.c.created_at).where(
                batches.c.id == after, batches.c.tenant_id == tenant_id
            )
        ).scalar_one_or_none()
        if cursor is None:
            raise _no_such_batch(after)
        query = query.where(
            sa.tuple_(batches.c.created_at, batches.c.id)
            < sa.tuple_(
                sa.bindparam(None, cursor, batches.c.created_at.type), sa.literal(after, sa.Text)
            )
        )
    query = query.order_by(batches.c.created_at.desc(), batches.c.id.desc()).limit(limit + 1)
    rows = tx.execute(query).mappings().all()
    return _load(tx, rows[:limit]), len(rows) > limit


@writes
def request_cancel(
    tx: Transaction,
    batch_id: BatchId,
    *,
    tenant_id: TenantId | None = None,
    now: datetime | None = None,
) -> Batch:
    """Return the batch after asking it to stop; what is finished by then is kept.

    Asking again, or while the files are being written, changes nothing.

    Raises:
        NotFound: there is no such batch, or it is another tenant's.
        IllegalTransition: it has completed, failed or expired.
    """
    batch = lock_batch(tx, batch_id, tenant_id=tenant_id)
    if batch is None:
        raise _no_such_batch(batch_id)
    now = now or tx.now()
    asked = advance(batch, BatchEvent.CANCEL_REQUESTED, now=now)
    if asked.status is not batch.status:
        save_batch(tx, asked, cancel_requested_at=now)
        stop_pending(tx, asked)
        advance_if_ended(tx, asked, now=now)
    return load(tx, batch_id)


@writes
def record_plan(
    tx: Transaction,
    lease: Lease,
    *,
    cuts: Sequence[Cut],
    source_blob_key: str,
    model_key: str | None,
    total: int,
    model_keys: Sequence[str] = (),
    is_run_order: bool = False,
    reused: Sequence[Reused] = (),
    reuse_identity: str | None = None,
    reuse_blob_key: str | None = None,
    now: datetime | None = None,
) -> bool:
    """Insert the shards of a batch, start it and end its plan unit; all or nothing.

    Args:
        model_key: what every shard runs on; None: they run on several.
        total: lines of the input; with a run order some of them may not run themselves.
        model_keys: where they do, what each of `cuts` runs on, in the order of the models.
        is_run_order: whether the cuts are of a run-order blob.
        reused: further shards behind the cuts, whose results are there already.
        reuse_identity: the model whose answers are given to later batches; None: none are.
        reuse_blob_key: where the keys of these answers are.

    Returns False, and ends the unit, when the batch was stopped meanwhile. A repeated call
    changes nothing.

    Raises:
        LeaseLost: the plan unit is no longer ours.
    """
    held = lock_unit(tx, lease)
    batch = lock_batch(tx, lease.batch_id)
    if batch is None:
        raise _no_such_batch(lease.batch_id)
    if not held:
        return batch.planned_at is not None
    now = now or tx.now()
    stopped = stopped_state(batch)
    if stopped is not None or batch.planned_at is not None:
        end_unit(tx, lease, stopped or UnitState.DONE, reason=str(stopped or "already_planned"))
        advance_if_ended(tx, batch, now=now)
        return stopped is None
    batch = replace(
        advance(batch, BatchEvent.PLANNED, now=now),
        planned_at=now,
        model=model_key or batch.model,
        num_reused=sum(one.cut.num_lines for one in reused),
    )
    save_batch(
        tx,
        batch,
        total=total,
        source_blob_key=source_blob_key,
        model_key=model_key,
        reuse_identity=reuse_identity,
        reuse_blob_key=reuse_blob_key,
    )
    names = list(dict.fromkeys(model_keys))
    if names:
        batch_models.insert(tx, batch.id, names)
    format_version = RUN_ORDER_FORMAT if is_run_order else PLAIN_FORMAT
    if names or batch.endpoint == MIXED:
        format_version = MIXED_FORMAT
    places = [(cut, None) for cut in cuts] + [(one.cut, one.blob) for one in reused]
    new_units = [
        new_unit(
            batch,
            UnitKind.SHARD,
            now=now,
            ordinal=ordinal,
            model_key=model_keys[ordinal] if names else model_key,
            format_version=format_version,
        )
        | ({"last_exit": None} if blob is None else _ENDED)
        for ordinal, (_, blob) in enumerate(places)
    ]
    if new_units:
        tx.execute(sa.insert(units), new_units)
        tx.execute(
            sa.insert(shards),
            [
                asdict(cut)
                | {
                    "unit_id": unit["id"],
                    "batch_id": batch.id,
                    "ordinal": unit["ordinal"],
                    "blob_key": source_blob_key,
                    "done": bitmap([*range(cut.num_lines if blob else 0)], cut.num_lines),
                    "num_done": cut.num_lines if blob else 0,
                    "num_completed": cut.num_lines if blob else 0,
                    "suspects": [],
                    "is_run_order": is_run_order,
                }
                for unit, (cut, blob) in zip(new_units, places, strict=True)
            ],
        )
    if reused:
        tx.execute(
            sa.insert(segments),
            [
                {
                    "unit_id": unit["id"],
                    "epoch": 0,  # before that of the first claim
                    "sequence": 0,
                    "blob_key": blob.key,
                    "sha256": blob.sha256,
                    "num_bytes": blob.num_bytes,
                    "positions": bitmap([*range(cut.num_lines)], cut.num_lines),
                    "num_completed": cut.num_lines,
                    "num_failed": 0,
                    "prompt_tokens": 0,
                    "completion_tokens": 0,
                    "cached_tokens": 0,
                    "created_at": now,
                }
                for unit, (cut, blob) in zip(new_units[len(cuts) :], reused, strict=True)
            ],
        )
    end_unit(tx, lease, UnitState.DONE, reason="done")
    advance_if_ended(tx, batch, now=now)
    return True


@writes
def refuse(
    tx: Transaction,
    lease: Lease,
    *,
    errors: Sequence[LineProblem],
    num_errors: int,
    now: datetime | None = None,
) -> bool:
    """Fail a batch whose file is not good, and end its plan unit.

    Returns False, and ends the unit, when the batch was cancelled meanwhile.

    Args:
        errors: the problems to show; `num_errors` counts those left out too.

    Raises:
        LeaseLost: the plan unit is no longer ours.
    """
    held = lock_unit(tx, lease)
    batch = lock_batch(tx, lease.batch_id)
    if batch is None:
        raise _no_such_batch(lease.batch_id)
    if not held:
        return batch.status is BatchStatus.FAILED
    now = now or tx.now()
    if batch.status is not BatchStatus.VALIDATING:
        end_unit(tx, lease, stopped_state(batch) or UnitState.DONE, reason="stopped")
        advance_if_ended(tx, batch, now=now)
        return False
    batch = replace(
        advance(batch, BatchEvent.REFUSED, now=now), errors=tuple(errors), num_errors=num_errors
    )
    save_batch(tx, batch)
    insert_event(tx, batch, now=now)
    end_unit(tx, lease, UnitState.DONE, reason="refused")
    return True


@writes
def expire_overdue(
    tx: Transaction, *, now: datetime | None = None, limit: int = 100
) -> list[BatchId]:
    """Return the batches past their deadline after ending their pending work as expired."""
    now = now or tx.now()
    overdue = tx.execute(
        sa.select(batches.c.id)
        .where(
            UNFINISHED,
            batches.c.status.in_((BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)),
            batches.c.deadline_at <= now,
            batches.c.ending.is_(None),
        )
        .order_by(batches.c.deadline_at, batches.c.id)
        .limit(limit)
    ).scalars()
    expired: list[BatchId] = []
    for batch_id in sorted(overdue):
        batch = lock_batch(tx, batch_id)
        if batch is None or batch.ending is not None or batch.status.is_terminal:
            continue
        batch = advance(batch, BatchEvent.DEADLINE_PASSED, now=now)
        save_batch(tx, batch)
        stop_pending(tx, batch)
        advance_if_ended(tx, batch, now=now)
        expired.append(batch.id)
    return expired


@writes
def advance_finished(
    tx: Transaction, *, limit: int = 100, now: datetime | None = None
) -> list[BatchId]:
    """Return the batches that this call moved on because all their work had ended.

    Every transition that ends a batch's last unit does the same in its own transaction; this
    finds what a crash in between, or a release that raced a cancel, left behind.
    """
    now = now or tx.now()
    stopping = (batches.c.status == BatchStatus.CANCELLING) | batches.c.ending.is_not(None)
    working = sa.exists().where(
        units.c.batch_id == batches.c.id,
        units.c.kind.in_(WORK_KINDS),
        UNENDED,
    )
    leased = sa.exists().where(
        units.c.batch_id == batches.c.id,
        units.c.kind.in_(WORK_KINDS),
        units.c.state == UnitState.LEASED,
    )
    finalizing = sa.exists().where(
        units.c.batch_id == batches.c.id, units.c.kind == UnitKind.FINALIZE, UNENDED
    )
    waiting = tx.execute(
        sa.select(batches.c.id)
        .where(
            UNFINISHED,
            ~finalizing,
            sa.or_(
                stopping & ~leased,
                (batches.c.status == BatchStatus.IN_PROGRESS) & ~working,
            ),
        )
        .order_by(batches.c.id)
        .limit(limit)
    ).scalars()
    moved: list[BatchId] = []
    for batch_id in waiting.all():
        batch = lock_batch(tx, batch_id)
        if batch is None:
            continue
        stop_pending(tx, batch)
        after = advance_if_ended(tx, batch, now=now)
        if after is not batch:
            moved.append(batch.id)
    return moved


@writes
def complete(
    tx: Transaction,
    lease: Lease,
    *,
    output_file: File | None,
    error_file: File | None,
    num_completed: int,
    num_failed: int,
    usage: Usage,
    now: datetime | None = None,
) -> Batch:
    """Return the batch after publishing its files and ending it; a repeated call changes nothing.

    Raises:
        LeaseLost: the finalize unit is no longer ours.
    """
    held = lock_unit(tx, lease)
    batch = lock_batch(tx, lease.batch_id)
    if batch is None:
        raise _no_such_batch(lease.batch_id)
    if held:
        now = now or tx.now()
        for file in (output_file, error_file):
            if file is not None:
                insert_file(tx, file)
        batch = replace(
            advance(batch, BatchEvent.WRITTEN, now=now),
            output_file_id=output_file.id if output_file else None,
            error_file_id=error_file.id if error_file else None,
        )
        save_batch(
            tx,
            batch,
            final_completed=num_completed,
            final_failed=num_failed,
            final_prompt_tokens=usage.prompt_tokens,
            final_completion_tokens=usage.completion_tokens,
            final_cached_tokens=usage.cached_tokens,
        )
        insert_event(tx, batch, now=now)
        end_unit(tx, lease, UnitState.DONE, reason="done")
    return load(tx, batch.id)


@writes
def give_up(
    tx: Transaction,
    lease: Lease,
    *,
    errors: Sequence[LineProblem],
    now: datetime | None = None,
) -> Batch:
    """Return the batch after failing it: its files cannot be written, now or ever.

    A repeated call changes nothing. Segments stay where they are.

    Raises:
        LeaseLost: the finalize unit is no longer ours.
    """
    held = lock_unit(tx, lease)
    batch = lock_batch(tx, lease.batch_id)
    if batch is None:
        raise _no_such_batch(lease.batch_id)
    if held:
        now = now or tx.now()
        batch = replace(
            advance(batch, BatchEvent.INPUT_LOST, now=now),
            errors=tuple(errors),
            num_errors=len(errors),
        )
        save_batch(tx, batch)
        insert_event(tx, batch, now=now)
        end_unit(tx, lease, UnitState.DONE, reason="input_lost")
    return load(tx, batch.id)


@reads
def get_reuse(tx: Transaction, batch_id: BatchId) -> tuple[str, str] | None:
    """Return whose answers of a batch are given to later ones, and where their keys are."""
    row = tx.execute(
        sa.select(batches.c.reuse_identity, batches.c.reuse_blob_key).where(
            batches.c.id == batch_id, batches.c.reuse
        )
    ).one_or_none()
    if row is None or row.reuse_identity is None or row.reuse_blob_key is None:
        return None
    return row.reuse_identity, row.reuse_blob_key


def find_stopping(
    tx: Transaction, batch_ids: Collection[BatchId], *, now: datetime
) -> dict[BatchId, UnitState]:
    """Return what `list_stopping` does, as part of a larger transaction."""
    rows = tx.execute(
        sa.select(batches.c.id, batches.c.status, batches.c.ending, batches.c.deadline_at).where(
            batches.c.id.in_(list(batch_ids))
        )
    )
    found: dict[BatchId, UnitState] = {}
    for row in rows:
        if row.status in {BatchStatus.CANCELLING, BatchStatus.CANCELLED, BatchStatus.FAILED}:
            found[row.id] = UnitState.CANCELLED
        elif row.ending == BatchEnding.EXPIRED or (row.ending is None and row.deadline_at <= now):
            found[row.id] = UnitState.EXPIRED
    return found


@reads
def list_stopping(
    tx: Transaction, batch_ids: Collection[BatchId], *, now: datetime | None = None
) -> dict[BatchId, UnitState]:
    """Return those of `batch_ids` whose work is to stop, each with the state its units end in.

    One read of a few rows: workers ask it more often than they renew.
    """
    return find_stopping(tx, batch_ids, now=now or tx.now()) if batch_ids else {}
