"""Connections to Postgres on which every wait ends, whatever became of the server or the way there.

A server that answers ends a statement itself. One that does not answer (a partition, a proxy that
keeps a dead connection open) would be waited for without end: libpq knows no such limit, and the
kernel notices only where the packets themselves are not acknowledged.
"""

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from typing_extensions import override

from storage.config import DatabaseSettings

_T = TypeVar("_T")

GRACE_SECONDS = 5.0
"""How much longer than its longest statement a server is waited for."""
_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed when the server owes an answer for too long."""

    answer_seconds: float | None = None

    @override
    def wait(self, gen: Generator[Any, Any, _T], *args: Any, **kwargs: Any) -> _T:
        """Return what the exchange returns.

        Raises:
            psycopg.OperationalError: no answer in time; the connection is closed.
        """
        if self.answer_seconds is not None:
            gen = self._bounded(gen, self.answer_seconds)
        return super().wait(gen, *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, _T], seconds: float) -> Generator[Any, Any, _T]:
        deadline = time.monotonic() + seconds
        try:
            wanted = next(gen)
            while True:
                # psycopg comes back without anything to read or write at short intervals.
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(
                        f"the server has not answered for {seconds:g} s; the connection is closed"
                    )
                wanted = gen.send(ready)
        except StopIteration as end:
            answer: _T = end.value
            return answer


def open_engine(url: sa.URL, settings: DatabaseSettings) -> sa.Engine:
    """Return an engine over connections as the settings want them; none is made yet."""
    timeouts = {
        "statement_timeout": settings.statement_timeout_seconds,
        "lock_timeout": settings.lock_timeout_seconds,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout_seconds,
    }
    options = " ".join(f"-c {name}={int(seconds * 1000)}" for name, seconds in timeouts.items())
    answer_seconds = settings.statement_timeout_seconds + GRACE_SECONDS
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_timeout=settings.pool_timeout_seconds,
        pool_pre_ping=True,
        connect_args={
            "options": f"{options} -c timezone=UTC",
            "connect_timeout": settings.connect_timeout_seconds,
            # Packets that nobody acknowledges: sooner noticed by the kernel, where it can.
            "tcp_user_timeout": int(answer_seconds * 1000),
            **_KEEPALIVES,
            "application_name": "batchctl",
        },
    )

    @sa.event.listens_for(engine, "do_connect")
    def connect(
        _dialect: sa.Dialect, _record: object, arguments: list[Any], options: dict[str, Any]
    ) -> BoundedConnection:
        connection = BoundedConnection.connect(*arguments, **options)
        connection.answer_seconds = answer_seconds
        return connection

    return engine


def wait_without_limit(connection: sa.Connection) -> None:
    """Let the statements of this connection take as long as they take, for a change of tables."""
    driver = connection.connection.driver_connection
    if isinstance(driver, BoundedConnection):
        driver.answer_seconds = None
    connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
    connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
