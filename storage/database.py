"""Connections, transactions and the one clock that leases are judged by.

`writes` and `reads` turn a function over a `Transaction` into one over a `Database`: the whole
function is one transaction. It is repeated when Postgres failed in a way that passes, a write for
some seconds, so every write is safe to repeat after its reply was lost.
"""

import functools
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import alembic.command
import alembic.config
import alembic.migration
import alembic.script
import alembic.util
import sqlalchemy as sa
import sqlalchemy.exc
import stamina

from jobs.domain.errors import BatchctlError, Conflict, DatabaseUnavailable, StorageError
from storage.config import DatabaseSettings

Clock = Callable[[], datetime]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_WRITE = "batchctl_write"
_STATEMENT_TIMED_OUT = "57014"
_PATIENCE_SECONDS = 10.0
"""A restart of Postgres takes less; who calls waits longer where that is right."""
_READ_ATTEMPTS = 3
_UPGRADE = "run `batchctl db upgrade`"
_UPGRADE_LOCK = 7_203_514_982  # any constant: the key of the advisory lock of an upgrade

# The first entry that matches wins; the test walks SQLAlchemy's exceptions over it.
ERRORS: tuple[tuple[type[Exception], type[BatchctlError]], ...] = (
    (sqlalchemy.exc.IntegrityError, Conflict),
    (sqlalchemy.exc.DataError, StorageError),
    (sqlalchemy.exc.DBAPIError, DatabaseUnavailable),
    (sqlalchemy.exc.DisconnectionError, DatabaseUnavailable),
    (sqlalchemy.exc.TimeoutError, DatabaseUnavailable),
    (sqlalchemy.exc.NoSuchModuleError, DatabaseUnavailable),
    (sqlalchemy.exc.ArgumentError, DatabaseUnavailable),
    (sqlalchemy.exc.SQLAlchemyError, StorageError),
    (alembic.util.CommandError, DatabaseUnavailable),
    (ImportError, DatabaseUnavailable),
    (OSError, DatabaseUnavailable),
)


class Transaction:
    """One transaction: statements, and the instant it goes by."""

    __slots__ = ("_clock", "connection", "is_postgres")

    def __init__(
        self, connection: sa.Connection, *, clock: Clock | None, is_postgres: bool
    ) -> None:
        self.connection = connection
        self.is_postgres = is_postgres
        self._clock = clock

    def execute(
        self,
        statement: sa.Executable,
        parameters: Mapping[str, object] | Sequence[Mapping[str, object]] | None = None,
    ) -> sa.CursorResult[Any]:
        """Return the result of `statement`."""
        return self.connection.execute(statement, parameters)

    def now(self) -> datetime:
        """Return the database's instant, aware UTC; SQLite's is the process's."""
        if self._clock is not None:
            return self._clock()
        if not self.is_postgres:
            return datetime.now(UTC)
        instant: datetime = self.connection.execute(
            sa.select(sa.func.clock_timestamp())
        ).scalar_one()
        return instant.astimezone(UTC)


