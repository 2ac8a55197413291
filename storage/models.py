"""Models that planning knows: what each can do, and the fingerprint its workers must have."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobs.domain.errors import NotFound
from storage.database import Transaction, reads, writes
from storage.tables import models


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A published model; `capabilities` is JSON."""

    name: str
    fingerprint: str
    capabilities: Mapping[str, Any]
    published_at: datetime


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


@reads
def get(tx: Transaction, name: str) -> Model:
    """Return a model.

    Raises:
        NotFound: there is none.
    """
    row = tx.execute(sa.select(models).where(models.c.name == name)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"The model '{name}' does not exist.", param="model")
    return _from_row(row)


@reads
def list_all(tx: Transaction) -> list[Model]:
    """Return all models by name."""
    rows = tx.execute(sa.select(models).order_by(models.c.name)).mappings()
    return [_from_row(row) for row in rows]
