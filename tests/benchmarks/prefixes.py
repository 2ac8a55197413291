"""C5 and C6: prompts that begin alike, in the order of the planner and as they arrive.

C5 counts: prompt tokens that were computed, over what a tree of all prompts has edges for; with
a cache for all groups and for two. C6 is tokens per second of processor time, planned over as
they arrive. Every run has its own texts, so that none finds the blocks of another. "C6 control"
puts what arrives beside itself: how far from 1 the method alone gets.
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


ARRIVED, PLANNED, AGAIN = 1, 2, 3
"""Arms, by the salt of their texts."""
_WHAT = "planned ÷ as they arrive"
_UNIT = "tokens of prompts and answers per second of processor"


def make(num_lines: int, seed: int, *, salt: int, share: float = 0.9) -> list[bytes]:
    """Return lines for one arm of a pair: as long as those of the other, and of other texts."""
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
        lines = make(num_lines, seed, salt=PLANNED)
        others = make(num_lines, seed, salt=ARRIVED)
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
                rows += compare_nothing(local, size, num_blocks)
    return rows


def run_arm(local: Local, num_lines: int, *, salt: int, seed: int, share: float) -> Spent:
    """Run lines on an engine whose cache holds two groups, planned if the salt says so."""
    lines = make(num_lines, 100 + seed, salt=salt, share=share)
    return local.run(lines, limits=None if salt == PLANNED else ARRIVAL)


def compare(local: Local, num_lines: int, num_pairs: int, note: str) -> list[Row]:
    """Return C6, on an engine whose cache holds two groups."""
    pairs = pairs_of(
        lambda seed: run_arm(local, num_lines, salt=PLANNED, seed=seed, share=0.9),
        lambda seed: run_arm(local, num_lines, salt=ARRIVED, seed=seed, share=0.9),
        num_pairs=num_pairs,
    )
    return [
        Row(
            id="C6 shared",
            what=f"{_WHAT}, 90 % shared, cache for two groups",
            values=[_speed(one) / _speed(other) for one, other in pairs],
            must=1.15,
            goal=1.5,
            note=f"{note}; {_UNIT} time",
        )
    ]


def compare_nothing(local: Local, size: float, num_blocks: int) -> list[Row]:
    """Return C6 where there is nothing to plan, with what two equal arms differ by beside it.

    Many short rounds: a figure this close to 1 is lost in how fast the machine is from one half
    minute to the next.
    """
    num_lines, rounds = scaled(48, size, least=9), list[dict[int, Spent]]()
    order = (PLANNED, ARRIVED, AGAIN)
    for seed in range(num_pairs_at(18, size)):
        turned = (*order[seed % 3 :], *order[: seed % 3])
        rounds.append(
            {salt: run_arm(local, num_lines, salt=salt, seed=seed, share=0.0) for salt in turned}
        )
    planned, arrived = (sum(computed(one[salt]) for one in rounds) for salt in (PLANNED, ARRIVED))
    note = (
        f"W3, {num_lines} prompts, nothing shared, {num_blocks} blocks of {PAGE} tokens, {SLOTS} "
        f"slots; {len(rounds)} rounds, {_UNIT} time, three arms that take turns at being first; "
        f"prompt tokens computed {planned} planned, {arrived} as they arrive"
    )
    return [
        Row(
            id=id_,
            what=name,
            values=[_speed(one[first]) / _speed(one[ARRIVED]) for one in rounds],
            must=must,
            goal=goal,
            note=note,
        )
        for id_, first, must, goal, name in (
            ("C6 nothing", PLANNED, 0.99, 0.995, f"{_WHAT}, nothing shared"),
            ("C6 control", AGAIN, None, None, "as they arrive ÷ as they arrive, nothing shared"),
        )
    ]


def _speed(spent: Spent) -> float:
    return (spent.usage.prompt_tokens + spent.usage.completion_tokens) / spent.cpu


if __name__ == "__main__":
    main(measure)
