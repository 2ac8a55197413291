"""The models of a batch whose lines run on several, for workers that look for work.

Expands only.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "batch_models",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("model_key", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_batch_models_batch_id_batches")
        ),
        sa.PrimaryKeyConstraint("batch_id", "ordinal", name=op.f("pk_batch_models")),
    )


def downgrade() -> None:
    """Drop the table; batches of several models wait for a newer program."""
    op.drop_table("batch_models")
