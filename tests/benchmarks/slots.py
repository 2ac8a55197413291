"""C8: how full an engine's slots are over a run of many shards whose answers have a long tail.

The simulated engine writes down how many of its slots made a token in each step. Tokens divided
by slots and steps is a count, and right on any machine that keeps the engine fed.
"""

import json
import math
import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.config import SimulatedConfig
from jobs.intake import PlanLimits
from tests.benchmarks import workloads
from tests.benchmarks.local import ARRIVAL, open_local
from tests.benchmarks.measuring import Row, main, scaled
from tests.benchmarks.workloads import CHAT

SLOTS = 256
SHARD_LINES = 1000
CAP = 16_384
ANSWERS = (20, 80, 320, 1280)
"""What answers to four system prompts take, more or less."""
_TEACH = 400


def templates(num_lines: int, *, seed: int) -> Iterator[bytes]:
    """Yield lines of four templates, mixed, that all allow answers of any length."""
    rng = random.Random(f"templates {seed}")
    for number in range(num_lines):
        kind = rng.randrange(len(ANSWERS))
        num_tokens = max(1, round(ANSWERS[kind] * math.exp(rng.gauss(0, 0.3))))
        body = {
            "model": "simulated",
            "messages": [
                {"role": "system", "content": f"Do as kind {kind} of request is done. " * 5},
                {"role": "user", "content": f"{number} [[tokens={num_tokens}]]"},
            ],
            "max_tokens": CAP,
            "temperature": 0,
        }
        line = {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body}
        yield json.dumps(line).encode()


def measure_learned(size: float) -> Row:
    num_lines = scaled(4 * SHARD_LINES, size, least=600)
    found: dict[bool, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for is_learned in (True, False):
            ledger = Path(folder) / f"ledger-{is_learned}"
            config = SimulatedConfig(
                slots=SLOTS, step_seconds=0.001, reply_tokens=CAP, ledger=str(ledger), reply="x"
            )
            limits = PlanLimits(by_template=is_learned)
            with open_local(config, model="simulated") as local:
                local.run(list(templates(_TEACH, seed=0)), limits=limits)
                taught_bytes = ledger.stat().st_size
                local.run(list(templates(num_lines, seed=1)), limits=limits)
            steps = struct.iter_unpack("<I", ledger.read_bytes()[taught_bytes:])
            found[is_learned] = _efficiency([tokens for (tokens,) in steps])
    return Row(
        id="C8 learned",
        what="slot efficiency where max_tokens says nothing, a second batch",
        values=[found[True]],
        must=None,
        goal=None,
        exact=True,
        note=f"four templates, {num_lines} requests after a batch of {_TEACH}, {SLOTS} slots, "
        f"simulated engine; nothing learned {found[False]:.3f}",
    )


def _efficiency(steps: list[int]) -> float:
    return sum(steps) / (SLOTS * len(steps))


def measure(size: float) -> list[Row]:
    num_lines = scaled(10 * SHARD_LINES, size, least=600)
    lines = list(workloads.heavy_tail(num_lines, model="simulated", cap=CAP))
    found: dict[bool, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for is_planned in (True, False):
            ledger = Path(folder) / f"ledger-{is_planned}"
            config = SimulatedConfig(
                slots=SLOTS, step_seconds=0.0005, reply_tokens=CAP, ledger=str(ledger), reply="x"
            )
            with open_local(config, model="simulated") as local:
                local.run(lines, limits=None if is_planned else ARRIVAL)
            steps = [tokens for (tokens,) in struct.iter_unpack("<I", ledger.read_bytes())]
            found[is_planned] = _efficiency(steps)
    return [
        Row(
            id="C8",
            what="slot efficiency: tokens ÷ (slots x steps)",
            values=[found[True]],
            must=0.93,
            goal=0.98,
            exact=True,
            note=f"W7, {num_lines} requests in {-(-num_lines // SHARD_LINES)} shards, {SLOTS} "
            f"slots, simulated engine; as they arrive {found[False]:.3f}",
        ),
        measure_learned(size),
    ]


if __name__ == "__main__":
    main(measure)
