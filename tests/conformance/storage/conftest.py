"""Every test of the database runs over SQLite and Postgres, of the blobs over three stores."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.blobs import open_blobs
from storage.blobs.base import BlobStore
from storage.config import BlobSettings
from storage.database import open_database
from tests.conformance.storage.bench import Bench, FixedClock
from tests.conftest import s3_settings


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def bench(database_url: str) -> Iterator[Bench]:
    clock = FixedClock()
    with open_database(database_url, clock=clock) as db:
        yield Bench(db=db, clock=clock)


@pytest.fixture(params=["folder", "moto", "rclone"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    if request.param == "folder":
        settings = BlobSettings()
    else:
        settings = s3_settings(request.getfixturevalue(f"{request.param}_url"))
    with open_blobs(settings, tmp_path) as store:
        yield store
