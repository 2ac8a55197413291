"""Batches, their leased units, shards and segments; files, workers and models."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Aware UTC on Postgres, microseconds since 1970 on SQLite.
_INSTANT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")
_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")

# A unit or batch that has ended never changes how it ended, whatever a late writer tries.
_FROZEN = {
    "units": (
        "OLD.state IN ('done', 'failed', 'cancelled', 'expired')",
        ("state", "epoch"),
    ),
    "batches": (
        "OLD.status IN ('completed', 'failed', 'expired', 'cancelled')",
        ("status", "ending", "output_file_id", "error_file_id"),
    ),
}


def _freeze(table: str) -> list[str]:
    """Return the statements that make the ended rows of `table` keep their columns."""
    name = f"tr_{table}_ended"
    ended, columns = _FROZEN[table]
    if op.get_bind().dialect.name == "postgresql":
        changed = " OR ".join(f"NEW.{column} IS DISTINCT FROM OLD.{column}" for column in columns)
        function = (
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"RAISE EXCEPTION 'a row of {table} has ended and stays as it is' "
            "USING ERRCODE = 'integrity_constraint_violation'; END $$"
        )
        trigger = (
            f"CREATE TRIGGER {name} BEFORE UPDATE ON {table} FOR EACH ROW "
            f"WHEN ({ended} AND ({changed})) EXECUTE FUNCTION {name}()"
        )
        return [function, trigger]
    changed = " OR ".join(f"NEW.{column} IS NOT OLD.{column}" for column in columns)
    trigger = (
        f"CREATE TRIGGER {name} BEFORE UPDATE ON {table} FOR EACH ROW "
        f"WHEN {ended} AND ({changed}) BEGIN "
        f"SELECT RAISE(ABORT, 'a row of {table} has ended and stays as it is'); END"
    )
    return [trigger]


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("blob_key", sa.Text(), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("expires_at", _INSTANT, nullable=True),
        sa.Column("deleted_at", _INSTANT, nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.UniqueConstraint(
            "tenant_id", "idempotency_key", name="uq_files_tenant_id_idempotency_key"
        ),
    )
    op.create_index("ix_files_page", "files", ["tenant_id", "created_at", "id"], unique=False)
    op.create_table(
        "models",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("capabilities", _JSON, nullable=False),
        sa.Column("published_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_models"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("gpu", sa.Text(), nullable=True),
        sa.Column("model_key", sa.Text(), nullable=True),
        sa.Column("started_at", _INSTANT, nullable=False),
        sa.Column("heartbeat_at", _INSTANT, nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("engine_epoch", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("recent_deaths", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("input_file_id", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("completion_window", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("model_override", sa.Text(), nullable=True),
        sa.Column("on_unsupported_schema", sa.Text(), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("metadata", _JSON, nullable=True),
        sa.Column("output_expires_after_seconds", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("ending", sa.Text(), nullable=True),
        sa.Column("errors", _JSON, nullable=False),
        sa.Column("num_errors", sa.BigInteger(), nullable=False),
        sa.Column("source_blob_key", sa.Text(), nullable=True),
        sa.Column("model_key", sa.Text(), nullable=True),
        sa.Column("total", sa.BigInteger(), nullable=True),
        sa.Column("final_completed", sa.BigInteger(), nullable=True),
        sa.Column("final_failed", sa.BigInteger(), nullable=True),
        sa.Column("final_prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("final_completion_tokens", sa.BigInteger(), nullable=True),
        sa.Column("final_cached_tokens", sa.BigInteger(), nullable=True),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("deadline_at", _INSTANT, nullable=False),
        sa.Column("cancel_requested_at", _INSTANT, nullable=True),
        sa.Column("planned_at", _INSTANT, nullable=True),
        sa.Column("in_progress_at", _INSTANT, nullable=True),
        sa.Column("finalizing_at", _INSTANT, nullable=True),
        sa.Column("completed_at", _INSTANT, nullable=True),
        sa.Column("failed_at", _INSTANT, nullable=True),
        sa.Column("expired_at", _INSTANT, nullable=True),
        sa.Column("cancelling_at", _INSTANT, nullable=True),
        sa.Column("cancelled_at", _INSTANT, nullable=True),
        sa.Column("output_file_id", sa.Text(), nullable=True),
        sa.Column("error_file_id", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["error_file_id"], ["files.id"], name="fk_batches_error_file_id_files"
        ),
        sa.ForeignKeyConstraint(
            ["input_file_id"], ["files.id"], name="fk_batches_input_file_id_files"
        ),
        sa.ForeignKeyConstraint(
            ["output_file_id"], ["files.id"], name="fk_batches_output_file_id_files"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
        sa.UniqueConstraint(
            "tenant_id", "idempotency_key", name="uq_batches_tenant_id_idempotency_key"
        ),
    )
    op.create_index("ix_batches_input_file_id", "batches", ["input_file_id"], unique=False)
    op.create_index("ix_batches_page", "batches", ["tenant_id", "created_at", "id"], unique=False)
    op.create_index(
        "ix_batches_unfinished",
        "batches",
        ["deadline_at", "id"],
        unique=False,
        postgresql_where=sa.text("status NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
        sqlite_where=sa.text("status NOT IN ('cancelled', 'completed', 'expired', 'failed')"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("payload", _JSON, nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("delivered_at", _INSTANT, nullable=True),
        sa.Column("attempts", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("not_before", _INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_outbox_batch_id_batches"),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
    )
    op.create_index(
        "ix_outbox_undelivered",
        "outbox",
        ["not_before", "id"],
        unique=False,
        postgresql_where=sa.text("delivered_at IS NULL"),
        sqlite_where=sa.text("delivered_at IS NULL"),
    )
    op.create_table(
        "units",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("model_key", sa.Text(), nullable=True),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("deadline_at", _INSTANT, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("boot_id", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", _INSTANT, nullable=True),
        sa.Column("not_before", _INSTANT, nullable=False),
        sa.Column("last_poked_at", _INSTANT, nullable=True),
        sa.Column("claims", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("crash_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("num_stalls", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("last_exit", sa.Text(), nullable=True),
        sa.Column("format_version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_units_batch_id_batches"),
        sa.PrimaryKeyConstraint("id", name="pk_units"),
        sa.UniqueConstraint("batch_id", "kind", "ordinal", name="uq_units_batch_id_kind_ordinal"),
        postgresql_with={"fillfactor": 70},
    )
    op.create_index(
        "ix_units_claim",
        "units",
        [sa.literal_column("priority DESC"), "deadline_at", "id", "model_key"],
        unique=False,
        postgresql_where=sa.text("state = 'pending'"),
        sqlite_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "ix_units_unended",
        "units",
        ["batch_id", "kind"],
        unique=False,
        postgresql_where=sa.text("state IN ('pending', 'leased')"),
        sqlite_where=sa.text("state IN ('pending', 'leased')"),
    )
    op.create_index(
        "ix_units_leased",
        "units",
        ["id"],
        unique=False,
        postgresql_where=sa.text("state = 'leased'"),
        sqlite_where=sa.text("state = 'leased'"),
    )
    op.create_table(
        "line_faults",
        sa.Column("unit_id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("solo_crashes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("workers", _JSON, nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["unit_id"], ["units.id"], name="fk_line_faults_unit_id_units"),
        sa.PrimaryKeyConstraint("unit_id", "position", name="pk_line_faults"),
    )
    op.create_table(
        "segments",
        sa.Column("unit_id", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("blob_key", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("positions", sa.LargeBinary(), nullable=False),
        sa.Column("num_completed", sa.BigInteger(), nullable=False),
        sa.Column("num_failed", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["unit_id"], ["units.id"], name="fk_segments_unit_id_units"),
        sa.PrimaryKeyConstraint("unit_id", "epoch", "sequence", name="pk_segments"),
    )
    op.create_table(
        "shards",
        sa.Column("unit_id", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("first_index", sa.BigInteger(), nullable=False),
        sa.Column("first_line", sa.BigInteger(), nullable=False),
        sa.Column("num_lines", sa.BigInteger(), nullable=False),
        sa.Column("byte_start", sa.BigInteger(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("blob_key", sa.Text(), nullable=False),
        sa.Column("done", sa.LargeBinary(), nullable=False),
        sa.Column("num_done", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("num_completed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("num_failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("suspects", _JSON, nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_shards_batch_id_batches"),
        sa.ForeignKeyConstraint(["unit_id"], ["units.id"], name="fk_shards_unit_id_units"),
        sa.PrimaryKeyConstraint("unit_id", name="pk_shards"),
        sa.UniqueConstraint("batch_id", "ordinal", name="uq_shards_batch_id_ordinal"),
        postgresql_with={"fillfactor": 70},
    )
    for table in _FROZEN:
        for statement in _freeze(table):
            op.execute(statement)


def downgrade() -> None:
    """Drop the tables, and everything in them."""
    for table in (
        "shards",
        "segments",
        "line_faults",
        "units",
        "outbox",
        "batches",
        "workers",
        "models",
        "files",
    ):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        for table in _FROZEN:
            op.execute(f"DROP FUNCTION tr_{table}_ended()")
