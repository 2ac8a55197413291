"""A database and a folder for blobs, new for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.blobs import open_blobs
from storage.config import BlobSettings
from storage.database import open_database
from tests.builders import Bench, Clock


@pytest.fixture
def bench(sqlite_url: str, tmp_path: Path) -> Iterator[Bench]:
    clock = Clock()
    with (
        open_database(sqlite_url, clock=clock) as db,
        open_blobs(BlobSettings(), tmp_path) as blobs,
    ):
        made = Bench(db=db, blobs=blobs, clock=clock)
        with made.stack:
            yield made
