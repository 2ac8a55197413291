"""What ended keeps its numbers too, a shard whose results were lost may run again, and chores.

Expands only: the older version never changes what is frozen here, and knows nothing of chores.
The trigger on units lets through what it refused before: a shard that was done becomes pending
(or what its batch was stopped as) under a higher epoch, and only while its batch has not ended.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# Aware UTC on Postgres, microseconds since 1970 on SQLite.
_INSTANT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")

_UNIT_ENDED = "OLD.state IN ('done', 'failed', 'cancelled', 'expired')"
_BATCH_ENDED = "OLD.status IN ('completed', 'failed', 'expired', 'cancelled')"
_RUNS_AGAIN = (
    "OLD.kind = 'shard' AND OLD.state = 'done' AND NEW.epoch > OLD.epoch "
    "AND NEW.state IN ('pending', 'cancelled', 'expired') "
    "AND EXISTS (SELECT 1 FROM batches WHERE id = OLD.batch_id "
    "AND status NOT IN ('completed', 'failed', 'expired', 'cancelled'))"
)
_OLD_COLUMNS = ("status", "ending", "output_file_id", "error_file_id")
_COLUMNS = (
    *_OLD_COLUMNS,
    "final_completed",
    "final_failed",
    "final_prompt_tokens",
    "final_completion_tokens",
    "final_cached_tokens",
)


def _freeze_batches(columns: tuple[str, ...]) -> None:
    is_postgres = op.get_bind().dialect.name == "postgresql"
    differs = "IS DISTINCT FROM" if is_postgres else "IS NOT"
    changed = " OR ".join(f"NEW.{column} {differs} OLD.{column}" for column in columns)
    if is_postgres:
        op.execute("DROP TRIGGER tr_batches_ended ON batches")
        op.execute(
            "CREATE TRIGGER tr_batches_ended BEFORE UPDATE ON batches FOR EACH ROW "
            f"WHEN ({_BATCH_ENDED} AND ({changed})) EXECUTE FUNCTION tr_batches_ended()"
        )
        return
    op.execute("DROP TRIGGER tr_batches_ended")
    op.execute(
        "CREATE TRIGGER tr_batches_ended BEFORE UPDATE ON batches FOR EACH ROW "
        f"WHEN {_BATCH_ENDED} AND ({changed}) BEGIN "
        "SELECT RAISE(ABORT, 'a row of batches has ended and stays as it is'); END"
    )


def _freeze_units(unless: str | None) -> None:
    if op.get_bind().dialect.name == "postgresql":
        # A condition of a trigger may not look into another table; its function may.
        let_through = f"IF {unless} THEN RETURN NEW; END IF; " if unless else ""
        op.execute(
            "CREATE OR REPLACE FUNCTION tr_units_ended() RETURNS trigger LANGUAGE plpgsql AS $$ "
            f"BEGIN {let_through}"
            "RAISE EXCEPTION 'a row of units has ended and stays as it is' "
            "USING ERRCODE = 'integrity_constraint_violation'; END $$"
        )
        return
    excepted = f" AND NOT ({unless})" if unless else ""
    op.execute("DROP TRIGGER tr_units_ended")
    op.execute(
        "CREATE TRIGGER tr_units_ended BEFORE UPDATE ON units FOR EACH ROW "
        f"WHEN {_UNIT_ENDED} AND (NEW.state IS NOT OLD.state OR NEW.epoch IS NOT OLD.epoch)"
        f"{excepted} BEGIN "
        "SELECT RAISE(ABORT, 'a row of units has ended and stays as it is'); END"
    )


def upgrade() -> None:
    """Widen the one trigger, open the other a crack, add the table."""
    _freeze_batches(_COLUMNS)
    _freeze_units(_RUNS_AGAIN)
    op.create_table(
        "chores",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("due_at", _INSTANT, nullable=False),
        sa.Column("place", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_chores"),
    )


def downgrade() -> None:
    """Drop the table, and put the triggers back as they were."""
    op.drop_table("chores")
    _freeze_units(None)
    _freeze_batches(_OLD_COLUMNS)
