"""Q: what a token costs with quantized weights, against bf16, by how many are decoded at once.

The Hugging Face engine on a random model of about 100 million parameters; greedy answers of exact
length behind short prompts. One torch thread; processor time of the process, in interleaved pairs.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.config import HfConfig, HfQuantization
from engine.hf.engine import HfEngine
from engine.registry import quantize_model
from jobs.domain.request import Request, SamplingParams
from tests.benchmarks.hf import make_random_model
from tests.benchmarks.measuring import Row, main, num_pairs_at, pairs_of, scaled
from tests.sources import ListSource

KINDS: tuple[HfQuantization, ...] = ("nf4", "fp4", "int8")
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 8


@contextmanager
def opened(folder: Path) -> Iterator[HfEngine]:
    engine = HfEngine(
        HfConfig(model=str(folder), device="cpu", slots=max(BATCHES), num_blocks=256, tune=False)
    )
    try:
        yield engine
    finally:
        engine.close()


def requests(num: int, num_tokens: int) -> list[Request]:
    return [
        Request(
            id=i,
            prompt=tuple(10 + (7 * i + n) % 500 for n in range(PROMPT_TOKENS)),
            sampling=SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True),
        )
        for i in range(num)
    ]


def cost(engine: HfEngine, asked: Sequence[Request]) -> float:
    """Return the processor time of each token, in milliseconds."""
    start = time.process_time()
    results = list(engine.generate(ListSource(asked)))
    spent = time.process_time() - start
    return 1000 * spent / sum(one.usage.completion_tokens for one in results)


def compare(kind: str, plain: HfEngine, small: HfEngine, size: float) -> Iterator[Row]:
    cost(small, requests(2, 4))  # weights are repacked in the first step
    for num in BATCHES:
        asked = requests(num, scaled(24 if num == 1 else 8, size, least=2))
        pairs = pairs_of(
            lambda _, asked=asked: cost(plain, asked),  # type: ignore[misc]
            lambda _, asked=asked: cost(small, asked),  # type: ignore[misc]
            num_pairs=num_pairs_at(3, size),
        )
        costs = [statistics.median(arm) for arm in zip(*pairs, strict=True)]
        yield Row(
            id=f"Q {kind} {num}",
            what=f"tokens of {kind} ÷ tokens of bf16 in the same time, {num} at once",
            values=[before / after for before, after in pairs],
            must=None,
            goal=None,
            note=f"a token takes {costs[1]:.1f} ms of processor time, {costs[0]:.1f} ms in bf16; "
            "prompts count",
        )


def measure(size: float) -> list[Row]:
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "plain"
        make_random_model(folder)
        with opened(folder) as plain:
            cost(plain, requests(2, 4))
            for kind in KINDS:
                config = HfConfig(model=str(folder), device="cpu", quantization=kind)
                made = quantize_model(config, Path(name) / kind, told=lambda _: None)
                rows.append(
                    Row(
                        id=f"Q {kind} stored",
                        what=f"bytes of {kind} weights ÷ bytes of bf16 weights on disk",
                        values=[made.stored_bytes / made.source_bytes],
                        must=None,
                        goal=None,
                        less=True,
                        exact=True,
                        note=f"{made.stored_bytes:,} and {made.source_bytes:,} bytes",
                    )
                )
                with opened(Path(made.folder)) as small:
                    rows += compare(kind, plain, small, size)
    return rows


if __name__ == "__main__":
    main(measure)
