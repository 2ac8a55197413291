"""A database and a folder for blobs, new for every test, and servers of the API."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.blobs import open_blobs
from storage.config import BlobSettings
from storage.database import open_database
from tests.builders import Bench, Clock
from tests.integration.api.conftest import api, http, serve_api

__all__ = ["api", "http", "serve_api"]  # fixtures


@pytest.fixture(params=["sqlite", "postgres"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    url = request.getfixturevalue(f"{request.param}_url")
    clock = Clock()
    with open_database(url, clock=clock) as db, open_blobs(BlobSettings(), tmp_path) as blobs:
        made = Bench(db=db, blobs=blobs, clock=clock)
        with made.stack:
            yield made
