"""Runs a piece of Python in a process of its own and says what it cost."""

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

# From VmHWM: what getrusage says of a child includes the process that it was forked from.
_REPORT = """
import json as _json, re as _re, time as _time
_status = open("/proc/self/status").read()
_peak = int(_re.search(r"VmHWM:\\s+(\\d+) kB", _status)[1]) * 1024
print(_json.dumps([told, _peak, _time.process_time()]))
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a program left in `told`, and what it took."""

    told: Any
    peak_bytes: int
    cpu_seconds: float


def run_measured(program: str, *arguments: str, seconds: float = 240) -> Cost:
    """Run `program`, which sets `told` to what it found out; its arguments are in sys.argv."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program) + _REPORT, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Cost(*json.loads(done.stdout.splitlines()[-1]))
