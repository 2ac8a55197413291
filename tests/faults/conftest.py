"""Runs `batchctl` as people do, in processes that can be killed, and checks what is left."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.builders import make_mixed_line
from tests.integration.fleet.conftest import blobs, fleet, make_fleet, valkey

__all__ = ["blobs", "fleet", "make_fleet", "valkey"]  # fixtures

CHAT = "/v1/chat/completions"


def request_line(number: int, content: str = "hello", **body: object) -> str:
    return json.dumps(
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": CHAT,
            "body": {
                "model": "simulated",
                "messages": [{"role": "user", "content": f"{content} {number}"}],
                **body,
            },
        }
    )


@dataclass
class Bench:
    """A folder with an input, and the means to run it, kill it and read what came out."""

    folder: Path
    model_options: dict[str, object] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def input(self) -> Path:
        return self.folder / "in.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def errors(self) -> Path:
        return self.folder / "err.jsonl"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    def write_mixed_input(self, num_lines: int) -> None:
        """Write lines of which some repeat others, and some begin alike."""
        self.write_input(num_lines, lambda number: make_mixed_line(number).decode())

    def num_followers(self) -> int:
        """Return how many lines of the output have the answer of an equal one."""
        return self.output.read_bytes().count(b'"same_as"')

    def write_input(self, num_lines: int, line: Callable[[int], str] = request_line) -> None:
        with self.input.open("w") as file:
            for number in range(num_lines):
                file.write(line(number) + "\n")

    def environment(self) -> dict[str, str]:
        options = {"ledger": str(self.ledger), **self.model_options}
        models = {"simulated": {"engine": "simulated", "options": options}}
        return {
            **os.environ,
            "BATCHCTL_DATA": str(self.folder / "data"),
            "BATCHCTL_MODELS": json.dumps(models),
            **self.settings,
        }

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "stderr").open("ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli.main", *arguments],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self.processes.append(process)
        return process

    def start_run(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start(
            "run",
            str(self.input),
            "--output",
            str(self.output),
            "--errors",
            str(self.errors),
            "--model",
            "simulated",
            *arguments,
        )

    def custom_ids(self) -> list[str]:
        found = []
        for path in (self.output, self.errors):
            if path.exists():
                found += [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]
        return found

    def usage_tokens(self) -> int:
        total = 0
        for line in self.output.read_text().splitlines():
            total += json.loads(line)["response"]["body"]["usage"]["completion_tokens"]
        return total

    def generated_tokens(self) -> int:
        content = self.ledger.read_bytes() if self.ledger.exists() else b""
        return sum(int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4))

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


def tree_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def await_gone(processes: list[psutil.Process], seconds: float = 10.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, f"still running: {[p.cmdline() for p in alive]}"


def await_true(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    for process in made.processes:
        for one in tree_of(process):
            one.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)