class Database:
    """An open database; threads share it, a forked child does not."""

    def __init__(self, engine: sa.Engine, *, clock: Clock | None = None) -> None:
        self.engine = engine
        self.is_postgres = engine.dialect.name == "postgresql"
        self._clock = clock
        self._writer = engine.execution_options(**{_WRITE: True})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections."""
        self.engine.dispose()

    def now(self) -> datetime:
        """Return the instant leases are judged by, aware UTC."""
        if self._clock is not None:
            return self._clock()
        return self.look(Transaction.now)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Return a transaction that writes: committed at the end, undone by an exception."""
        with self._begin(self._writer) as tx:
            yield tx

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """Return a transaction that reads; on SQLite it never waits for a writer."""
        with self._begin(self.engine) as tx:
            yield tx

    @contextmanager
    def _begin(self, engine: sa.Engine) -> Iterator[Transaction]:
        with translated(engine.url), engine.begin() as connection:
            yield Transaction(connection, clock=self._clock, is_postgres=self.is_postgres)

    def run(self, action: Callable[[Transaction], _T]) -> _T:
        """Return what `action` returns after its transaction is committed.

        It is repeated when Postgres gave up for a reason that passes (a deadlock, a lost
        connection, a restart), so it must be safe to repeat even after a commit.
        """
        return self._repeat(self.transaction, action, attempts=None)

    def look(self, action: Callable[[Transaction], _T]) -> _T:
        """Return what `action` returns, which only reads; tried again once or twice like a write.

        Whoever reads is often a person or a client that repeats by itself, so it gives up soon.
        """
        return self._repeat(self.read, action, attempts=_READ_ATTEMPTS)

    def _repeat(
        self,
        begin: Callable[[], AbstractContextManager[Transaction]],
        action: Callable[[Transaction], _T],
        *,
        attempts: int | None,
    ) -> _T:
        for attempt in stamina.retry_context(
            on=_is_transient,
            attempts=attempts,
            timeout=_PATIENCE_SECONDS,
            wait_initial=0.05,
            wait_max=2,
            wait_jitter=0.2,
        ):
            with attempt, begin() as tx:
                return action(tx)
        raise AssertionError  # stamina raises what the last attempt raised


