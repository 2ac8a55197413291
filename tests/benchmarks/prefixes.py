"""C5 and C6: prompts that begin alike, in the order of the planner and as they arrive.

C5 counts: prompt tokens that were computed, over what a tree of all prompts has edges for; with
a cache for all groups and for two. C6 is tokens per second of processor time, planned over as
they arrive. Every run has its own texts, so that none finds the blocks of another.
"""

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from engine.chat import PromptEncoder
from engine.config import HfConfig
from engine.demo import model_path
from tests.benchmarks import workloads
from tests.benchmarks.local import ARRIVAL, Local, Spent, open_local, requests_of
from tests.benchmarks.measuring import Row, main, num_pairs_at, pairs_of, scaled

NUM_GROUPS = 8
LONGEST_SHARED, ANSWER = 1200, 16
SLOTS = 16
PAGE = 16
_SEEDS = 3


def make(num_lines: int, seed: int, *, is_planned: bool, share: float = 0.9) -> list[bytes]:
    """Return lines for one arm of a pair: as long as those of the other, and of other texts."""
    salt = 2 if is_planned else 1
    return list(
        workloads.shared_prefix(num_lines, seed=seed, salt=salt, share=share, num_groups=NUM_GROUPS)
    )


class Prompts:
    """The tokens of lines, as the engine sees them."""

    def __init__(self) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
        self._encoder = PromptEncoder(tokenizer, vocab_size=len(tokenizer))

    def encode(self, lines: Sequence[bytes]) -> list[list[int]]:
        return [self._encoder.encode(request) for request in requests_of(lines)]

    def minimum(self, lines: Sequence[bytes]) -> int:
        """Return the edges of a tree of all prompts: what has to be computed at least."""
        return workloads.least_tokens(self.encode(lines))


def blocks_for(num_groups: int) -> int:
    """Return the cache that so many of the longest beginnings fill, with what runs beside them."""
    shared = math.ceil(LONGEST_SHARED / PAGE)
    own = math.ceil((LONGEST_SHARED / 9 + ANSWER) / PAGE) + 1
    return num_groups * shared + SLOTS * own


def computed(spent: Spent) -> int:
    return spent.usage.prompt_tokens - spent.usage.cached_tokens


def open_demo(num_blocks: int) -> HfConfig:
    return HfConfig(
        model=str(model_path()),
        device="cpu",
        threads=1,
        slots=SLOTS,
        num_blocks=num_blocks,
        page_tokens=PAGE,
    )


def count(local: Local, prompts: Prompts, num_lines: int) -> tuple[list[float], list[float]]:
    """Return computed ÷ least, in the planner's order and as they arrive."""
    planned, arrived = [], []
    for seed in range(_SEEDS):
        lines = make(num_lines, seed, is_planned=True)
        others = make(num_lines, seed, is_planned=False)
        planned.append(computed(local.run(lines)) / prompts.minimum(lines))
        arrived.append(computed(local.run(others, limits=ARRIVAL)) / prompts.minimum(others))
    return planned, arrived


def measure(size: float) -> list[Row]:
    num_lines, num_pairs = scaled(128, size, least=24), num_pairs_at(5, size)
    prompts = Prompts()
    rows = []
    for num_groups, name, must, goal in (
        (NUM_GROUPS, "for all groups", 1.15, 1.05),
        (2, "for two groups", 1.4, 1.2),
    ):
        num_blocks = blocks_for(num_groups)
        note = (
            f"W3, {num_lines} prompts of {NUM_GROUPS} groups, 90 % shared, {num_blocks} blocks of "
            f"{PAGE} tokens, {SLOTS} slots"
        )
        with open_local(open_demo(num_blocks), model="demo") as local:
            planned, arrived = count(local, prompts, num_lines)
            row = Row(
                id=f"C5 {'all' if num_groups > 2 else 'two'}",
                what=f"prompt tokens computed ÷ least possible, cache {name}",
                values=planned,
                must=must,
                goal=goal,
                less=True,
                exact=True,
                note=f"{note}; as they arrive {min(arrived):.2f} to {max(arrived):.2f}",
            )
            rows.append(row)
            if num_groups == 2:
                rows += compare(local, num_lines, num_pairs, note)
    return rows


def compare(local: Local, num_lines: int, num_pairs: int, note: str) -> list[Row]:
    """Return C6, on an engine whose cache holds two groups."""
    rows = []
    for share, must, goal, name in (
        (0.9, 1.15, 1.5, "90 % shared, cache for two groups"),
        (0.0, 0.99, 0.995, "nothing shared"),
    ):

        def arm(seed: int, *, is_planned: bool, share: float = share) -> Spent:
            lines = make(num_lines, 100 + seed, is_planned=is_planned, share=share)
            return local.run(lines, limits=None if is_planned else ARRIVAL)

        pairs = pairs_of(
            lambda seed, arm=arm: arm(seed, is_planned=True),  # type: ignore[misc]  # bound early
            lambda seed, arm=arm: arm(seed, is_planned=False),  # type: ignore[misc]
            num_pairs=num_pairs,
        )
        values = [_speed(planned) / _speed(arrived) for planned, arrived in pairs]
        rows.append(
            Row(
                id="C6 shared" if share else "C6 nothing",
                what=f"planned ÷ as they arrive, {name}",
                values=values,
                must=must,
                goal=goal,
                note=f"{note if share else note.replace('90 %', 'nothing')}; tokens of prompts and "
                "answers per second of processor time",
            )
        )
    return rows


def _speed(spent: Spent) -> float:
    return (spent.usage.prompt_tokens + spent.usage.completion_tokens) / spent.cpu


if __name__ == "__main__":
    main(measure)
