"""C10: peak memory of every process of `batchctl run`, many lines against few, simulated engine.

    C10           every request is another: they run as they stand in the file
    C10 ordered   a third repeats others and all begin like others: written again in the order in
                  which they run, and their results sorted back

The whole command, from a file to a file. The peak is what the kernel noted for each process
(VmHWM). Every line of the output is read: each `custom_id` is there once, in the order of the
input, or the row fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from jobs.domain.request import CHAT
from tests.benchmarks.measuring import ROOT, Row, main, scaled

OPTIONS = {"step_seconds": 0.0005, "slots": 64}
NUM_GROUPS = 64
_SAMPLE_SECONDS = 0.05
_ROLES = {"engine.host": "engine", "engine.sandbox": "sandbox", "engine.guardian": "guardian"}
Bodies = Callable[[int], Iterator[dict[str, Any]]]


class _Answer(msgspec.Struct):
    custom_id: str


_decode_answer = msgspec.json.Decoder(_Answer).decode


@dataclass(slots=True, kw_only=True)
class Used:
    """What a run took, by the role of its processes."""

    peak_bytes: dict[str, int] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def different(num_lines: int) -> Iterator[dict[str, Any]]:
    """Yield requests that have nothing in common from the first word on."""
    for number in range(num_lines):
        yield {"messages": [{"role": "user", "content": f"{number} {'lorem ipsum ' * 40}"}]}


def alike(num_lines: int) -> Iterator[dict[str, Any]]:
    """Yield requests with beginnings in common; every third is asked ten times."""
    for number in range(num_lines):
        asked = number if number % 3 else number // 3 % max(1, num_lines // 30) * 3
        yield {
            "messages": [
                {"role": "system", "content": f"{asked % NUM_GROUPS} {'lorem ipsum ' * 50}"},
                {"role": "user", "content": f"question {asked}"},
            ],
            "temperature": 0,
        }


def write_input(path: Path, bodies: Iterator[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        for number, body in enumerate(bodies):
            asked = {"model": "simulated", **body}
            line = {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": asked}
            file.write(msgspec.json.encode(line) + b"\n")


def check_output(path: Path, num_lines: int) -> None:
    """Check that every `custom_id` is there once, in the order of the input."""
    found = 0
    with path.open("rb") as output:
        for found, line in enumerate(output, start=1):
            assert _decode_answer(line).custom_id == f"r{found - 1}", f"line {found}"
    assert found == num_lines, f"{found} lines instead of {num_lines}"


def role_of(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return next((role for name, role in _ROLES.items() if name in command), "batchctl")


def peak_of(process: psutil.Process) -> int:
    """Return the most memory a process ever had resident; where nobody knows, what it has now."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    resident: int = process.memory_info().rss
    return resident


def watch(process: subprocess.Popen[bytes]) -> Used:
    """Return what a command and all that it starts use, once it has ended."""
    used = Used()
    spent: dict[tuple[str, int], float] = {}
    begin = time.monotonic()
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.Error):
            for one in [root, *root.children(recursive=True)]:
                role = role_of(one)
                used.peak_bytes[role] = max(used.peak_bytes.get(role, 0), peak_of(one))
                times = one.cpu_times()
                spent[role, one.pid] = times.user + times.system
        time.sleep(_SAMPLE_SECONDS)
    used.seconds = time.monotonic() - begin
    for (role, _), seconds in spent.items():
        used.cpu_seconds[role] = used.cpu_seconds.get(role, 0.0) + seconds
    return used


def measure_one(num_lines: int, bodies: Bodies) -> Used:
    """Run a batch of so many lines with `batchctl run`, and check what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write_input(source, bodies(num_lines))
        models = {"simulated": {"engine": "simulated", "options": OPTIONS}}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BATCHCTL_")}
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jobs.cli.main", "run", str(source), "--json"),
                *("--output", str(target), "--data", f"{folder}/data"),
            ],
            env={**clean, "BATCHCTL_MODELS": json.dumps(models), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        used = watch(process)
        assert process.returncode == 0, process.returncode
        check_output(target, num_lines)
    peaks = ", ".join(f"{role} {peak / 2**20:.0f} MiB" for role, peak in used.peak_bytes.items())
    print(
        f"{num_lines:,} lines ({bodies.__name__}) in {used.seconds:.0f} s, every custom_id once; "
        f"peak memory: {peaks}",
        flush=True,
    )
    return used


def compare(name: str, bodies: Bodies, *, many: int, few: int) -> list[Row]:
    """Return a row for each process that both runs had."""
    small, large = measure_one(few, bodies), measure_one(many, bodies)
    rows = []
    for role in sorted(set(small.peak_bytes) & set(large.peak_bytes)):
        spent = large.cpu_seconds[role] - small.cpu_seconds[role]
        before, after = small.peak_bytes[role], large.peak_bytes[role]
        rows.append(
            Row(
                id=f"C10 {name}{role}",
                what=f"peak memory of {role}, {many:,} lines ÷ {few:,}, {bodies.__name__}",
                values=[after / before],
                must=1.3,
                goal=1.1,
                less=True,
                exact=True,
                note=f"`batchctl run`, simulated engine: {before / 2**20:.0f} and "
                f"{after / 2**20:.0f} MiB resident; {spent / (many - few) * 1e6:.0f} µs of "
                f"processor time per request; {large.seconds:.0f} s; every custom_id once",
            )
        )
    return rows


def measure(size: float) -> list[Row]:
    """Return C10 for each process, and what the control plane's costs for each request."""
    few = scaled(10_000, size, least=500)
    return [
        *compare("", different, many=scaled(1_000_000, size, least=2000), few=few),
        *compare("ordered ", alike, many=scaled(100_000, size, least=2000), few=few),
    ]


if __name__ == "__main__":
    main(measure)
