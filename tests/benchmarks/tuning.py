"""T1: the hf engine with its slots left open, against the best of a few numbers set by hand.

Each run has an engine of its own, so what tuning costs is in it; loading is not. One torch thread,
bfloat16, greedy answers of exact length; processor time of the process. The hand-set number that
it is held against is the one whose runs were quickest by their median.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import HfConfig
from engine.demo import model_path
from engine.hf.engine import HfEngine
from engine.tuning import render_tuning
from jobs.domain.request import Request
from tests.benchmarks import workloads
from tests.benchmarks.hf import make_random_model
from tests.benchmarks.local import requests_of
from tests.benchmarks.measuring import Row, main, num_pairs_at, scaled
from tests.sources import ListSource

BY_HAND = (32, 64, 128)


def run(folder: Path, requests: Sequence[Request], slots: int | None) -> tuple[float, str]:
    """Return tokens per second of processor time, and what the engine worked with in the end."""
    engine = HfEngine(HfConfig(model=str(folder), device="cpu", slots=slots))
    list(engine.generate(ListSource(requests[:2])))
    start = time.process_time()
    tokens = sum(r.usage.completion_tokens for r in engine.generate(ListSource(requests)))
    spent = time.process_time() - start
    ended = render_tuning(engine.tuning)
    engine.close()
    return tokens / spent, ended


def tuned(
    folder: Path,
    name: str,
    *,
    num_requests: int,
    shrink: float,
    num_rounds: int,
) -> Row:
    """Return T1 for one model."""
    requests = requests_of(list(workloads.chat(num_requests, shrink=shrink)))
    arms: list[int | None] = [None, *BY_HAND]
    speeds: dict[int | None, list[float]] = {arm: [] for arm in arms}
    ended = ""
    for number in range(num_rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            speed, chosen = run(folder, requests, arm)
            speeds[arm].append(speed)
            ended = chosen if arm is None else ended
    medians = {arm: statistics.median(speeds[arm]) for arm in BY_HAND}
    best = max(BY_HAND, key=lambda arm: medians[arm])
    listed = ", ".join(f"{arm}: {medians[arm]:.0f}" for arm in BY_HAND)
    return Row(
        id=f"T1 {name}",
        what=f"slots left open ÷ the best set by hand, {name}",
        values=[a / b for a, b in zip(speeds[None], speeds[best], strict=True)],
        must=0.95,
        goal=1.0,
        note=f"W1 x {shrink}, {num_requests} requests; tokens per second of processor time left "
        f"open: {statistics.median(speeds[None]):.0f}, by slots: {listed}; ended with {ended}",
    )


def measure(size: float) -> list[Row]:
    torch.set_num_threads(1)
    rows = [
        tuned(
            model_path(),
            "demo model",
            num_requests=scaled(256, size, least=8),
            shrink=0.3,
            num_rounds=num_pairs_at(3, size),
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_random_model(Path(folder))
        rows.append(
            tuned(
                Path(folder),
                "100M parameters",
                num_requests=scaled(96, size, least=4),
                shrink=0.2,
                num_rounds=num_pairs_at(2, size),
            )
        )
    return rows


if __name__ == "__main__":
    main(measure)
