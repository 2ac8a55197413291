"""What one row of logits becomes, whatever the others are; the same as on the hf engine."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from typing_extensions import override

from engine.hf import rows as theirs
from engine.llamacpp import rows
from engine.matching import Mask, Masks
from engine.running import BAD_LOGITS, NO_CHOICE, Row

VOCABULARY = 3000


class Even:
    """A constraint that allows every second token."""

    def fill(self, row: Mask, address: int) -> None:
        del address
        row[:] = 0x55555555

    def forced(self) -> Sequence[int]:
        return ()

    def advance(self, token: int) -> bool:
        return token % 2 == 0

    def is_accepting(self) -> bool:
        return True

    def is_finished(self) -> bool:
        return False


class Nothing(Even):
    """A constraint that allows no token."""

    @override
    def fill(self, row: Mask, address: int) -> None:
        del address
        row[:] = 0


NUM_WORDS = (VOCABULARY + 31) // 32


def scratch() -> Mask:
    return np.full(NUM_WORDS, -1, dtype=np.int32)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (40, 1.0), (2000, 1.0), (0, 0.3), (0, 0.999999), (50, 0.5)]
)
def test_row_is_drawn_as_on_the_hf_engine(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(0)
    for scale in (0.5, 6.0):
        logits = (rng.normal(size=(32, VOCABULARY)) * scale).astype(np.float32)
        how = {"temperature": 0.9, "top_k": top_k, "top_p": top_p}
        held = [Even() if n % 4 == 0 else None for n in range(32)]
        ours = [Row(**how, rng=random.Random(n), matcher=held[n]) for n in range(32)]  # type: ignore[arg-type]
        other = [Row(**how, rng=random.Random(n), matcher=held[n]) for n in range(32)]  # type: ignore[arg-type]
        masks = Masks(32, NUM_WORDS)
        theirs.begin_masks(other, masks)
        expected = theirs.choose(torch.from_numpy(logits.copy()), other, masks).tolist()
        assert rows.choose(logits.copy(), ours, scratch()) == expected
        assert all(token % 2 == 0 for token in expected[::4])


def test_row_without_a_choice_says_so_and_leaves_the_others_alone() -> None:
    logits = np.zeros((4, VOCABULARY), dtype=np.float32)
    logits[:, 7] = 1
    logits[1, 5] = np.nan
    logits[2, 5] = np.inf
    found = rows.choose(
        logits,
        [Row(), Row(temperature=1.0), Row(), Row(matcher=Nothing())],
        scratch(),
    )
    assert found == [7, BAD_LOGITS, BAD_LOGITS, NO_CHOICE]
