"""Peak memory of every process of `batchctl run`: many lines against few, simulated engine.

Prints the ratio for each process; also the CPU time per request of the control plane.
Usage: python -m tests.benchmarks.memory [MANY] [FEW]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

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


def measure(num_lines: int) -> tuple[dict[str, int], dict[str, float]]:
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


def main(many: int, few: int) -> None:
    few_peaks, few_seconds = measure(few)
    many_peaks, many_seconds = measure(many)
    for role in sorted(many_peaks):
        if role not in few_peaks:
            continue
        ratio = many_peaks[role] / few_peaks[role]
        print(
            f"peak memory of {role}: {few_peaks[role] / 2**20:.0f} MiB at {few} lines, "
            f"{many_peaks[role] / 2**20:.0f} MiB at {many}: ratio {ratio:.2f} (must 1.2)"
        )
    for role in sorted(many_seconds):
        per_line = (many_seconds[role] - few_seconds.get(role, 0)) / (many - few) * 1e6
        print(f"CPU of {role}: {per_line:.1f} us per request, all in")


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 200_000,
        int(sys.argv[2]) if len(sys.argv) > 2 else 10_000,
    )
