"""The tables, as SQLAlchemy Core knows them; `migrations` creates them.

No index contains `lease_expires_at`, so that Postgres renews a lease without touching one.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from typing_extensions import override

from jobs.domain.batch import TERMINAL_STATUSES
from jobs.domain.shard import UnitState

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Instant(sa.types.TypeDecorator[datetime]):
    """An aware instant in UTC; SQLite keeps microseconds since 1970."""

    impl = sa.BigInteger
    cache_ok = True

    @override
    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.TIMESTAMP(timezone=True))
        return dialect.type_descriptor(sa.BigInteger())

    @override
    def process_bind_param(
        self, value: datetime | None, dialect: sa.Dialect
    ) -> datetime | int | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("an instant needs a time zone")
        if dialect.name == "postgresql":
            return value
        return (value - _EPOCH) // _MICROSECOND

    @override
    def process_result_value(
        self, value: datetime | int | None, dialect: sa.Dialect
    ) -> datetime | None:
        if value is None:
            return None
        if isinstance(value, datetime):
            return value.astimezone(UTC)
        return _EPOCH + value * _MICROSECOND


Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


files = sa.Table(
    "files",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("blob_key", sa.Text, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("expires_at", Instant),
    sa.Column("deleted_at", Instant),
    sa.Column("idempotency_key", sa.Text),
    sa.UniqueConstraint("tenant_id", "idempotency_key"),
    sa.Index("ix_files_page", "tenant_id", "created_at", "id"),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("input_file_id", sa.Text, sa.ForeignKey("files.id"), nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("completion_window", sa.Text, nullable=False),
    sa.Column("model", sa.Text),
    sa.Column("model_override", sa.Text),
    sa.Column("on_unsupported_schema", sa.Text, nullable=False),
    sa.Column("priority", sa.BigInteger, nullable=False),
    sa.Column("metadata", Json),
    sa.Column("output_expires_after_seconds", sa.BigInteger),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("ending", sa.Text),
    sa.Column("errors", Json, nullable=False),
    sa.Column("num_errors", sa.BigInteger, nullable=False),
    sa.Column("source_blob_key", sa.Text),
    sa.Column("model_key", sa.Text),
    sa.Column("total", sa.BigInteger),
    sa.Column("final_completed", sa.BigInteger),
    sa.Column("final_failed", sa.BigInteger),
    sa.Column("final_prompt_tokens", sa.BigInteger),
    sa.Column("final_completion_tokens", sa.BigInteger),
    sa.Column("final_cached_tokens", sa.BigInteger),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("deadline_at", Instant, nullable=False),
    sa.Column("cancel_requested_at", Instant),
    sa.Column("planned_at", Instant),
    sa.Column("in_progress_at", Instant),
    sa.Column("finalizing_at", Instant),
    sa.Column("completed_at", Instant),
    sa.Column("failed_at", Instant),
    sa.Column("expired_at", Instant),
    sa.Column("cancelling_at", Instant),
    sa.Column("cancelled_at", Instant),
    sa.Column("output_file_id", sa.Text, sa.ForeignKey("files.id")),
    sa.Column("error_file_id", sa.Text, sa.ForeignKey("files.id")),
    sa.Column("reuse", sa.Boolean, nullable=False, server_default=sa.false()),
    _count("num_reused"),
    sa.Column("reuse_identity", sa.Text),
    sa.Column("reuse_blob_key", sa.Text),
    sa.UniqueConstraint("tenant_id", "idempotency_key"),
    sa.Index("ix_batches_page", "tenant_id", "created_at", "id"),
    sa.Index("ix_batches_input_file_id", "input_file_id"),
)
# Of a batch whose lines run on several models; that of any other is in its row.
batch_models = sa.Table(
    "batch_models",
    metadata,
    sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), primary_key=True),
    sa.Column("ordinal", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("model_key", sa.Text, nullable=False),
)
UNFINISHED = batches.c.status.not_in(sorted(TERMINAL_STATUSES))
_unfinished = sa.text("status NOT IN ('cancelled', 'completed', 'expired', 'failed')")
sa.Index(
    "ix_batches_unfinished",
    batches.c.deadline_at,
    batches.c.id,
    postgresql_where=_unfinished,
    sqlite_where=_unfinished,
)

units = sa.Table(
    "units",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("ordinal", sa.BigInteger, nullable=False),
    sa.Column("model_key", sa.Text),
    sa.Column("priority", sa.BigInteger, nullable=False),
    sa.Column("deadline_at", Instant, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    _count("epoch"),
    sa.Column("owner", sa.Text),
    sa.Column("boot_id", sa.Text),
    sa.Column("lease_expires_at", Instant),
    sa.Column("not_before", Instant, nullable=False),
    sa.Column("last_poked_at", Instant),
    _count("claims"),
    _count("crash_count"),
    _count("num_stalls"),
    sa.Column("last_exit", sa.Text),
    sa.Column("format_version", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("batch_id", "kind", "ordinal"),
    postgresql_with={"fillfactor": 70},
)
UNENDED: sa.ColumnElement[bool] = units.c.state.in_(
    [sa.literal_column(f"'{state}'") for state in (UnitState.PENDING, UnitState.LEASED)]
)
"""Spelled without parameters: SQLite uses a partial index only where it can prove it may."""
_pending = sa.text(f"state = '{UnitState.PENDING}'")
_leased = sa.text(f"state = '{UnitState.LEASED}'")
# A claim names one kind and one model, then takes the first entry; see `units.claim`.
sa.Index(
    "ix_units_claim",
    units.c.kind,
    units.c.model_key,
    units.c.priority.desc(),
    units.c.deadline_at,
    units.c.id,
    postgresql_where=_pending,
    sqlite_where=_pending,
)
# Since when a model has work, and what became ready last, without a look at the rest.
sa.Index(
    "ix_units_ready",
    units.c.kind,
    units.c.model_key,
    units.c.not_before,
    units.c.id,
    postgresql_where=_pending,
    sqlite_where=_pending,
)
_unended = sa.text(f"state IN ('{UnitState.PENDING}', '{UnitState.LEASED}')")
sa.Index(
    "ix_units_unended",
    units.c.batch_id,
    units.c.kind,
    postgresql_where=_unended,
    sqlite_where=_unended,
)
sa.Index("ix_units_leased", units.c.id, postgresql_where=_leased, sqlite_where=_leased)

shards = sa.Table(
    "shards",
    metadata,
    sa.Column("unit_id", sa.Text, sa.ForeignKey("units.id"), primary_key=True),
    sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), nullable=False),
    sa.Column("ordinal", sa.BigInteger, nullable=False),
    sa.Column("first_index", sa.BigInteger, nullable=False),
    sa.Column("first_line", sa.BigInteger, nullable=False),
    sa.Column("num_lines", sa.BigInteger, nullable=False),
    sa.Column("byte_start", sa.BigInteger, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("blob_key", sa.Text, nullable=False),
    sa.Column("done", sa.LargeBinary, nullable=False),
    _count("num_done"),
    _count("num_completed"),
    _count("num_failed"),
    _count("prompt_tokens"),
    _count("completion_tokens"),
    _count("cached_tokens"),
    sa.Column("suspects", Json, nullable=False),
    sa.Column("trial", Json),
    sa.Column("is_run_order", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("batch_id", "ordinal"),
    postgresql_with={"fillfactor": 70},
)

segments = sa.Table(
    "segments",
    metadata,
    sa.Column("unit_id", sa.Text, sa.ForeignKey("units.id"), primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("blob_key", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("positions", sa.LargeBinary, nullable=False),
    sa.Column("num_completed", sa.BigInteger, nullable=False),
    sa.Column("num_failed", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("identity", sa.Text),
)

line_faults = sa.Table(
    "line_faults",
    metadata,
    sa.Column("unit_id", sa.Text, sa.ForeignKey("units.id"), primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    _count("solo_crashes"),
    sa.Column("workers", Json, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
)

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("batch_id", sa.Text, sa.ForeignKey("batches.id"), nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("payload", Json, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("delivered_at", Instant),
    _count("attempts"),
    sa.Column("not_before", Instant, nullable=False),
)
_undelivered = sa.text("delivered_at IS NULL")
sa.Index(
    "ix_outbox_undelivered",
    outbox.c.not_before,
    outbox.c.id,
    postgresql_where=_undelivered,
    sqlite_where=_undelivered,
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("boot_id", sa.Text, nullable=False),
    sa.Column("gpu", sa.Text),
    sa.Column("model_key", sa.Text),
    sa.Column("started_at", Instant, nullable=False),
    sa.Column("heartbeat_at", Instant, nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False),
    _count("engine_epoch"),
    _count("recent_deaths"),
    sa.Column("host", sa.Text, nullable=False, server_default=sa.text("''")),
    _count("pid"),
    sa.Column("role", sa.Text, nullable=False, server_default="engine"),
    sa.Column("models", Json, nullable=False, server_default="[]"),
    sa.Column("state", sa.Text, nullable=False, server_default="idle"),
    _count("num_shards"),
    sa.Column("tokens_per_second", sa.Double, nullable=False, server_default="0"),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("capabilities", Json, nullable=False),
    sa.Column("published_at", Instant, nullable=False),
    sa.Column("published_by", sa.Text),
)

answer_lengths = sa.Table(
    "answer_lengths",
    metadata,
    sa.Column("tenant_id", sa.Text, primary_key=True),
    sa.Column("model_key", sa.Text, primary_key=True),
    sa.Column("template", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("num_tokens", sa.BigInteger, nullable=False),
    sa.Column("learned_at", Instant, nullable=False),
)

chores = sa.Table(
    "chores",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("due_at", Instant, nullable=False),
    sa.Column("place", sa.Text),
)

# No foreign key: the answers of local runs are kept apart from the batches that gave them.
answers = sa.Table(
    "answers",
    metadata,
    sa.Column("batch_id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("identity", sa.Text, nullable=False),
    sa.Column("blob_key", sa.Text, nullable=False),
    sa.Column("num_entries", sa.BigInteger, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("expires_at", Instant, nullable=False),
    sa.Index("ix_answers_newest", "tenant_id", "identity", "created_at"),
)
