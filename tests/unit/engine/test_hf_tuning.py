"""The hf engine with slots and token budget left open, by clocks that are ours."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import HfConfig
from engine.hf.engine import HfEngine
from jobs.domain.request import Request, SamplingParams
from jobs.domain.result import Result
from tests.unit.engine.test_hf_engine import Ask, prompts

TOKENS = 48
_BLOCKS = 64 * (512 // 16)
"""A cache too small to begin with all slots, and large enough for what comes."""


class Watched:
    """An engine of which it is known how many sequences each step had."""

    def __init__(self, folder: Path, clock: Callable[[], float] | None, **changes: Any) -> None:  # noqa: ANN401
        settings = {
            "model": str(folder),
            "device": "cpu",
            "compute_dtype": "float32",
            "page_tokens": 16,
            **changes,
        }
        self.engine = HfEngine(HfConfig.model_validate(settings))
        stepper: Any = self.engine._stepper  # noqa: SLF001
        if clock is not None:
            stepper._clock = clock  # noqa: SLF001
        self.widths: list[int] = []
        self._prepare = stepper.prepare
        stepper.prepare = self._noting

    def _noting(self) -> list[str] | None:
        keys: list[str] | None = self._prepare()
        if keys is not None:
            self.widths.append(len(keys))
        return keys


def steady() -> Callable[[], float]:
    """Return a clock by which each step takes as long as any other."""
    return itertools.count().__next__


def requests(number: int, *, length: int = 24) -> list[Request]:
    return [
        Request(
            id=i,
            prompt=prompt,
            sampling=SamplingParams(temperature=0, max_tokens=TOKENS + i % 7, ignore_eos=True),
        )
        for i, prompt in enumerate(prompts(*(length + i % 9 for i in range(number))))
    ]


def texts(results: dict[int, Result]) -> dict[int, str]:
    return {i: result.text for i, result in results.items()}


@pytest.mark.timeout(240)
def test_more_sequences_run_where_a_step_costs_the_same_and_no_answer_changes(
    tiny_model: Path, ask: Ask
) -> None:
    asked = requests(240)
    tuned = Watched(tiny_model, steady(), num_blocks=_BLOCKS)
    begun = tuned.engine.tuning
    assert (begun.slots, begun.max_slots, begun.slots_by) == (64, 128, "memory")
    assert tuned.engine.num_slots == tuned.engine.capabilities.num_slots == 128
    answers = ask(tuned.engine, asked)
    ended = tuned.engine.tuning
    assert (ended.slots, ended.slots_by) == (128, "steps")
    assert ended.num_comparisons >= 12
    assert max(tuned.widths) == 128
    # Comparisons came between: a whole step, then each half of it.
    assert [64, 32, 32] in [tuned.widths[i : i + 3] for i in range(len(tuned.widths))]
    few = Watched(tiny_model, None, slots=12, batch_tokens=64)
    assert texts(answers) == texts(ask(few.engine, asked))


def test_fewer_sequences_run_where_each_costs_the_same(tiny_model: Path, ask: Ask) -> None:
    watched = Watched(tiny_model, None)
    spent = 0.0

    def clock() -> float:
        nonlocal spent
        spent += watched.widths[-1] if watched.widths else 0
        return spent

    # By this clock a step takes as long as it has sequences.
    watched = Watched(tiny_model, clock, num_blocks=_BLOCKS)
    ask(watched.engine, requests(240))
    ended = watched.engine.tuning
    assert (ended.slots, ended.slots_by) == (16, "steps")
    # It fell as sequences ended: none was put back for it.
    assert ended.num_evictions == 0
    assert max(watched.widths[:200]) == 64
    assert max(watched.widths[-40:]) <= 16


def test_slots_and_budget_that_are_set_hold(tiny_model: Path, ask: Ask) -> None:
    watched = Watched(tiny_model, steady(), slots=6, batch_tokens=40)
    ask(watched.engine, requests(60))
    report = watched.engine.tuning
    assert (report.slots, report.max_slots, report.slots_by) == (6, 6, "asked")
    assert (report.batch_tokens, report.batch_tokens_by) == (40, "asked")
    assert report.num_comparisons == 0
    assert max(watched.widths) == 6


def test_without_tuning_steps_change_nothing(tiny_model: Path, ask: Ask) -> None:
    watched = Watched(tiny_model, steady(), tune=False)
    ask(watched.engine, requests(140))
    assert watched.engine.tuning.slots == max(watched.widths) == 128
    assert watched.engine.tuning.num_comparisons == 0


def test_a_cache_that_runs_over_lowers_the_number_and_loses_nothing(
    tiny_model: Path, ask: Ask
) -> None:
    asked = requests(60, length=90)
    # 72 blocks of 16 tokens hold seven sequences of 150; nine are tried.
    tuned = Watched(tiny_model, steady(), num_blocks=72)
    assert tuned.engine.tuning.cache_tokens_by == "asked"
    answers = ask(tuned.engine, asked)
    report = tuned.engine.tuning
    assert report.num_evictions > 0
    assert (report.slots_by, report.slots < report.max_slots) == ("evictions", True)
    assert texts(answers) == texts(ask(Watched(tiny_model, None, slots=3).engine, asked))


def test_a_budget_too_small_for_the_prompts_is_raised(tiny_model: Path, ask: Ask) -> None:
    short = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    asked = [
        Request(id=i, prompt=p, sampling=short)
        for i, p in enumerate(prompts(*(300 + i for i in range(120))))
    ]
    watched = Watched(tiny_model, steady())
    assert watched.engine.tuning.batch_tokens == 512
    ask(watched.engine, asked)
    report = watched.engine.tuning
    assert (report.batch_tokens, report.batch_tokens_by) == (1024, "steps")
