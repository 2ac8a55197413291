"""C2: the control plane at the speed of a rack of GPUs: a fleet with one simulated engine.

    ideal      slots / (tokens of a reply x length of a step), what the engine does when it is
               never short of requests and nobody is waited for
    achieved   requests / time from the end of planning to the last durable result

Real Postgres, Valkey and S3 server, API, control worker and one engine worker of `make fleet`.
Rates alternate; before each measured batch a short one has loaded its engine. CPU is that of each
process and its children, from the same window to the end of the batch, for each request.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from jobs.client import Client, Upload
from jobs.domain.request import CHAT
from tests.benchmarks.measuring import Row, main

ROOT = Path(__file__).parents[2]
RATES: Mapping[str, Mapping[str, float]] = {
    "rate-220": {"slots": 64, "reply_tokens": 16, "step_seconds": 64 / (16 * 220)},
    "rate-1000": {"slots": 256, "reply_tokens": 16, "step_seconds": 256 / (16 * 1000)},
    "rate-3000": {"slots": 768, "reply_tokens": 16, "step_seconds": 768 / (16 * 3000)},
}
MUST = {1000: 0.95}
GOAL = {1000: 0.97, 3000: 0.97}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One batch."""

    ratio: float
    seconds: float
    planning_seconds: float
    finalizing_seconds: float
    cpu_us: dict[str, float]


class Fleet:
    """A fleet that is ready: a client, its database, and what its processes cost."""

    def __init__(self, ready: dict[str, Any], database_url: str, pid: int) -> None:
        self.pid = pid
        self.client = Client(ready["url"])
        self.pids = {one["name"]: int(one["pid"]) for one in ready["processes"]}
        self.database = sa.create_engine(sa.make_url(database_url))

    def run(self, path: Path) -> str:
        """Run a batch to its end and return its id."""
        file = self.client.upload(Upload.from_path(path))
        batch_id = self.client.create_batch(input_file_id=file.id, endpoint=CHAT).id
        while not (batch := self.client.get_batch(batch_id)).is_terminal:
            time.sleep(0.2)
        if batch.status != "completed" or batch.request_counts.failed:
            sys.exit(f"batch {batch_id} is {batch.status}: {batch.request_counts}")
        return batch_id

    def instants(self, batch_id: str) -> dict[str, float]:
        """Return when the batch got where, in seconds; the API's have no fractions."""
        names = ("created_at", "in_progress_at", "finalizing_at", "completed_at")
        with self.database.connect() as connection:
            row = connection.execute(
                sa.text(f"SELECT {', '.join(names)} FROM batches WHERE id = :id"),  # noqa: S608
                {"id": batch_id},
            ).one()
        return {name: instant.timestamp() for name, instant in zip(names, row, strict=True)}

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds so far: of each part, and of the engine apart from its worker."""
        found: dict[str, float] = {}
        for name, pid in self.pids.items():
            root = psutil.Process(pid)
            for one in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = one.cpu_times()
                    part = "engine" if "engine.host" in one.cmdline() else name
                    # Those of children that have ended are their parent's.
                    spent = times.user + times.system + times.children_user + times.children_system
                    found[part] = found.get(part, 0.0) + spent
        return found


def write_input(path: Path, model: str, num_lines: int) -> None:
    """Write requests of 40 words."""
    words = " ".join(["alpha", "beta", "gamma", "delta"] * 10)
    with path.open("w") as file:
        for number in range(num_lines):
            body = {"model": model, "messages": [{"role": "user", "content": f"{number} {words}"}]}
            line = {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(line) + "\n")


def measure_one(fleet: Fleet, folder: Path, model: str, seconds: float) -> Measured:
    """Run one batch of so many seconds of work."""
    options = RATES[model]
    rate = options["slots"] / (options["reply_tokens"] * options["step_seconds"])
    num_lines = round(rate * seconds / options["slots"]) * int(options["slots"])
    write_input(folder / "warm.jsonl", model, int(options["slots"]))
    write_input(folder / "in.jsonl", model, num_lines)
    fleet.run(folder / "warm.jsonl")
    before = fleet.cpu()
    batch_id = fleet.run(folder / "in.jsonl")
    after = fleet.cpu()
    at = fleet.instants(batch_id)
    took = at["finalizing_at"] - at["in_progress_at"]
    return Measured(
        ratio=num_lines / rate / took,
        seconds=took,
        planning_seconds=at["in_progress_at"] - at["created_at"],
        finalizing_seconds=at["completed_at"] - at["finalizing_at"],
        cpu_us={
            name: (spent - before.get(name, 0.0)) / num_lines * 1e6 for name, spent in after.items()
        },
    )


@contextmanager
def running(
    folder: Path,
    rates: Mapping[str, Mapping[str, object]] = RATES,
    *,
    num_engines: int = 1,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Fleet]:
    """A fleet on free ports, with a simulated model for each rate."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("BATCHCTL_")}
    models = {name: {"engine": "simulated", "options": options} for name, options in rates.items()}
    process = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "scripts" / "fleet.py"), "--folder", str(folder)),
            *("--port", "0", "--engines", str(num_engines), "--fresh", "--json"),
        ],
        env={
            **clean,
            "BATCHCTL_MODELS": json.dumps(models),
            "BATCHCTL_LOG__LEVEL": "warning",
            **(settings or {}),
        },
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline() or "{}")
        if not ready:
            sys.exit("the fleet did not start; see above")
        exported = dict(
            line.removeprefix("export ").split("=", 1)
            for line in Path(ready["env"]).read_text().splitlines()
        )
        url = exported["BATCHCTL_DATABASE__URL"].strip("'")
        yield Fleet(ready, url, process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def measure(size: float) -> list[Row]:
    """Return C2: one row for each rate."""
    seconds, rounds = 20.0 * min(1.0, max(0.1, size)), 3 if size >= 1 else 1
    found: dict[str, list[Measured]] = {model: [] for model in RATES}
    # Not in the project: as root, Postgres runs as a user who may not get there.
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as name:
        folder = Path(name)
        with running(folder / "fleet") as fleet:
            for number in range(rounds):
                for model in list(RATES)[:: -1 if number % 2 else 1]:
                    found[model].append(measure_one(fleet, folder, model, seconds))
    return [_row(model, measured, seconds) for model, measured in found.items()]


def _row(model: str, measured: list[Measured], seconds: float) -> Row:
    rate = int(model.removeprefix("rate-"))
    parts = sorted({name for one in measured for name in one.cpu_us})
    cpu = {name: statistics.median(one.cpu_us.get(name, 0.0) for one in measured) for name in parts}
    planning = statistics.median(one.planning_seconds for one in measured)
    return Row(
        id=f"C2 {rate}",
        what=f"achieved ÷ ideal at {rate:,} requests/s, simulated engine",
        values=[one.ratio for one in measured],
        must=MUST.get(rate),
        goal=GOAL.get(rate),
        note=f"fleet of one engine worker over Postgres, Valkey and S3, {seconds:.0f} s of work; "
        f"by the clock, from the end of planning ({planning:.1f} s); processor time per request: "
        + ", ".join(f"{name} {spent:.0f} µs" for name, spent in cpu.items()),
    )


if __name__ == "__main__":
    main(measure)
