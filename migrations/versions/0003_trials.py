"""Shards say which lines run by themselves, in case one of them kills the whole worker.

Expands only: an older worker leaves the column alone, and finds no line to blame.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")


def upgrade() -> None:
    """Add the column."""
    op.add_column("shards", sa.Column("trial", _JSON, nullable=True))


def downgrade() -> None:
    """Drop the column; lines that were on trial are run among the others."""
    op.drop_column("shards", "trial")
