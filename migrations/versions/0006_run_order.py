"""Shards may be ranges of a run-order blob.

Expands only: an older worker leaves such shards alone, because their units say so (format 2).
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "shards",
        sa.Column("is_run_order", sa.Boolean(), server_default=sa.false(), nullable=False),
    )


def downgrade() -> None:
    """Drop the column; batches in a run order must have ended."""
    op.drop_column("shards", "is_run_order")
