"""What a row of the suite is, and what its figures are made of.

Each part of the suite is a module with a function `measure(size)` that returns rows; size 1 is
what `make bench` runs, and a hundredth of it shows in a minute whether the part works.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from jobs.telemetry import configure_logging

ROOT = Path(__file__).resolve().parents[2]
First = TypeVar("First")
Second = TypeVar("Second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure, measured several times.

    Attributes:
        must: what it has to reach; None: it is only reported.
        goal: what it is meant to reach.
        less: whether less is better.
        exact: counted, so that a loaded machine does not change it.
        note: how it was measured, for whoever reads the figure.
    """

    id: str
    what: str
    values: Sequence[float]
    must: float | None
    goal: float | None
    unit: str = "ratio"
    less: bool = False
    exact: bool = False
    note: str = ""

    def summary(self) -> dict[str, Any]:
        found = asdict(self)
        values = found.pop("values")
        return found | {
            "median": round(statistics.median(values), 4),
            "low": round(min(values), 4),
            "high": round(max(values), 4),
            "num_values": len(values),
        }


def cpu_seconds(pids: Iterable[int] | None = None) -> float:
    """Return what processes have used, user and system, with their descendants, ended ones too.

    Args:
        pids: these processes; None: this one.
    """
    found: set[psutil.Process] = set()
    for pid in pids if pids is not None else (psutil.Process().pid,):
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found |= {root, *root.children(recursive=True)}
    spent = 0.0
    for one in found:
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            # Those of children that have ended and were waited for are their parent's.
            spent += times.user + times.system + times.children_user + times.children_system
    return spent


def pairs_of(
    first: Callable[[int], First], second: Callable[[int], Second], *, num_pairs: int
) -> list[tuple[First, Second]]:
    """Return what both arms measured, in turns A B, B A, A B: neither always goes second."""
    found: list[tuple[First, Second]] = []
    for pair in range(num_pairs):
        if pair % 2:
            late = second(pair)
            found.append((first(pair), late))
        else:
            early = first(pair)
            found.append((early, second(pair)))
    return found


def scaled(number: float, size: float, *, least: int = 1) -> int:
    """Return a count for a run of this size."""
    return max(least, round(number * size))


def num_pairs_at(number: int, size: float) -> int:
    """Return how many pairs to take: all at full size, one at a small one."""
    return number if size >= 1 else 1


def main(measure: Callable[[float], list[Row]]) -> None:
    """Run a part by itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    configure_logging(level="ERROR")
    rows = [row.summary() for row in measure(arguments.size)]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))
    else:
        print(json.dumps(rows, indent=2))
