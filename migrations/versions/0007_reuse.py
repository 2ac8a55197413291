"""Batches may give their answers to later ones and take those of earlier ones.

Expands only: older workers leave the new columns empty, and what they compute is kept by nobody.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Aware UTC on Postgres, microseconds since 1970 on SQLite.
_INSTANT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    """Add the columns and the table."""
    op.add_column(
        "batches", sa.Column("reuse", sa.Boolean(), server_default=sa.false(), nullable=False)
    )
    op.add_column(
        "batches", sa.Column("num_reused", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("batches", sa.Column("reuse_identity", sa.Text()))
    op.add_column("batches", sa.Column("reuse_blob_key", sa.Text()))
    op.add_column("segments", sa.Column("identity", sa.Text()))
    op.create_table(
        "answers",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("identity", sa.Text(), nullable=False),
        sa.Column("blob_key", sa.Text(), nullable=False),
        sa.Column("num_entries", sa.BigInteger(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("expires_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("batch_id", name="pk_answers"),
    )
    op.create_index("ix_answers_newest", "answers", ["tenant_id", "identity", "created_at"])


def downgrade() -> None:
    """Drop them; what was kept has to be computed again."""
    op.drop_table("answers")
    op.drop_column("segments", "identity")
    op.drop_column("batches", "reuse_blob_key")
    op.drop_column("batches", "reuse_identity")
    op.drop_column("batches", "num_reused")
    op.drop_column("batches", "reuse")
