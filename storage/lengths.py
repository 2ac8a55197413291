"""How long answers to a template were, by tenant and model: advice for planning."""

from collections.abc import Mapping
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from storage.database import Transaction, reads, writes
from storage.tables import answer_lengths

MAX_TEMPLATES = 4096
"""Of one tenant and model."""


@writes
def record(
    tx: Transaction,
    tenant_id: str,
    model_key: str,
    num_tokens: Mapping[int, int],
    *,
    keep: int = MAX_TEMPLATES,
    now: datetime | None = None,
) -> None:
    """Note the mean answer of each template, in the place of what was known of it before.

    Args:
        keep: so many templates are known at most; what was learned long ago goes.
    """
    if not num_tokens:
        return
    now = now or tx.now()
    insert = postgresql.insert if tx.is_postgres else sqlite.insert
    new = insert(answer_lengths)
    tx.execute(
        new.on_conflict_do_update(
            index_elements=["tenant_id", "model_key", "template"],
            set_={name: new.excluded[name] for name in ("num_tokens", "learned_at")},
        ),
        [
            {
                "tenant_id": tenant_id,
                "model_key": model_key,
                "template": template,
                "num_tokens": mean,
                "learned_at": now,
            }
            # In one order everywhere, so that two batches never wait for each other.
            for template, mean in sorted(num_tokens.items())
        ],
    )
    of_them = (
        answer_lengths.c.tenant_id == tenant_id,
        answer_lengths.c.model_key == model_key,
    )
    oldest_kept = (
        sa.select(answer_lengths.c.learned_at)
        .where(*of_them)
        .order_by(answer_lengths.c.learned_at.desc())
        .offset(keep - 1)
        .limit(1)
        .scalar_subquery()
    )
    tx.execute(sa.delete(answer_lengths).where(*of_them, answer_lengths.c.learned_at < oldest_kept))


@reads
def read(tx: Transaction, tenant_id: str, model_key: str) -> dict[int, int]:
    """Return the mean answer, in tokens, of each template that is known."""
    rows = tx.execute(
        sa.select(answer_lengths.c.template, answer_lengths.c.num_tokens).where(
            answer_lengths.c.tenant_id == tenant_id, answer_lengths.c.model_key == model_key
        )
    )
    return {row.template: row.num_tokens for row in rows}
