"""A worker's process inside the test's, over SQLite: messages, polling, draining, its row."""

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog

from jobs.app import App, open_app, server_folder
from jobs.domain.batch import Batch
from jobs.domain.shard import UnitState
from jobs.settings import Settings
from jobs.worker.gpu import DEVICE
from jobs.worker.process import DRAIN_FILE, WorkerProcess
from storage import batches, shards, workers
from storage.workers import Worker
from tests.builders import Bench, Clock, await_true, make_lines
from tests.conftest import free_port

SLOW = {"engine": "simulated", "options": {"step_seconds": 0.02, "slots": 2}}


def settings_in(folder: Path, **changes: Any) -> Settings:  # noqa: ANN401
    values = {
        "data": folder,
        "leases": {"timing_profile": "fast"},
        "worker": {"heartbeat_seconds": 0.05, "models": ["simulated"]},
        "shards": {"max_lines": 10},
    }
    return Settings.model_validate({**values, **changes})


@contextmanager
def running(settings: Settings, **environment: str) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(settings, environment=environment)
    worker.start()
    try:
        yield worker
    finally:
        worker.close()


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    """What an API of the same data folder has."""
    settings = settings_in(tmp_path)
    with open_app(settings, folder=server_folder(settings)) as app:
        yield app


def submit(app: App, num_lines: int) -> Batch:
    bench = Bench(db=app.db, blobs=app.blobs, clock=Clock(), doorbell=app.doorbell)
    return bench.submit(make_lines(num_lines))


def live(app: App) -> list[Worker]:
    return workers.list_recent(app.db, since=app.db.now() - timedelta(seconds=60))


def is_done(app: App, batch: Batch) -> bool:
    return batches.get(app.db, batch.id).status.is_terminal


def num_done(app: App, batch: Batch) -> int:
    return batches.get(app.db, batch.id).request_counts.completed


def test_worker_finishes_batches_without_any_message(app: App, tmp_path: Path) -> None:
    batch = submit(app, 25)
    with running(settings_in(tmp_path)):
        await_true(lambda: is_done(app, batch))
    assert num_done(app, batch) == 25


def test_message_runs_the_work_of_an_idle_worker(app: App, tmp_path: Path) -> None:
    bench = Bench(db=app.db, blobs=app.blobs, clock=Clock(), doorbell=app.doorbell)
    patient = {"timing_profile": "fast", "idle_poll_seconds": 3600}
    chosen = {"role": "engine", "heartbeat_seconds": 0.05, "models": ["simulated"]}
    with (
        bench.stack,
        running(settings_in(tmp_path, leases=patient, worker=chosen)) as worker,
    ):
        await_true(lambda: [one.state for one in live(app)] == ["idle"])
        batch = bench.submit_planned(make_lines(25), shard_lines=10)
        for name in ("control", "sweep", "no such loop"):
            worker.wake(name)
        assert num_done(app, batch) == 0, "another worker's messages"
        worker.wake("work")
        # Nearly always there already; the first poll may have been in its way.
        await_true(lambda: num_done(app, batch) == 25)


def test_message_for_work_that_runs_returns_at_once(app: App, tmp_path: Path) -> None:
    batch = submit(app, 200)
    with running(settings_in(tmp_path, models={"simulated": SLOW})) as worker:
        await_true(lambda: num_done(app, batch) > 0)
        worker.wake("work")
        assert num_done(app, batch) < 200, "it did not wait for the work"


def test_drain_file_flushes_and_gives_leases_back(app: App, tmp_path: Path) -> None:
    batch = submit(app, 200)
    drain_file = tmp_path / "drain"
    settings = settings_in(tmp_path, models={"simulated": SLOW})
    with running(settings, **{DRAIN_FILE: str(drain_file)}) as worker:
        await_true(lambda: num_done(app, batch) > 0)
        drain_file.touch()
        worker.wait()
        assert live(app) == []
    states = [state for _, state in shards.list_for_batch(app.db, batch.id)]
    assert UnitState.PENDING in states
    assert UnitState.LEASED not in states


def test_worker_that_is_told_to_drain_before_it_began_does_nothing(
    app: App, tmp_path: Path
) -> None:
    batch = submit(app, 5)
    worker = WorkerProcess(settings_in(tmp_path), environment={})
    worker.drain()
    worker.start()
    worker.wait()
    assert not is_done(app, batch)
    assert live(app) == []


def test_row_of_a_worker_says_how_it_is(app: App, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, models={"simulated": SLOW})
    with running(settings, **{DEVICE: "cuda:0 Some GPU"}):
        await_true(lambda: [one.state for one in live(app)] == ["idle"])
        (row,) = live(app)
        assert (row.role, row.gpu, row.models) == ("engine", "cuda:0 Some GPU", ("simulated",))
        assert (row.model_key, row.num_shards, row.engine_epoch) == (None, 0, 0)
        batch = submit(app, 100)
        await_true(lambda: [one.state for one in live(app)] == ["working"])
        await_true(lambda: live(app)[0].tokens_per_second > 0)
        (row,) = live(app)
        assert (row.model_key, row.engine_epoch, row.draining) == ("simulated", 1, False)
        assert row.num_shards > 0
        assert not is_done(app, batch)
    assert live(app) == []


def test_control_worker_runs_no_shards(app: App, tmp_path: Path) -> None:
    batch = submit(app, 5)
    chosen = {"role": "control", "heartbeat_seconds": 0.05}
    with running(settings_in(tmp_path, worker=chosen)) as worker:
        await_true(lambda: batches.get(app.db, batch.id).request_counts.total == 5)
        worker.wake("work")
        assert [(one.role, one.models) for one in live(app)] == [("control", ())]
        assert num_done(app, batch) == 0


def test_worker_that_plans_for_long_is_alive_by_its_lines(app: App, tmp_path: Path) -> None:
    batch = submit(app, 5000)
    chosen = {"role": "control", "heartbeat_seconds": 0.05}
    with running(settings_in(tmp_path, worker=chosen)) as worker:
        before = worker.progress()
        await_true(lambda: batches.get(app.db, batch.id).request_counts.total == 5000)
        assert worker.progress() != before


def test_worker_whose_engine_dies_too_often_says_so_everywhere(app: App, tmp_path: Path) -> None:
    batch, port = submit(app, 300), free_port()
    chosen = {
        "heartbeat_seconds": 0.05,
        "models": ["simulated"],
        "max_engine_deaths": 1,
        "metrics_port": port,
    }
    quick = {"engine": "simulated", "options": {"step_seconds": 0.005, "slots": 4}}
    settings = settings_in(tmp_path, worker=chosen, models={"simulated": quick})
    before = set(psutil.Process().children())
    with running(settings), structlog.testing.capture_logs() as logs:
        await_true(lambda: num_done(app, batch) > 0, seconds=90)
        children = set(psutil.Process().children()) - before
        (engine,) = [one for one in children if "engine.host" in one.cmdline()]
        engine.kill()
        await_true(lambda: [one.state for one in live(app)] == ["quarantined"], seconds=90)
        (row,) = live(app)
        assert (row.recent_deaths, row.num_shards) == (1, 0)
        states = {state for _, state in shards.list_for_batch(app.db, batch.id)}
        assert states == {UnitState.DONE, UnitState.PENDING}
        status, body = fetch_health(port)
        assert status == 503
        assert "Quarantined" in body
        assert "no request is to blame" in body
    told = [one for one in logs if one["event"] == "worker_quarantined"]
    assert [one["log_level"] for one in told] == ["error"], "once"


def fetch_health(port: int) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status, response.read().decode()
