"""C10: peak memory of every process of `batchctl run`, many lines against few, simulated engine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.benchmarks.measuring import Row, main, scaled

CHAT = "/v1/chat/completions"
_SAMPLE_SECONDS = 0.1


def write_input(path: Path, num_lines: int) -> None:
    with path.open("w") as file:
        for number in range(num_lines):
            body = {
                "model": "simulated",
                "messages": [{"role": "user", "content": f"{number} {'lorem ipsum ' * 40}"}],
            }
            line = {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(line) + "\n")


def role_of(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return next((name for name in ("engine.host", "engine.sandbox") if name in command), "batchctl")


def measure_one(num_lines: int) -> tuple[dict[str, int], dict[str, float]]:
    """Return the peak resident bytes and the CPU seconds of each process, by role."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        write_input(source, num_lines)
        options = {"step_seconds": 0.0005, "slots": 64}
        models = {"simulated": {"engine": "simulated", "options": options}}
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jobs.cli.main", "run", str(source), "--json"),
                *("--output", f"{folder}/out.jsonl", "--data", f"{folder}/data"),
            ],
            env={**os.environ, "BATCHCTL_MODELS": json.dumps(models)},
            stdout=subprocess.DEVNULL,
        )
        peaks: dict[str, int] = {}
        seconds: dict[str, float] = {}
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                for one in [root, *root.children(recursive=True)]:
                    role = role_of(one)
                    peaks[role] = max(peaks.get(role, 0), one.memory_info().rss)
                    spent = one.cpu_times()
                    seconds[role] = spent.user + spent.system
            except psutil.Error:
                pass
            time.sleep(_SAMPLE_SECONDS)
        assert process.returncode == 0
        with (Path(folder) / "out.jsonl").open("rb") as output:
            assert sum(1 for _ in output) == num_lines
        return peaks, seconds


def measure(size: float) -> list[Row]:
    """Return C10 for each process, and what the control plane's costs for each request."""
    many, few = scaled(1_000_000, size, least=2000), scaled(10_000, size, least=500)
    few_peaks, few_seconds = measure_one(few)
    many_peaks, many_seconds = measure_one(many)
    rows = []
    for role in sorted(set(many_peaks) & set(few_peaks)):
        spent = (many_seconds[role] - few_seconds.get(role, 0)) / (many - few) * 1e6
        rows.append(
            Row(
                id=f"C10 {role}",
                what=f"peak memory of {role}, {many:,} lines ÷ {few:,}",
                values=[many_peaks[role] / few_peaks[role]],
                must=1.3,
                goal=1.1,
                less=True,
                exact=True,
                note=f"`batchctl run`, simulated engine: {few_peaks[role] / 2**20:.0f} and "
                f"{many_peaks[role] / 2**20:.0f} MiB resident; {spent:.0f} µs of processor time "
                "per request",
            )
        )
    return rows


if __name__ == "__main__":
    main(measure)
