"""A claim, a poke and a look at what waits read a few index entries, whatever else waits.

The indexes lead with kind and model. What runs while this is applied goes on: only the speed of a
claim changes.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_PENDING = sa.text("state = 'pending'")


def upgrade() -> None:
    """Replace the index of a claim, and add the one of what became ready."""
    op.drop_index("ix_units_claim", "units")
    op.create_index(
        "ix_units_claim",
        "units",
        ["kind", "model_key", sa.literal_column("priority DESC"), "deadline_at", "id"],
        unique=False,
        postgresql_where=_PENDING,
        sqlite_where=_PENDING,
    )
    op.create_index(
        "ix_units_ready",
        "units",
        ["kind", "model_key", "not_before", "id"],
        unique=False,
        postgresql_where=_PENDING,
        sqlite_where=_PENDING,
    )


def downgrade() -> None:
    """Bring the older index back."""
    op.drop_index("ix_units_ready", "units")
    op.drop_index("ix_units_claim", "units")
    op.create_index(
        "ix_units_claim",
        "units",
        [sa.literal_column("priority DESC"), "deadline_at", "id", "model_key"],
        unique=False,
        postgresql_where=_PENDING,
        sqlite_where=_PENDING,
    )
