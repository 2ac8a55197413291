"""Models that planning knows: what each can do, and the fingerprint its workers must have."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from jobs.domain.errors import NotFound
from jobs.domain.ids import WorkerId
from storage.database import Transaction, reads, writes
from storage.tables import models, workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A published model; `capabilities` is JSON, `published_by` the worker that said so."""

    name: str
    fingerprint: str
    capabilities: Mapping[str, Any]
    published_at: datetime
    published_by: WorkerId | None = None


_NAMES = tuple(field.name for field in fields(Model))


def _from_row(row: sa.RowMapping) -> Model:
    return Model(**{name: row[name] for name in _NAMES})


@writes
def upsert(tx: Transaction, model: Model) -> None:
    """Publish a model, in the place of the one of its name."""
    columns = asdict(model)
    changed = tx.execute(
        sa.update(models).where(models.c.name == model.name).values(columns)
    ).rowcount
    if not changed:
        tx.execute(sa.insert(models).values(columns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A live worker that serves another model under the same name."""

    worker_id: WorkerId
    host: str
    fingerprint: str


@writes
def publish(tx: Transaction, model: Model, *, alive_since: datetime) -> Rival | None:
    """Publish a model, unless a live worker serves another one of its name: then return that one.

    Two workers that publish at once take turns here, so at most one of two that differ serves.

    Args:
        alive_since: a worker heard of since then is alive; the publisher has to be.
    """
    insert = postgresql.insert if tx.is_postgres else sqlite.insert
    new = insert(models).values(asdict(model)).on_conflict_do_nothing().returning(models.c.name)
    if tx.execute(new).first() is not None:
        return None
    known = (
        tx.execute(sa.select(models).where(models.c.name == model.name).with_for_update())
        .mappings()
        .one()
    )
    if known["fingerprint"] != model.fingerprint:
        alive = tx.execute(
            sa.select(workers)
            .where(workers.c.heartbeat_at >= alive_since, workers.c.id != model.published_by)
            .order_by(workers.c.id)
        ).mappings()
        for worker in alive:
            # Between publishing and its next heartbeat a worker does not list the model yet.
            if model.name in worker["models"] or worker["id"] == known["published_by"]:
                return Rival(
                    worker_id=worker["id"],
                    host=worker["host"],
                    fingerprint=known["fingerprint"],
                )
    tx.execute(sa.update(models).where(models.c.name == model.name).values(asdict(model)))
    return None


@reads
def get(tx: Transaction, name: str) -> Model:
    """Return a model.

    Raises:
        NotFound: there is none.
    """
    row = None
    if "\0" not in name:  # Postgres takes no such text
        row = tx.execute(sa.select(models).where(models.c.name == name)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"The model '{name}' does not exist.", param="model")
    return _from_row(row)


@reads
def list_all(tx: Transaction) -> list[Model]:
    """Return all models by name."""
    rows = tx.execute(sa.select(models).order_by(models.c.name)).mappings()
    return [_from_row(row) for row in rows]
