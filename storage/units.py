"""Leased units: one claim, one lease, one fence and one reaper for everything that runs.

    pending ──claim──► leased ──► done | failed | cancelled | expired
       ▲                 │
       └─ release, reap ─┘

A claim and a reap raise the unit's epoch; every later write names the epoch it holds.

Source: the transitions T1 to T5, T8 and T9 of the reliability notes.
"""

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobs.domain.batch import Batch, BatchEvent, BatchStatus, LineProblem, advance
from jobs.domain.errors import Conflict
from jobs.domain.ids import BatchId, UnitId, WorkerId
from jobs.domain.retry import Settlement
from jobs.domain.shard import (
    FORMAT_VERSION,
    TERMINAL_UNIT_STATES,
    Lease,
    UnitKind,
    UnitState,
)
from storage import batch_models
from storage import batches as batch_statements
from storage.database import Transaction, reads, writes
from storage.tables import batches, shards, units
from storage.transitions import (
    WORK_KINDS,
    advance_if_ended,
    insert_event,
    lock_batch,
    lock_unit,
    save_batch,
    stopped_state,
)

_MAX_BACKOFF_SECONDS = 60.0
_LEASE_LOST_EXIT = "lease_expired"

watch = batch_statements.list_stopping


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """What a renewal brings: the new expiry, and whether the work is to stop."""

    expires_at: datetime
    cancel_requested: bool
    expired: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """A unit whose holder was given up, and the state it is in now."""

    unit_id: UnitId
    batch_id: BatchId
    kind: UnitKind
    state: UnitState


