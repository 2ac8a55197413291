"""How long the work of a killed worker waits until somebody else goes on with it.

    kill ── lease runs out ── sweep reaps it ── back-off ── claim ── first results durable
    0 s         50 to 60 s        up to 10 s     up to 2 s     wait for a poll or a ring

At the default settings (leases of 60 s, renewed every 10 s, reaped every 10 s), with the control
worker and three engine workers of `make fleet`. In each round all processes of two engine workers
are killed at one moment, while each holds many shards; the third one soon has nothing else to do,
and the first two are started again, so that whoever takes a shard has to notice it first.
Usage: python -m tests.benchmarks.resume [ROUNDS]
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa

from jobs.client import Upload
from jobs.domain.request import CHAT
from tests.benchmarks.fleet import ROOT, Fleet, running, write_input

MODEL = "resumed"
RATES = {MODEL: {"slots": 64, "reply_tokens": 16, "step_seconds": 0.05}}
SETTINGS = {"BATCHCTL_SHARDS__MAX_LINES": "20"}  # many leases for each worker
NUM_LINES = 1800
LEASE_SECONDS = 60
TARGET_SECONDS = 75
_POLL_SECONDS = 0.1
_LONGEST_SECONDS = 300.0


@dataclass(slots=True, kw_only=True)
class Lost:
    """A lease whose holder was killed; seconds are since then."""

    epoch: int
    expired: float
    reaped: float | None = None
    claimed: float | None = None
    resumed: float | None = None


def kill(fleet: Fleet, names: Sequence[str]) -> tuple[float, set[int]]:
    """Kill all processes of some workers at once; return when, and which those were."""
    victims: list[psutil.Process] = []
    for name in names:
        root = psutil.Process(fleet.pids[name])
        victims += [root, *root.children(recursive=True)]
    at = time.time()
    for one in victims:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return at, {one.pid for one in victims}


def leases_of(fleet: Fleet, pids: set[int], killed_at: float) -> dict[str, Lost]:
    """Return the shards that these processes held."""
    query = sa.text(
        "SELECT units.id, units.epoch, units.lease_expires_at, workers.pid FROM units "
        "JOIN workers ON workers.id = units.owner "
        "WHERE units.state = 'leased' AND units.kind = 'shard'"
    )
    with fleet.database.connect() as connection:
        return {
            row.id: Lost(epoch=row.epoch, expired=row.lease_expires_at.timestamp() - killed_at)
            for row in connection.execute(query)
            if row.pid in pids
        }


def watch(fleet: Fleet, lost: dict[str, Lost], killed_at: float) -> None:
    """Fill in when each was reaped, claimed again, and had the first results after that."""
    query = sa.text(
        "SELECT id, epoch, state, lease_expires_at, (SELECT min(created_at) FROM segments "
        "WHERE segments.unit_id = units.id AND segments.epoch = units.epoch) AS first_at "
        "FROM units WHERE id = ANY(:ids)"
    )
    deadline = time.monotonic() + _LONGEST_SECONDS
    while any(one.resumed is None for one in lost.values()):
        if time.monotonic() > deadline:
            sys.exit(f"some leases were not taken up: {lost}")
        time.sleep(_POLL_SECONDS)
        with fleet.database.connect() as connection:
            rows = connection.execute(query, {"ids": list(lost)}).all()
        for row in rows:
            one = lost[row.id]
            if row.state == "done" and row.epoch == one.epoch:
                del lost[row.id]  # its last commit was under way in the database
                continue
            if row.epoch > one.epoch and one.reaped is None:
                one.reaped = time.time() - killed_at
            if row.epoch < one.epoch + 2:
                continue
            if one.claimed is None:  # seen before its first renewal, so it says when
                one.claimed = row.lease_expires_at.timestamp() - LEASE_SECONDS - killed_at
            if row.first_at is not None and one.resumed is None:
                one.resumed = row.first_at.timestamp() - killed_at


def measure(fleet: Fleet, folder: Path, number: int, rng: random.Random) -> list[Lost]:
    """Run a batch, kill two of three workers in it, and wait for its end."""
    path = folder / f"{number}.jsonl"
    write_input(path, MODEL, NUM_LINES)
    file = fleet.client.upload(Upload.from_path(path))
    batch_id = fleet.client.create_batch(input_file_id=file.id, endpoint=CHAT).id
    while fleet.client.get_batch(batch_id).request_counts.completed < NUM_LINES / 5:
        time.sleep(_POLL_SECONDS)
    time.sleep(rng.uniform(0.0, 10.0) / 3)
    names = [f"engine-{(number + offset) % 3 + 1}" for offset in range(2)]
    killed_at, pids = kill(fleet, names)
    lost = leases_of(fleet, pids, killed_at)
    watch(fleet, lost, killed_at)
    while not (batch := fleet.client.get_batch(batch_id)).is_terminal:
        time.sleep(_POLL_SECONDS)
    counts = batch.request_counts
    if (counts.completed, counts.failed) != (NUM_LINES, 0):
        sys.exit(f"batch {batch_id} is {batch.status}: {counts}")
    find_again(fleet)
    return list(lost.values())


def find_again(fleet: Fleet) -> None:
    """Learn the processes of workers that were started again."""
    for one in psutil.Process(fleet.pid).children():
        with suppress(psutil.Error):
            folder = one.environ().get("BATCHCTL_DATA", "")
            name = Path(folder).name
            if name in fleet.pids:
                fleet.pids[name] = one.pid


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the middle, the 99th percentile and the longest; of few values the last two agree."""
    ordered = sorted(values)
    last = min(len(ordered) - 1, -(-99 * len(ordered) // 100) - 1)
    return {
        "p50": round(statistics.median(ordered), 1),
        "p99": round(ordered[last], 1),
        "max": round(ordered[-1], 1),
    }


def main() -> None:
    """Measure, print and write build/bench-resume.json."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rng = random.Random(0)
    found: list[Lost] = []
    load_before = os.getloadavg()
    # Not in the project: as root, Postgres runs as a user who may not get there.
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as name:
        folder = Path(name)
        with running(folder / "fleet", RATES, num_engines=3, settings=SETTINGS) as fleet:
            for number in range(rounds):
                lost = measure(fleet, folder, number, rng)
                found += lost
                print(f"round {number + 1}: {len(lost)} leases, {summary(times(lost))}")
    took = summary(times(found))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "load_before": [round(one, 1) for one in load_before],
        "load_after": [round(one, 1) for one in os.getloadavg()],
        "target_p99_seconds": TARGET_SECONDS,
        "num_leases": len(found),
        "num_rounds": rounds,
        "resumed_seconds": took,
        "claimed_seconds": summary([one.claimed or 0.0 for one in found]),
        "reaped_seconds": summary([one.reaped or 0.0 for one in found]),
        "expired_seconds": summary([one.expired for one in found]),
    }
    path = ROOT / "build" / "bench-resume.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(
        f"resume after SIGKILL: p50 {took['p50']:.1f} s, p99 {took['p99']:.1f} s (n={len(found)})"
    )


def times(lost: Sequence[Lost]) -> list[float]:
    """Return how long each took to be gone on with."""
    return [one.resumed for one in lost if one.resumed is not None]


if __name__ == "__main__":
    main()
