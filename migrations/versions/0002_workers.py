"""Workers say where they run, what they serve and how it goes; models say who published them.

Expands only: what the older version writes stays good, because each new column has a default
or may be null.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")


def upgrade() -> None:
    """Add the columns."""
    for column in (
        sa.Column("host", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("pid", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("role", sa.Text(), server_default="engine", nullable=False),
        sa.Column("models", _JSON, server_default="[]", nullable=False),
        sa.Column("state", sa.Text(), server_default="idle", nullable=False),
        sa.Column("num_shards", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("tokens_per_second", sa.Double(), server_default="0", nullable=False),
    ):
        op.add_column("workers", column)
    op.add_column("models", sa.Column("published_by", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop the columns, and what they say."""
    op.drop_column("models", "published_by")
    for name in (
        "tokens_per_second",
        "num_shards",
        "state",
        "models",
        "role",
        "pid",
        "host",
    ):
        op.drop_column("workers", name)