def _is_pending(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """Spelled without a parameter, as the partial indexes say it."""
    return table.c.state == sa.literal_column(f"'{UnitState.PENDING}'")


_STILL_PENDING = sa.func.coalesce(units.c.state, "") == str(UnitState.PENDING)
"""The same of units that are named, in words that no index has: a planner that believes that few
are pending would go through all of those instead."""


def _is_one_of(column: sa.ColumnElement[Any], values: Sequence[str]) -> sa.ColumnElement[bool]:
    """One value is spelled as an equality, behind which an index is in order."""
    return column == values[0] if len(values) == 1 else column.in_(values)


_waiting = units.alias("waiting")


@writes
def claim(
    tx: Transaction,
    *,
    worker_id: WorkerId,
    boot_id: str,
    kinds: Collection[UnitKind],
    model_keys: Collection[str] | None = None,
    lease_seconds: float,
    exclude_batches: Collection[BatchId] = (),
    now: datetime | None = None,
) -> Lease | None:
    """Return a lease of the most urgent unit that may run now, or None.

    The higher priority goes first, then the earlier deadline, then the older unit. Shards of one
    model are found by one look at an index, however many wait; with several models, all that wait
    for them are sorted.

    Args:
        model_keys: which models' shards; None: any.
        exclude_batches: whose units to leave to others.
    """
    now = now or tx.now()
    expires_at = now + timedelta(seconds=lease_seconds)
    # "Work stops with its batch" is for plans and shards alone. Looked up unit by unit, in the
    # index's order: a join is open to a plan that sorts everything that waits.
    batch_runs = (
        sa.select(
            batches.c.status.in_((BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS))
            & batches.c.ending.is_(None)
        )
        .where(batches.c.id == units.c.batch_id)
        .scalar_subquery()
    )
    query = (
        sa.select(units.c.id)
        .where(
            _is_pending(units),
            _is_one_of(units.c.kind, [str(kind) for kind in kinds]),
            # Hidden from the planner, which would else prefer the index of what became ready, and
            # sort all of it.
            sa.func.coalesce(units.c.not_before, now) <= now,
            units.c.format_version <= FORMAT_VERSION,
            units.c.kind.not_in(WORK_KINDS) | batch_runs,
        )
        .order_by(units.c.priority.desc(), units.c.deadline_at, units.c.id)
        .limit(1)
    )
    if model_keys is not None:
        is_ours = _is_one_of(units.c.model_key, list(model_keys))
        if set(kinds) != {UnitKind.SHARD}:
            is_ours |= units.c.kind != UnitKind.SHARD
        query = query.where(is_ours)
    if exclude_batches:
        query = query.where(units.c.batch_id.not_in(list(exclude_batches)))
    candidate = (
        query.with_for_update(of=units, skip_locked=True)
        .cte("candidate")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    row = (
        tx.execute(
            sa.update(units)
            .where(units.c.id == sa.select(candidate.c.id).scalar_subquery(), _STILL_PENDING)
            .values(
                state=str(UnitState.LEASED),
                epoch=units.c.epoch + 1,
                owner=worker_id,
                boot_id=boot_id,
                lease_expires_at=expires_at,
                claims=units.c.claims + 1,
            )
            .returning(units)
        )
        .mappings()
        .one_or_none()
    )
    if row is None:
        return None
    return Lease(
        unit_id=row["id"],
        batch_id=row["batch_id"],
        kind=UnitKind(row["kind"]),
        ordinal=row["ordinal"],
        epoch=row["epoch"],
        owner=worker_id,
        expires_at=expires_at,
        attempt=row["claims"],
        crash_count=row["crash_count"],
        num_stalls=row["num_stalls"],
        model_key=row["model_key"],
    )


@writes
def renew(
    tx: Transaction,
    leases: Sequence[Lease],
    *,
    lease_seconds: float,
    now: datetime | None = None,
) -> dict[UnitId, Renewal]:
    """Return a renewal for each lease that is still held; a lease that is missing is lost.

    A lease past its expiry that nobody reaped is renewed.
    """
    if not leases:
        return {}
    now = now or tx.now()
    expires_at = now + timedelta(seconds=lease_seconds)
    held = tx.execute(
        sa.update(units)
        .where(
            sa.tuple_(units.c.id, units.c.epoch).in_(
                [(lease.unit_id, lease.epoch) for lease in leases]
            ),
            units.c.state == UnitState.LEASED,
        )
        .values(lease_expires_at=expires_at)
        .returning(units.c.id, units.c.batch_id, units.c.kind)
    ).all()
    stopping = batch_statements.find_stopping(tx, {row.batch_id for row in held}, now=now)
    renewals: dict[UnitId, Renewal] = {}
    for row in held:
        stopped = stopping.get(row.batch_id) if row.kind in WORK_KINDS else None
        renewals[row.id] = Renewal(
            expires_at=expires_at,
            cancel_requested=stopped is UnitState.CANCELLED,
            expired=stopped is UnitState.EXPIRED,
        )
    return renewals


@writes
def settle(
    tx: Transaction, lease: Lease, settlement: Settlement, *, now: datetime | None = None
) -> UnitState:
    """Return the state the unit is in after its attempt ended; a repeated call changes nothing.

    Work released by a batch that was stopped ends as its batch does. A batch whose plan failed
    fails. A finalize unit is never given up: its batch could not end any other way; nor does a
    plan end as cancelled or expired before its batch was stopped.

    Raises:
        LeaseLost: the unit is no longer ours.
        Conflict: a shard is said to be done and has lines without a result, or a plan or a
            finalize unit without what it is for.
    """
    if not lock_unit(tx, lease):
        row = tx.execute(sa.select(units.c.state).where(units.c.id == lease.unit_id)).one()
        return UnitState(row.state)
    state, delay_seconds = settlement.state, settlement.delay_seconds
    _check_settlement(tx, lease, state)
    if state in TERMINAL_UNIT_STATES and lease.kind is UnitKind.FINALIZE:
        state, delay_seconds = UnitState.PENDING, _MAX_BACKOFF_SECONDS
    if state in (UnitState.CANCELLED, UnitState.EXPIRED) and lease.kind is UnitKind.PLAN:
        state = UnitState.PENDING  # or what the batch says, below
    now = now or tx.now()
    batch = lock_batch(tx, lease.batch_id)
    if state is UnitState.PENDING and lease.kind in WORK_KINDS and batch is not None:
        state = stopped_state(batch) or state
    _write_end(
        tx, lease.unit_id, state, reason=settlement.exit, now=now, delay_seconds=delay_seconds
    )
    if lease.kind is UnitKind.SHARD:
        # It was given back by a worker that lives, so none of its lines killed one.
        untried = {"owner": lease.owner, "positions": []}
        here = (shards.c.unit_id == lease.unit_id) & shards.c.trial.is_not(None)
        tx.execute(sa.update(shards).where(here).values(trial=untried))
    if batch is not None and lease.kind in WORK_KINDS and state in TERMINAL_UNIT_STATES:
        _after_work(tx, batch, lease.kind, state, now=now)
    return state


def _check_settlement(tx: Transaction, lease: Lease, state: UnitState) -> None:
    """Return if a unit may be settled so.

    Raises:
        Conflict: it may not; see `settle`.
    """
    if state is UnitState.LEASED:
        raise Conflict(f"Unit {lease.unit_id} is leased; a settlement ends or releases it.")
    if state is not UnitState.DONE:
        return
    if lease.kind in (UnitKind.PLAN, UnitKind.FINALIZE):
        raise Conflict(f"Unit {lease.unit_id} is not done; what it is for ends it.")
    if lease.kind is not UnitKind.SHARD:
        return
    shard = tx.execute(
        sa.select(shards.c.num_lines, shards.c.num_done).where(shards.c.unit_id == lease.unit_id)
    ).one()
    if shard.num_done < shard.num_lines:
        raise Conflict(
            f"Shard {lease.unit_id} has {shard.num_lines - shard.num_done} lines without a result; "
            "it is not done."
        )


def _write_end(
    tx: Transaction,
    unit_id: UnitId,
    state: UnitState,
    *,
    reason: str,
    now: datetime,
    delay_seconds: float,
    **columns: object,
) -> None:
    if state is UnitState.PENDING:
        columns |= {
            "owner": None,
            "boot_id": None,
            "lease_expires_at": None,
            "not_before": now + timedelta(seconds=delay_seconds),
            "last_poked_at": None,
        }
    tx.execute(
        sa.update(units)
        .where(units.c.id == unit_id, units.c.state == UnitState.LEASED)
        .values(state=str(state), last_exit=reason, **columns)
    )


def _after_work(
    tx: Transaction, batch: Batch, kind: UnitKind, state: UnitState, *, now: datetime
) -> Batch:
    """Return the locked batch after one of its units of work ended."""
    if (
        kind is UnitKind.PLAN
        and state is UnitState.FAILED
        and batch.status is BatchStatus.VALIDATING
    ):
        problem = LineProblem(
            code="planning_failed",
            message="The input file could not be read to its end after several attempts; "
            "create the batch again, and tell the operator when it happens again.",
        )
        batch = replace(
            advance(batch, BatchEvent.REFUSED, now=now), errors=(problem,), num_errors=1
        )
        save_batch(tx, batch)
        insert_event(tx, batch, now=now)
        return batch
    return advance_if_ended(tx, batch, now=now)


@writes
def reap(
    tx: Transaction,
    *,
    now: datetime | None = None,
    limit: int = 100,
    max_claims_without_progress: int = 10,
    rng: random.Random | None = None,
) -> list[Reaped]:
    """Return up to `limit` units whose leases ran out, after giving them up.

    Each may be claimed again after a random wait that doubles with every lease lost without
    progress; one that lost more than `max_claims_without_progress` in a row has failed.
    """
    now = now or tx.now()
    return _give_up(
        tx,
        units.c.lease_expires_at < now,
        now=now,
        limit=limit,
        max_stalls=max_claims_without_progress,
        rng=rng or random.Random(),  # noqa: S311 - spreads load, guards nothing
    )


@reads
def next_expiry(tx: Transaction) -> datetime | None:
    """Return when the first of the present leases runs out, unless it is renewed."""
    found: datetime | None = tx.execute(
        sa.select(sa.func.min(units.c.lease_expires_at)).where(
            units.c.state == sa.literal_column(f"'{UnitState.LEASED}'")
        )
    ).scalar_one()
    return found


@writes
def reap_other_boots(tx: Transaction, *, boot_id: str, now: datetime | None = None) -> list[Reaped]:
    """Return the units that processes of an earlier start held, after giving them up at once.

    Only for a database that this process has for itself.
    """
    return _give_up(
        tx,
        units.c.boot_id.is_distinct_from(boot_id),
        now=now or tx.now(),
        limit=None,
        max_stalls=None,
        rng=None,
    )


def _give_up(
    tx: Transaction,
    which: sa.ColumnElement[bool],
    *,
    now: datetime,
    limit: int | None,
    max_stalls: int | None,
    rng: random.Random | None,
) -> list[Reaped]:
    """Give up leased units; without `rng` they may be claimed at once."""
    query = (
        sa.select(units.c.id, units.c.batch_id, units.c.kind, units.c.num_stalls)
        .where(units.c.state == sa.literal_column(f"'{UnitState.LEASED}'"), which)
        .order_by(units.c.id)
        .limit(limit)
        .with_for_update(key_share=True, skip_locked=True)
    )
    lost = defaultdict(list)
    for row in tx.execute(query):
        lost[row.batch_id].append(row)
    reaped: list[Reaped] = []
    for batch_id in sorted(lost):
        batch = lock_batch(tx, batch_id)
        if batch is None:
            continue
        for row in lost[batch_id]:
            kind = UnitKind(row.kind)
            num_stalls = row.num_stalls + 1
            state, reason = UnitState.PENDING, _LEASE_LOST_EXIT
            if kind in WORK_KINDS and (stopped := stopped_state(batch)) is not None:
                state = stopped
            elif (
                max_stalls is not None and num_stalls > max_stalls and kind is not UnitKind.FINALIZE
            ):
                state, reason = UnitState.FAILED, "stuck"
            ceiling = min(_MAX_BACKOFF_SECONDS, 2.0 ** min(num_stalls, 10))
            _write_end(
                tx,
                row.id,
                state,
                reason=reason,
                now=now,
                delay_seconds=rng.uniform(0, ceiling) if rng else 0.0,
                epoch=units.c.epoch + 1,
                crash_count=units.c.crash_count + 1,
                num_stalls=num_stalls,
            )
            if kind in WORK_KINDS and state in TERMINAL_UNIT_STATES:
                batch = _after_work(tx, batch, kind, state, now=now)
            reaped.append(Reaped(unit_id=row.id, batch_id=batch_id, kind=kind, state=state))
    return reaped


@reads
def list_waiting_models(tx: Transaction) -> dict[str, datetime]:
    """Return which models have pending shards, and since when the first of them could run.

    Reads one index entry a model, not what waits.
    """
    models = batch_models.select_unfinished()
    oldest = (
        sa.select(sa.func.min(units.c.not_before))
        .where(
            _is_pending(units),
            units.c.kind == UnitKind.SHARD,
            units.c.model_key == models.c.model_key,
            # An engine would be started for those of a newer program, again and again.
            units.c.format_version <= FORMAT_VERSION,
        )
        .scalar_subquery()
    )
    rows = tx.execute(sa.select(models.c.model_key, oldest.label("oldest_at")))
    return {row.model_key: row.oldest_at for row in rows if row.oldest_at is not None}


@writes
def poke_due(
    tx: Transaction, *, again_after_seconds: float = 30.0, now: datetime | None = None
) -> list[tuple[UnitKind, str | None]]:
    """Return whom to wake, kind and model of units that wait; not again for a while.

    Of each kind and model it looks at what became ready last, and marks that alone: new work is
    poked for at once, and the rest is claimed before it.
    """
    now = now or tx.now()
    models = batch_models.select_unfinished()
    is_of_model = _waiting.c.model_key == models.c.model_key
    candidates = [sa.select(_last_ready(UnitKind.SHARD, is_of_model, now)).select_from(models)]
    candidates += [
        sa.select(_last_ready(kind, _waiting.c.model_key.is_(None), now))
        for kind in UnitKind
        if kind is not UnitKind.SHARD
    ]
    ids = tx.execute(sa.union_all(*candidates)).scalars().all()
    poked = units.c.last_poked_at
    due = (
        sa.select(units.c.id)
        .where(
            units.c.id.in_([unit_id for unit_id in ids if unit_id is not None]),
            _STILL_PENDING,
            poked.is_(None) | (poked <= now - timedelta(seconds=again_after_seconds)),
        )
        .with_for_update(skip_locked=True)
        .cte("due")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    rows = tx.execute(
        sa.update(units)
        .where(units.c.id.in_(sa.select(due.c.id)))
        .values(last_poked_at=now)
        .returning(units.c.kind, units.c.model_key)
    )
    return sorted(
        ((UnitKind(row.kind), row.model_key) for row in rows),
        key=lambda pair: (pair[0], pair[1] or ""),
    )


def _last_ready(
    kind: UnitKind, model: sa.ColumnElement[bool], now: datetime
) -> sa.ScalarSelect[str]:
    """Return the id of the pending unit of this kind and model that could run last."""
    return (
        sa.select(_waiting.c.id)
        .where(_is_pending(_waiting), _waiting.c.kind == kind, model, _waiting.c.not_before <= now)
        .order_by(_waiting.c.not_before.desc(), _waiting.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )


@reads
def get_exit(tx: Transaction, unit_id: UnitId) -> str | None:
    """Return how the unit's last attempt ended, as its settlement said."""
    reason: str | None = tx.execute(
        sa.select(units.c.last_exit).where(units.c.id == unit_id)
    ).scalar_one()
    return reason
