"""How long answers to a template were, for planning; advice, whose loss harms nobody.

Expands only.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_INSTANT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "answer_lengths",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("model_key", sa.Text(), nullable=False),
        sa.Column("template", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("learned_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint(
            "tenant_id", "model_key", "template", name=op.f("pk_answer_lengths")
        ),
    )


def downgrade() -> None:
    """Drop the table; batches are planned by what their lines say."""
    op.drop_table("answer_lengths")
