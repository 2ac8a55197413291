"""The models of a batch that runs on several; that of any other is in its own row."""

from collections.abc import Sequence
from dataclasses import replace

import sqlalchemy as sa

from jobs.domain.batch import Batch
from jobs.domain.ids import BatchId
from storage.database import Transaction
from storage.tables import UNFINISHED, batch_models, batches


def insert(tx: Transaction, batch_id: BatchId, names: Sequence[str]) -> None:
    """Note the models of a batch, in the order in which its file names them."""
    tx.execute(
        sa.insert(batch_models),
        [
            {"batch_id": batch_id, "ordinal": ordinal, "model_key": name}
            for ordinal, name in enumerate(names)
        ],
    )


def fill_in(tx: Transaction, found: Sequence[Batch]) -> list[Batch]:
    """Return batches with their models, where these are several."""
    wanted = [one.id for one in found if one.planned_at is not None and one.model is None]
    if not wanted:
        return list(found)
    rows = tx.execute(
        sa.select(batch_models)
        .where(batch_models.c.batch_id.in_(wanted))
        .order_by(batch_models.c.batch_id, batch_models.c.ordinal)
    )
    models: dict[str, list[str]] = {}
    for row in rows:
        models.setdefault(row.batch_id, []).append(row.model_key)
    return [replace(one, models=tuple(models.get(one.id, ()))) for one in found]


def select_unfinished() -> sa.Subquery:
    """Return each model that a batch which has not ended runs on, once."""
    ones = sa.select(batches.c.model_key).where(UNFINISHED, batches.c.model_key.is_not(None))
    several = (
        sa.select(batch_models.c.model_key)
        .join(batches, batches.c.id == batch_models.c.batch_id)
        .where(UNFINISHED)
    )
    return sa.union(ones, several).subquery("models")
