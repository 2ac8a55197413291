"""Airflow in a folder of its own, and servers to run batches on.

    .venv-airflow/bin/python -m pytest --confcutdir=tests/airflow tests/airflow

BATCHCTL_TEST_URL, BATCHCTL_TEST_MODEL and BATCHCTL_TEST_API_KEY name a server that runs already;
what has to stop a server, or slow it down, starts its own all the same.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from tests.airflow.servers import OwnServer, Server, named_server

if TYPE_CHECKING:
    from airflow.sdk import DAG

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EXAMPLES = ROOT / "airflow_provider" / "batchctl_provider" / "example_dags"
HAS_AIRFLOW = importlib.util.find_spec("batchctl_provider") is not None

if HAS_AIRFLOW:
    # Airflow reads them when it is first imported, and that is when tests are collected.
    HOME = Path(tempfile.mkdtemp(prefix="airflow-home-"))
    os.environ |= {
        "AIRFLOW_HOME": str(HOME),
        "AIRFLOW__CORE__DAGS_FOLDER": str(HOME / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
    }


def pytest_configure(config: pytest.Config) -> None:
    # Airflow and its libraries warn of each other; ours may not.
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:::batchctl_provider")


def pytest_unconfigure() -> None:
    if HAS_AIRFLOW:
        shutil.rmtree(HOME, ignore_errors=True)


class _NeedsAirflow(pytest.Module):
    @override
    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        pytest.skip("needs the environment that scripts/airflow_env.sh makes")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if HAS_AIRFLOW:
        return None
    return _NeedsAirflow.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """A server of these tests, which wants a key."""
    server = OwnServer(tmp_path_factory.mktemp("server"), api_key="right-key")
    with server.running():
        yield server


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """The server that is named, or the one of these tests."""
    own: Callable[[], OwnServer] = lambda: request.getfixturevalue("own_server")  # noqa: E731
    return named_server() or own()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make both default connections lead to a server."""

    def make(server: Server, **extra: Any) -> None:
        for kind in ("batchctl", "openai"):
            connection = {
                "conn_type": kind,
                "host": f"{server.url}/v1",
                # The official client wants some key, whatever the server wants.
                "password": server.api_key or "none",
                "extra": extra if kind == "batchctl" else {},
            }
            monkeypatch.setenv(f"AIRFLOW_CONN_{kind.upper()}_DEFAULT", json.dumps(connection))

    return make


@pytest.fixture
def connected(server: Server, connect: Callable[..., None]) -> Server:
    """The server, with the connections that lead there."""
    connect(server)
    return server


@pytest.fixture
def own_connected(own_server: OwnServer, connect: Callable[..., None]) -> OwnServer:
    """The server of these tests, with the connections that lead there."""
    connect(own_server)
    return own_server


@pytest.fixture(scope="session")
def dags_folder() -> Path:
    """A folder of DAGs, with a database that knows Airflow's tables."""
    folder = HOME / "dags"
    shutil.copytree(HERE / "dags", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in EXAMPLES.glob("example_*.py"):
        shutil.copy(path, folder)
    airflow = Path(sys.executable).with_name("airflow")
    ran = subprocess.run(
        [str(airflow), "db", "migrate"], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture
def load_dag(dags_folder: Path) -> Iterator[Callable[[str, str], "DAG"]]:
    """Return a DAG of a file in the DAGs folder."""
    with ExitStack() as stack:

        def load(file: str, dag_id: str) -> "DAG":
            from airflow.sdk import DAG  # noqa: PLC0415  Airflow may not be there

            spec = importlib.util.spec_from_file_location(file, dags_folder / f"{file}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[file] = module
            stack.callback(sys.modules.pop, file)
            spec.loader.exec_module(module)
            found = [one for one in vars(module).values() if isinstance(one, DAG)]
            found += getattr(module, "DAGS", ())
            return next(one for one in found if one.dag_id == dag_id)

        yield load
