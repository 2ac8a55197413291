"""Work of the whole system that is done now and then, by whichever process comes first."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from storage.database import Transaction, reads, writes
from storage.tables import chores


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn at a chore, for whoever has it; `place` says where the last turn stopped."""

    name: str
    place: str | None


@writes
def claim(
    tx: Transaction, name: str, *, every_seconds: float, now: datetime | None = None
) -> Turn | None:
    """Return the turn at a chore that is due, or None; the next is due after `every_seconds`.

    One of any number of processes gets it. A chore nobody has heard of is first due then.
    A turn is no lease: who dies in one leaves the rest to the next, so chores may be repeated.
    """
    now = now or tx.now()
    due_at = now + timedelta(seconds=every_seconds)
    found = tx.execute(
        sa.update(chores)
        .where(chores.c.name == name, chores.c.due_at <= now)
        .values(due_at=due_at)
        .returning(chores.c.place)
    ).one_or_none()
    if found is not None:
        return Turn(name=name, place=found.place)
    insert = postgresql.insert if tx.is_postgres else sqlite.insert
    tx.execute(insert(chores).values(name=name, due_at=due_at).on_conflict_do_nothing())
    return None


@writes
def leave(tx: Transaction, turn: Turn, *, place: str | None, due_at: datetime | None) -> None:
    """Note where a turn stopped.

    Args:
        place: where the next one goes on; None: at the beginning.
        due_at: when that is due, if earlier than `claim` said.
    """
    values: dict[str, object] = {"place": place}
    if due_at is not None:
        values["due_at"] = due_at
    tx.execute(sa.update(chores).where(chores.c.name == turn.name).values(values))


@reads
def get_due(tx: Transaction, name: str) -> datetime | None:
    """Return when the next turn at a chore is due, or None when nobody has heard of it."""
    due_at: datetime | None = tx.execute(
        sa.select(chores.c.due_at).where(chores.c.name == name)
    ).scalar_one_or_none()
    return due_at
