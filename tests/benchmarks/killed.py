"""C12: tokens that are made twice because `batchctl run` was killed once, and then resumed.

The simulated engine writes down every token; the answers say how many were needed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.benchmarks import workloads
from tests.benchmarks.measuring import ROOT, Row, main, scaled

OPTIONS = {"slots": 64, "step_seconds": 0.002, "reply_tokens": 1024}
_TICK_SECONDS = 0.05


def start(folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs.cli.main", "run", str(folder / "in.jsonl"), "--resume"),
            *("--output", str(folder / "out.jsonl"), "--model", "simulated", "--json"),
        ],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def tokens_in(ledger: Path) -> int:
    content = ledger.read_bytes() if ledger.exists() else b""
    return sum(int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4))


def kill_at(process: subprocess.Popen[bytes], ledger: Path, tokens: int) -> None:
    """Kill the run and all it started as soon as so many tokens are made."""
    while tokens_in(ledger) < tokens:
        if process.poll() is not None:
            sys.exit("the run ended before it could be killed")
        time.sleep(_TICK_SECONDS)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        one.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family)


def measure_one(num_lines: int, *, seed: int) -> tuple[float, float]:
    """Return the share of tokens that were made twice, and how many seconds of work they are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = folder / "ledger"
        wanted = 0
        with (folder / "in.jsonl").open("wb") as file:
            for line in workloads.chat(num_lines, seed=seed, model="simulated", shrink=0.3):
                file.write(line + b"\n")
                wanted += int(json.loads(line)["body"]["max_tokens"])
        models = {
            "simulated": {"engine": "simulated", "options": OPTIONS | {"ledger": str(ledger)}}
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BATCHCTL_")}
        environment = {
            **clean,
            "BATCHCTL_DATA": str(folder / "data"),
            "BATCHCTL_MODELS": json.dumps(models),
        }
        at = random.Random(seed).uniform(0.3, 0.7)
        kill_at(start(folder, environment), ledger, round(at * wanted))
        assert start(folder, environment).wait() == 0
        lines = (folder / "out.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        assert [one["custom_id"] for one in kept] == [f"r{n}" for n in range(num_lines)]
        needed = sum(one["response"]["body"]["usage"]["completion_tokens"] for one in kept)
        repeated = tokens_in(ledger) - needed
    rate = OPTIONS["slots"] / OPTIONS["step_seconds"]
    return repeated / needed, repeated / rate


def measure(size: float) -> list[Row]:
    num_lines = scaled(40_000, size, least=2000)
    found = [measure_one(num_lines, seed=seed) for seed in range(3 if size >= 1 else 1)]
    return [
        Row(
            id="C12",
            what="tokens repeated after one kill -9",
            values=[share for share, _ in found],
            must=0.01,
            goal=0.005,
            unit="share",
            less=True,
            exact=True,
            note=f"W1 x 0.3, {num_lines} requests, {OPTIONS['slots']} slots, killed once between "
            "30 and 70 %, then resumed; repeated were "
            f"{max(seconds for _, seconds in found):.2f} s of work at most",
        )
    ]


if __name__ == "__main__":
    main(measure)
