"""A database and a folder for blobs, new for every test, and servers of the API."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from storage.blobs import open_blobs
from storage.config import BlobSettings
from storage.database import open_database
from tests.builders import Bench, Clock
from tests.integration.api.servers import Running, Serve, run_api


@pytest.fixture(params=["sqlite", "postgres"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    url = request.getfixturevalue(f"{request.param}_url")
    clock = Clock()
    with open_database(url, clock=clock) as db, open_blobs(BlobSettings(), tmp_path) as blobs:
        made = Bench(db=db, blobs=blobs, clock=clock)
        with made.stack:
            yield made


@pytest.fixture
def serve_api(tmp_path: Path) -> Serve:
    """Start a server of the test's own, ended by the block it is opened in."""
    numbers = iter(range(100))
    return lambda **options: run_api(tmp_path / f"data-{next(numbers)}", **options)


@pytest.fixture
def api(serve_api: Serve) -> Iterator[Running]:
    with serve_api() as running:
        yield running


@pytest.fixture
def http(api: Running) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client
