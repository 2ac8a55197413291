"""`make fleet`, as somebody runs it who then kills its parts."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from jobs.cli import exits
from tests.integration.api.servers import wait_for

ROOT = Path(__file__).parents[2]
BATCHCTL = (sys.executable, "-m", "jobs.cli.main")
NUM_LINES = 2000
PROMPT, ANSWER = "CANARY-prompt-5be2", "CANARY-answer-c41a"
# 100 requests a second on each engine worker, in shards of which a worker holds a few.
SLOW = {"simulated": {"options": {"slots": 16, "reply_tokens": 16, "step_seconds": 0.01}}}


def environment(**more: str) -> dict[str, str]:
    clean = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("BATCHCTL_", "HF_", "VLLM_"))
    }
    return {
        **clean,
        "BATCHCTL_LEASES__TIMING_PROFILE": "fast",
        "BATCHCTL_SHARDS__MAX_LINES": "100",
        "BATCHCTL_MODELS": json.dumps(SLOW),
        "BATCHCTL_LOG__LEVEL": "debug",
        "OMP_NUM_THREADS": "1",
        **more,
    }


class Fleet:
    """A fleet that is ready, and what it said."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", ready: dict[str, Any], log: Path
    ) -> None:
        self.process = process
        self.url: str = ready["url"]
        self.pids: dict[str, int] = {one["name"]: one["pid"] for one in ready["processes"]}
        self.metrics = [
            one["where"].split()[0] for one in ready["processes"] if "/metrics" in one["where"]
        ]
        self.log = log

    def run(self, *args: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BATCHCTL, *args],
            cwd=folder,
            env=environment(BATCHCTL_BASE_URL=self.url, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def json(self, *args: str, folder: Path) -> Any:  # noqa: ANN401
        done = self.run(*args, "--json", folder=folder)
        assert done.returncode == exits.OK, done.stderr
        return json.loads(done.stdout)

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def start(folder: Path, *args: str, log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "scripts" / "fleet.py"), "--folder", str(folder)),
                *args,
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
        )


@contextmanager
def running(folder: Path, log: Path) -> Iterator[Fleet]:
    """A fleet on free ports; at the end Ctrl-C has to leave nothing."""
    process = start(folder, "--port", "0", "--json", log=log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        fleet = Fleet(process, json.loads(line), log)
        yield fleet
        tree = fleet.tree()
        process.send_signal(signal.SIGINT)
        assert process.wait(45) == 0, log.read_text()
        assert_ended(tree, seconds=1)
        assert left_of(folder) == []
    finally:
        process.kill()
        process.communicate()
        for one in left_of(folder):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def assert_ended(tree: list[psutil.Process], *, seconds: float) -> None:
    """Wait for processes; one that only waits to be noticed by whoever adopted it has ended."""
    _, left = psutil.wait_procs(tree, timeout=seconds)
    alive = []
    for one in left:
        with suppress(psutil.NoSuchProcess):  # a zombie's error is one of these
            alive.append(one.cmdline())
    assert alive == []


def left_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that know this folder, the fleet's own and those nobody waits for."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            words = [*one.cmdline(), *one.environ().values()]
            if one.pid != os.getpid() and any(str(folder) in word for word in words):
                found.append(one)
    return found


def write_input(path: Path) -> None:
    content = f"{PROMPT} [[reply={ANSWER}]]"
    body = {"model": "simulated", "messages": [{"role": "user", "content": content}]}
    with path.open("w") as file:
        for number in range(NUM_LINES):
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user can reach: as root, Postgres runs as one."""
    with tempfile.TemporaryDirectory(prefix="fleet", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fleet_finishes_its_batches_whoever_is_killed(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "log"
    with running(folder, log) as fleet:
        done = fleet.run(
            *("submit", str(ROOT / "examples" / "people.jsonl")),
            *("--wait", "--output", "people.jsonl"),
            folder=tmp_path,
        )
        assert done.returncode == exits.OK, done.stderr
        assert len((tmp_path / "people.jsonl").read_text().splitlines()) == 24
        listed = fleet.run("workers", folder=tmp_path)
        assert (
            sum(" engine " in line.replace("\t", " ") for line in listed.stdout.splitlines()) == 2
        )

        write_input(tmp_path / "in.jsonl")
        batch_id = fleet.json("submit", "in.jsonl", folder=tmp_path)["id"]

        def num_done() -> int:
            counts = fleet.json("status", batch_id, folder=tmp_path)["request_counts"]
            return int(counts["completed"]) + int(counts["failed"])

        def advance() -> None:
            before = num_done()
            wait_for(lambda: num_done() > before, seconds=60)

        advance()
        os.kill(fleet.pids["engine-1"], signal.SIGTERM)
        advance()
        victim = psutil.Process(fleet.pids["engine-2"])
        for one in [victim, *victim.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        advance()
        os.kill(fleet.pids["valkey"], signal.SIGKILL)
        wait_for(lambda: num_done() == NUM_LINES, seconds=120)
        wait_for(
            lambda: fleet.json("status", batch_id, folder=tmp_path)["status"] == "completed",
            seconds=60,
        )
        fleet.run("results", batch_id, "--output", "out.jsonl", folder=tmp_path)
        answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [one["custom_id"] for one in answers] == [f"r{n}" for n in range(NUM_LINES)]
        assert all(
            one["response"]["body"]["choices"][0]["message"]["content"] == ANSWER for one in answers
        )
        metrics = "".join(httpx2.get(url).text for url in [*fleet.metrics, f"{fleet.url}/metrics"])
        assert 'batchctl_requests_total{model="simulated",outcome="completed"}' in metrics
        assert "CANARY" not in metrics
        said = log.read_text()
        for name, how in (
            ("engine-1", "ended with status 0"),
            ("engine-2", "ended by SIGKILL"),
            ("valkey", "ended by SIGKILL"),
        ):
            assert f"{name} {how}, starts again in 1 s" in said
    assert log.read_text().endswith("Everything has ended.\n")
    logs = [*folder.glob("*.log"), *folder.glob("data/*/server/*.log"), log]
    assert len(logs) > 8
    assert [one.name for one in logs if "CANARY" in one.read_text(errors="replace")] == []

    with running(folder, log) as fleet:  # what was there is there
        assert fleet.json("status", batch_id, folder=tmp_path)["status"] == "completed"


@pytest.mark.slow
def test_a_fleet_that_is_killed_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "log"
    process = start(folder, "--port", "0", "--json", "--engines", "1", log=log)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), log.read_text()
        tree = psutil.Process(process.pid).children(recursive=True)
        assert len(tree) > 5
        process.kill()
        assert_ended(tree, seconds=40)
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        log = tmp_path / "log"
        process = start(tmp_path / "fleet", "--port", str(port), log=log)
        process.communicate(timeout=30)
    assert process.returncode == 1
    said = log.read_text()
    assert said.count("\n") == 1
    assert f"port {port} on 127.0.0.1 cannot be used: address already in use" in said
    assert "PORT=" in said


def test_a_second_fleet_over_the_same_data_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (tmp_path / "lock").open("w") as held:
        held.write("4242\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        process = start(tmp_path, "--port", "0", log=log)
        process.communicate(timeout=30)
    assert process.returncode == 1
    assert "another fleet (process 4242)" in log.read_text()
