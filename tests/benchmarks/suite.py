"""Runs the rows of the suite and prints what must be, what is meant to be, and what is.

    python -m tests.benchmarks.suite [C1 C4 ...] [--size 0.05] [--anyway]

Without names: all rows but those of memory and of peers, which take longer or want more. Each part
runs in a process of its own; what others use of the machine meanwhile is the time its cores were
busy less what we and our children used. Above LIMIT cores a figure is not reported, unless it is a
count, or BENCH_ANYWAY=1 or --anyway asks for it; then the load is part of the row. Writes
build/bench.json; rows that were not measured this time stay in it. At another size than 1 nothing
is written.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.measuring import ROOT, cpu_seconds
from tests.benchmarks.reasons import explained

OUTPUT = ROOT / "build" / "bench.json"
PARTS = {
    "end_to_end": ("C1",),
    "fleet": ("C2",),
    "cpu": ("C3",),
    "ingest": ("C4",),
    "prefixes": ("C5", "C6"),
    "hf": ("C7", "C9"),
    "slots": ("C8",),
    "memory": ("C10",),
    "repeats": ("C11",),
    "killed": ("C12",),
    "tuning": ("T1",),
    "peers": ("P",),
}
APART = ("C10", "P")
ESCAPING = frozenset({"peers"})
"""Parts whose processes start some that nobody waits for: their time looks like that of others, so
what others use is looked at before and behind such a part."""
LIMIT = 0.3
"""Cores that others may use, on average over a part."""
_SAMPLE_SECONDS = 5.0
Summary = dict[str, Any]


@dataclass(slots=True)
class Others:
    """How many cores others use, from one question to the next."""

    at: float = 0.0
    busy: float = 0.0
    ours: float = 0.0

    def cores(self) -> float:
        """Return what they used since the last call."""
        before = (self.at, self.busy, self.ours)
        spent = psutil.cpu_times()
        self.at = time.monotonic()
        self.busy = sum(spent) - spent.idle - getattr(spent, "iowait", 0.0)
        # A guest's time is counted as its host's as well.
        self.busy -= getattr(spent, "guest", 0.0) + getattr(spent, "guest_nice", 0.0)
        self.ours = cpu_seconds()
        elapsed = max(self.at - before[0], 1e-9)
        return max(0.0, (self.busy - before[1] - (self.ours - before[2])) / elapsed)


def run_part(part: str, size: float, others: Others) -> list[Summary] | None:
    """Return the rows of a part, or None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        others.cores()
        begin = time.monotonic()
        code = subprocess.run(
            [
                *(sys.executable, "-m", f"tests.benchmarks.{part}"),
                *("--size", str(size), "--json", str(found)),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "BATCHCTL_LOG__LEVEL": "error",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            },
            check=False,
        ).returncode
        took, load = time.monotonic() - begin, others.cores()
        if part in ESCAPING:
            time.sleep(_SAMPLE_SECONDS)
            load = others.cores()
        if code or not found.exists():
            print(f"{part}: failed", flush=True)
            return None
        rows: list[Summary] = json.loads(found.read_text())
    print(f"{part}: {took:.0f} s, others used {load:.2f} cores", flush=True)
    return [row | {"load": round(load, 2), "at": time.strftime("%Y-%m-%d")} for row in rows]


def verdict(row: Summary) -> str:
    """Return whether a row reached what it must, and what it is meant to."""
    if row["must"] is None and row["goal"] is None:
        return ""

    def is_met(bound: float) -> bool:
        median: float = row["median"]
        return median <= bound if row["less"] else median >= bound

    if row["must"] is not None and not is_met(row["must"]):
        return "MISSED"
    if row["goal"] is not None and not is_met(row["goal"]):
        return "must met" if row["must"] is not None else "goal missed"
    return "goal met"


def misses_goal(row: Summary) -> bool:
    """Return whether a row does not reach what it is meant to."""
    return verdict(row) not in {"", "goal met"}


def render(rows: list[Summary]) -> str:
    """Return the rows as a table for a terminal, and why some of them miss their goal."""
    table = [("", "what", "median", "range", "must", "goal", "", "load")]
    table += [
        (
            row["id"],
            row["what"],
            f"{row['median']:.4g}",
            f"{row['low']:.4g} to {row['high']:.4g}" if row["num_values"] > 1 else "",
            bound(row, "must"),
            bound(row, "goal"),
            verdict(row),
            f"{row['load']:.2f}",
        )
        for row in rows
    ]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]
    missed = explained([row for row in rows if misses_goal(row)])
    lines += ["", *(f"{names}: {reason}" for names, reason in missed)] if missed else []
    return "\n".join(lines)


def bound(row: Summary, name: str) -> str:
    """Return a bound as people write it."""
    if row[name] is None:
        return ""
    return f"{'≤' if row['less'] else '≥'} {row[name]:g}"


def order_of(row: Summary) -> tuple[int, int, str]:
    """Sort C2 before C10, then what is tuned, and peers last."""
    digits = "".join(letter for letter in row["id"].split(" ")[0] if letter.isdigit())
    return "CTP".index(row["id"][0]), int(digits or 0), row["id"]


def write(rows: list[Summary]) -> None:
    """Put rows into build/bench.json, in place of those of the same id."""
    kept = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else []
    ids = {row["id"] for row in rows}
    merged = [*(row for row in kept if row["id"] not in ids), *rows]
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(sorted(merged, key=order_of), indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Measure, print and write; end with 1 where a part failed or could not be reported."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted({name for rows in PARTS.values() for name in rows}, key=lambda n: (len(n), n))
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(names))
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--anyway", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(names):
        parser.error(f"there is no row {', '.join(sorted(unknown))}")
    wanted = set(arguments.rows) or set(names) - set(APART)
    anyway = arguments.anyway or os.environ.get("BENCH_ANYWAY") == "1"
    others = Others()
    others.cores()
    time.sleep(_SAMPLE_SECONDS)
    load = others.cores()
    average = os.getloadavg()[0]
    print(
        f"others use {load:.2f} of {os.cpu_count()} cores; load average {average:.1f}", flush=True
    )
    if load > LIMIT and not anyway:
        sys.exit(
            f"Not measured: others use more than {LIMIT} cores of this machine. Wait until it is "
            "quiet, or set BENCH_ANYWAY=1 to have figures that say under which load they came."
        )
    rows: list[Summary] = []
    failed = False
    for part, ids in PARTS.items():
        if not wanted & set(ids):
            continue
        if importlib.util.find_spec(f"tests.benchmarks.{part}") is None:
            print(f"{part}: not here", flush=True)
            continue
        found = run_part(part, arguments.size, others)
        failed |= found is None
        for row in found or ():
            if row["load"] > LIMIT and not (anyway or row["exact"]):
                print(f"{row['id']}: not reported, others used {row['load']} cores", flush=True)
                failed = True
            else:
                rows.append(row)
        if arguments.size == 1:
            write(rows)
    print(render(sorted(rows, key=order_of)))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
