import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.adjusting import Adjustment
from engine.hf.rows import begin_masks, choose
from engine.matching import Mask, Masks
from engine.running import BAD_LOGITS, NO_CHOICE, Row
from jobs.domain.request import SamplingParams

VOCABULARY = 2000


class OnlyThese:
    """A matcher that always allows the same tokens."""

    def __init__(self, *tokens: int) -> None:
        self._tokens = tokens

    def fill(self, row: Mask, address: int) -> None:
        assert row.ctypes.data == address
        row[:] = 0
        for token in self._tokens:
            row.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))

    def forced(self) -> Sequence[int]:
        return self._tokens if len(self._tokens) == 1 else ()

    def advance(self, token: int) -> bool:
        return token in self._tokens

    def is_accepting(self) -> bool:
        return True

    def is_finished(self) -> bool:
        return False


def logits_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def pick(logits: torch.Tensor, rows: list[Row], *, is_beside: bool = False) -> list[int]:
    masks = Masks(len(rows), (VOCABULARY + 31) // 32, is_beside=is_beside)
    begin_masks(rows, masks)
    chosen: list[int] = choose(logits.clone(), rows, masks).tolist()
    return chosen


def sampled(seed: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Row:
    return Row(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        rng=random.Random(seed),
    )


def test_greedy_rows_take_the_largest() -> None:
    logits = logits_of(4)
    assert pick(logits, [Row() for _ in range(4)]) == logits.argmax(dim=-1).tolist()


def test_a_top_k_of_the_whole_vocabulary_is_none() -> None:
    logits = logits_of(1)
    chosen = [
        [pick(logits, [sampled(seed, top_p=0.97, top_k=top_k)]) for seed in range(400)]
        for top_k in (0, VOCABULARY, 10**6)
    ]
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 40},
        {"top_p": 0.8, "top_k": 40},
        {"top_k": 1500},
        {"top_p": 0.999, "temperature": 2.0},
    ],
    ids=str,
)
def test_choice_depends_on_its_seed_and_not_on_its_neighbours(
    parameters: dict[str, float],
) -> None:
    logits = logits_of(5)
    alone = [pick(logits[2:3], [sampled(seed, **parameters)]) for seed in range(20)]  # type: ignore[arg-type]
    assert len({tuple(choice) for choice in alone}) > 1
    for seed in range(20):
        crowd = [
            Row(),
            sampled(99),
            sampled(seed, **parameters),  # type: ignore[arg-type]
            sampled(7, top_p=0.3),
            sampled(8, top_k=5, temperature=1.5),
        ]
        assert pick(logits, crowd)[2] == alone[seed][0]


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, :4] = probabilities.log()
    rows = [sampled(seed) for seed in range(8000)]
    chosen = torch.tensor(pick(logits.expand(len(rows), -1), rows))
    shares = torch.bincount(chosen, minlength=4) / len(rows)
    assert torch.allclose(shares, probabilities, atol=0.02)


@pytest.mark.parametrize(
    ("parameters", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.85}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.58}, {0, 1}),
        ({"top_k": 1}, {0}),
    ],
    ids=str,
)
def test_filters_keep_the_most_likely(parameters: dict[str, float], allowed: set[int]) -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    # Powers of 2, so that half is half to the last digit.
    logits[0, :6] = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32]).log()
    rows = [sampled(seed, **parameters) for seed in range(400)]  # type: ignore[arg-type]
    assert set(pick(logits.expand(len(rows), -1), rows)) == allowed


def test_constraint_rules_out_tokens_of_its_row_only() -> None:
    logits = logits_of(3)
    rows = [Row(), Row(matcher=OnlyThese(3, 1999)), sampled(1, top_p=0.9)]
    rows[2].matcher = OnlyThese(31, 32)
    chosen = pick(logits, rows)
    assert chosen[0] == int(logits[0].argmax())
    assert chosen[1] == (3 if logits[1, 3] > logits[1, 1999] else 1999)
    assert chosen[2] in (31, 32)


def test_rows_that_are_not_numbers_are_told_apart_from_the_rest() -> None:
    logits = logits_of(4)
    logits[1, 5] = torch.nan
    logits[2, 5] = torch.inf
    rows = [Row(), sampled(1), Row(), Row(matcher=OnlyThese())]
    chosen = pick(logits, rows)
    assert chosen[0] == int(logits[0].argmax())
    assert chosen[1:] == [BAD_LOGITS, BAD_LOGITS, NO_CHOICE]


@pytest.mark.parametrize("is_beside", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_token_that_has_to_come_is_taken_whatever_the_model_says(
    temperature: float,
    is_beside: bool,  # noqa: FBT001 -- a value of the table
) -> None:
    logits = logits_of(3)
    rows, alone = ([sampled(seed, temperature=temperature) for seed in range(3)] for _ in range(2))
    rows[1].matcher = OnlyThese(int(logits[1].argmin()))
    rows[1].num_logprobs = 1
    expected = pick(logits, alone)
    chosen = pick(logits, rows, is_beside=is_beside)
    assert chosen == [expected[0], int(logits[1].argmin()), expected[2]]
    (told,) = rows[1].told
    assert told.token == chosen[1]
    assert told.logprob == pytest.approx(float(logits[1].log_softmax(dim=-1).min()))


@pytest.mark.parametrize("is_beside", [False, True], ids=["at once", "beside"])
def test_token_that_has_to_come_but_is_ruled_out_leaves_no_choice(
    is_beside: bool,  # noqa: FBT001 -- a value of the table
) -> None:
    rows = [Row(matcher=OnlyThese(token), adjustment=ruling_out(7)) for token in (6, 7)]
    assert pick(logits_of(2), rows, is_beside=is_beside) == [6, NO_CHOICE]


def ruling_out(token: int) -> Adjustment:
    sampling = SamplingParams(bad_words=("x",))
    return Adjustment(sampling, prompt=[1], ends=(), bad_words=((token,),), vocab_size=VOCABULARY)