def writes(
    function: Callable[Concatenate[Transaction, _P], _T],
) -> Callable[Concatenate[Database, _P], _T]:
    """Make `function` one transaction of a database, repeated while that may help."""

    @functools.wraps(function)
    def in_transaction(db: Database, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return db.run(lambda tx: function(tx, *args, **kwargs))

    return in_transaction


def reads(
    function: Callable[Concatenate[Transaction, _P], _T],
) -> Callable[Concatenate[Database, _P], _T]:
    """Make `function` one transaction of a database that only reads, repeated once or twice."""

    @functools.wraps(function)
    def in_transaction(db: Database, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return db.look(lambda tx: function(tx, *args, **kwargs))

    return in_transaction


@contextmanager
def translated(url: sa.URL | None = None) -> Iterator[None]:
    """Raise what the database raises as our own errors: one line, without the password."""
    try:
        yield
    except BatchctlError:
        raise
    except tuple(foreign for foreign, _ in ERRORS) as error:
        if isinstance(error, OSError | ImportError) and url is not None and not _is_ours(error):
            raise
        raise _translate(error, url) from error


def _is_ours(error: Exception) -> bool:
    return isinstance(error, sqlalchemy.exc.SQLAlchemyError | alembic.util.CommandError)


def _translate(error: Exception, url: sa.URL | None) -> BatchctlError:
    ours = next(ours for foreign, ours in ERRORS if isinstance(error, foreign))
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    detail = lines[0] if lines else type(original).__name__
    if url is None:
        return ours(f"The database cannot be opened: {detail}")
    if url.password:
        detail = detail.replace(url.password, "***")
    if isinstance(error, sqlalchemy.exc.IntegrityError):
        return ours(f"The database refused a change: {detail}")
    if isinstance(error, sqlalchemy.exc.ProgrammingError | sqlalchemy.exc.OperationalError) and (
        "no such table" in detail or getattr(original, "sqlstate", None) == "42P01"
    ):
        return ours(f"The database has no tables of ours ({detail}); {_UPGRADE}.")
    where = url.render_as_string(hide_password=True)
    return ours(f"The database {where} failed: {detail}")


def _is_transient(error: Exception) -> bool:
    """Return whether Postgres may do the same transaction on another try."""
    cause = error.__cause__
    if not isinstance(error, DatabaseUnavailable) or not isinstance(
        cause, sqlalchemy.exc.OperationalError
    ):
        return False
    if isinstance(cause.orig, sqlite3.Error):
        return False  # it has waited for its lock already
    return getattr(cause.orig, "sqlstate", None) != _STATEMENT_TIMED_OUT


def open_database(
    url: str, *, settings: DatabaseSettings | None = None, clock: Clock | None = None
) -> Database:
    """Return the database at `url`, which answers: SQLite (created when absent) or Postgres.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/name`.
        clock: replaces the database's clock; for tests.

    Raises:
        DatabaseUnavailable: it does not exist, does not answer or refuses us; in one line.
    """
    settings = settings or DatabaseSettings()
    with translated():
        try:
            parsed = sa.make_url(url.replace("postgres://", "postgresql://", 1))
        except sqlalchemy.exc.ArgumentError as error:
            # SQLAlchemy's message quotes the URL with its password.
            raise DatabaseUnavailable(
                "The database URL is not one; it looks like sqlite:///path or "
                "postgresql://user:password@host/name."
            ) from error
        backend = parsed.get_backend_name()
        if backend == "sqlite":
            engine = _sqlite_engine(parsed, settings)
        elif backend == "postgresql":
            engine = _postgres_engine(parsed, settings)
        else:
            raise DatabaseUnavailable(
                f"The database scheme {parsed.drivername!r} is unknown; "
                "use sqlite:///path or postgresql://..."
            )
    db = Database(engine, clock=clock)
    try:
        with db.read() as tx:
            tx.execute(sa.select(1))
    except BaseException:
        db.close()
        raise
    return db


def _sqlite_engine(url: sa.URL, settings: DatabaseSettings) -> sa.Engine:
    engine = sa.create_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_timeout=settings.pool_timeout_seconds,
        connect_args={"timeout": settings.busy_timeout_seconds, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # None: the driver starts no transactions of its own; `begin` below does.
        connection.isolation_level = None
        with closing(connection.cursor()) as cursor:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writing = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _postgres_engine(url: sa.URL, settings: DatabaseSettings) -> sa.Engine:
    from storage.postgres import open_engine  # noqa: PLC0415 - psycopg is an extra

    return open_engine(url, settings)


def alembic_config() -> alembic.config.Config:
    """Return what alembic needs to know; `attributes["connection"]` is the caller's to set."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(resources.files("migrations")).replace("%", "%%"))
    return config


def check_schema(db: Database) -> None:
    """Return when the database's tables are those of this version.

    Raises:
        DatabaseUnavailable: they are older, newer or absent.
    """
    head = alembic.script.ScriptDirectory.from_config(alembic_config()).get_current_head()
    with db.read() as tx:
        current = alembic.migration.MigrationContext.configure(tx.connection).get_current_revision()
    if current == head:
        return
    known = {
        script.revision
        for script in alembic.script.ScriptDirectory.from_config(alembic_config()).walk_revisions()
    }
    if current is not None and current not in known:
        raise DatabaseUnavailable(
            f"The database's tables are of a newer version ({current}) than this program ({head}); "
            "install the newer program."
        )
    state = f"of version {current}" if current else "not there"
    raise DatabaseUnavailable(
        f"The database's tables are {state}, this program needs {head}; {_UPGRADE}."
    )


def upgrade(db: Database, *, revision: str = "head") -> None:
    """Create the tables, or bring them to `revision`; concurrent calls wait for each other."""
    config = alembic_config()
    with translated(db.engine.url), db.engine.connect() as plain:
        connection = plain.execution_options(**{_WRITE: True})
        if not db.is_postgres:
            # Rebuilding a table drops it, which would delete what refers to it. The pragma has
            # no effect inside a transaction, hence on the driver's connection.
            driver = connection.connection.driver_connection
            if isinstance(driver, sqlite3.Connection):
                driver.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():
                if db.is_postgres:
                    from storage.postgres import wait_without_limit  # noqa: PLC0415 - an extra

                    wait_without_limit(connection)
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, revision)
                if (
                    not db.is_postgres
                    and connection.exec_driver_sql("PRAGMA foreign_key_check").first()
                ):
                    raise StorageError("The upgrade would leave rows that refer to nothing.")
        finally:
            # The pooled connection carries the pragma; a new one starts with our own.
            connection.invalidate()
