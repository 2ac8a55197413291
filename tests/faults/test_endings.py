"""Cancel and expiry at every stage of a batch, on workers that never hear a broker."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import BatchId
from storage.config import BlobSettings
from storage.tables import batches, units
from tests.builders import make_line
from tests.faults.checks import assert_sound, error_codes
from tests.faults.proxy import S3Proxy, s3_proxy
from tests.integration.api.servers import run_api
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, fleet_values, wait_for

NOBODY = "redis://127.0.0.1:1/0"
NUM_LINES = 120
QUICKLY = 60.0
"""Seconds on a slow machine; a worker looks five times a second."""


@pytest.fixture
def proxy(moto_url: str) -> Iterator[S3Proxy]:
    with s3_proxy(moto_url) as made:
        yield made


@pytest.fixture
def client(postgres_url: str, blobs: BlobSettings, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """A client of an API beside the fleet."""
    values = fleet_values(postgres_url, blobs, NOBODY)
    with run_api(tmp_path / "server", **values) as running, running.client() as made:
        yield made


class Stopper:
    """Ends a batch early, by the API or by letting its window pass."""

    def __init__(self, fleet: Fleet, client: openai.OpenAI, kind: str) -> None:
        self._fleet = fleet
        self._client = client
        self._kind = kind
        cancels = kind == "cancel"
        self.status = BatchStatus.CANCELLED if cancels else BatchStatus.EXPIRED
        self.code = "batch_cancelled" if cancels else "batch_expired"

    def stop(self, batch: Batch) -> None:
        if self._kind == "cancel":
            self._client.batches.cancel(batch.id)
            return
        now = self._fleet.app.db.now()
        with self._fleet.app.db.transaction() as tx:
            tx.execute(sa.update(batches).where(batches.c.id == batch.id).values(deadline_at=now))
            tx.execute(sa.update(units).where(units.c.batch_id == batch.id).values(deadline_at=now))

    def finish(self, batch: Batch, *, num_lines: int = NUM_LINES) -> Batch:
        """Wait for the end, and check that every line is told how it ended."""
        self._fleet.wait_done(batch.id, seconds=QUICKLY)
        done = assert_sound(self._fleet, batch.id, num_lines, status=self.status)
        assert set(error_codes(self._fleet, done)) <= {self.code}
        return done


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cancel", "expire"])
def test_a_batch_ends_early_at_every_stage(
    make_fleet: MakeFleet, client: openai.OpenAI, proxy: S3Proxy, kind: str
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.05, slots=8)
    behind = {**fleet.values["blobs"], "endpoint_url": proxy.url}
    stopper = Stopper(fleet, client, kind)

    waits_for_its_plan = fleet.submit(NUM_LINES)
    stopper.stop(waits_for_its_plan)
    fleet.start("control", role="control", celery=False, blobs=behind)
    stopper.finish(waits_for_its_plan, num_lines=0)

    proxy.hold_for = "/files/"
    is_planned = fleet.submit(NUM_LINES)
    wait_for(lambda: proxy.done["held"])
    stopper.stop(is_planned)
    wait_for(lambda: fleet.get(is_planned.id).ending)
    proxy.hold_for = None
    stopper.finish(is_planned, num_lines=0)

    is_unclaimed = fleet.submit(NUM_LINES)
    wait_for(lambda: fleet.get(is_unclaimed.id).status is BatchStatus.IN_PROGRESS)
    stopper.stop(is_unclaimed)
    done = stopper.finish(is_unclaimed)
    assert done.request_counts.failed == NUM_LINES

    fleet.start("engine", role="engine", celery=False)
    runs = fleet.submit(NUM_LINES)
    wait_for(lambda: fleet.num_done(runs.id) > 0)
    stopper.stop(runs)
    done = stopper.finish(runs)
    assert 0 < done.request_counts.completed < NUM_LINES, "what was finished is delivered"

    proxy.hold_for = "/outputs/"
    num_held = proxy.done["held"]
    is_written = fleet.submit(20)
    wait_for(lambda: proxy.done["held"] > num_held)
    stopper.stop(is_written)
    time.sleep(1.0)  # two turns of a sweeper
    assert fleet.get(is_written.id).status is BatchStatus.FINALIZING
    proxy.hold_for = None
    fleet.wait_done(is_written.id)
    assert_sound(fleet, is_written.id, 20)  # it was done before

    ended = fleet.get(runs.id)
    if kind == "cancel":
        client.batches.cancel(runs.id)  # once more changes nothing
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(is_written.id)
    else:
        stopper.stop(runs)
        time.sleep(1.0)
    assert fleet.get(runs.id).status is ended.status
    assert fleet.get(runs.id).output_file_id == ended.output_file_id


@pytest.mark.slow
def test_a_window_that_passes_ends_a_batch_with_what_is_done(
    make_fleet: MakeFleet, client: openai.OpenAI
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.2, slots=4)
    fleet.start("all", role="all", celery=False)
    fleet.wait_done(fleet.submit(4).id)  # its engine is loaded
    content = b"".join(
        make_line(f"r{number}", f"hello {number}") + b"\n" for number in range(NUM_LINES)
    )
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    window: Any = "9s"  # the client knows one window only
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=window
    )
    assert made.expires_at == made.created_at + 9
    fleet.wait_done(BatchId(made.id))
    done = assert_sound(fleet, BatchId(made.id), NUM_LINES, status=BatchStatus.EXPIRED)
    assert set(error_codes(fleet, done)) == {"batch_expired"}
    assert done.request_counts.completed > 0
