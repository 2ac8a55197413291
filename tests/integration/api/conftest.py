"""The servers as fixtures, and both generations of official clients."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.integration.api.servers import Running, Serve, run_api

ROOT = Path(__file__).parents[3]
OLD_CLIENT = "1.109.1"


@pytest.fixture
def serve_api(tmp_path: Path) -> Serve:
    """Start a server of the test's own, ended by the block it is opened in."""
    numbers = iter(range(100))
    return lambda **options: run_api(tmp_path / f"data-{next(numbers)}", **options)


@pytest.fixture
def api(serve_api: Serve) -> Iterator[Running]:
    """A server without workers, and without anything in it."""
    with serve_api() as running:
        yield running


@pytest.fixture
def http(api: Running) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with workers, which the tests of a module share."""
    with run_api(tmp_path_factory.mktemp("working"), workers=True) as running:
        yield running


@pytest.fixture
def client(working: Running) -> Iterator[openai.OpenAI]:
    with working.client(_strict_response_validation=True) as client:
        yield client


@pytest.fixture(scope="session")
def run_old_client() -> Callable[[str, str], str]:
    """Run a script with the last client of the first generation, installed once beside ours."""
    folder = ROOT / "build" / f"openai-{OLD_CLIENT}"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"openai-{OLD_CLIENT}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = folder / "installed"
        if not marker.exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
            subprocess.run([*command, f"openai=={OLD_CLIENT}"], check=True)
            marker.touch()

    def run(script: str, base_url: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ
            | {
                "PYTHONPATH": str(folder),
                "OPENAI_BASE_URL": base_url,
                "OPENAI_API_KEY": "none",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
