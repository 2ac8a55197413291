"""C8: how full an engine's slots are over a run of many shards whose answers have a long tail.

The simulated engine writes down how many of its slots made a token in each step. Tokens divided
by slots and steps is a count, and right on any machine that keeps the engine fed.
"""

import struct
import tempfile
from pathlib import Path

from engine.config import SimulatedConfig
from tests.benchmarks import workloads
from tests.benchmarks.local import ARRIVAL, open_local
from tests.benchmarks.measuring import Row, main, scaled

SLOTS = 256
SHARD_LINES = 1000
CAP = 16_384


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
            found[is_planned] = sum(steps) / (SLOTS * len(steps))
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
        )
    ]


if __name__ == "__main__":
    main(measure)
