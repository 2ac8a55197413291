"""Chooses the next token of every row of logits: constraint, temperature, top-k, top-p, seed.

A row's choice depends on that row alone: its logits, its parameters and its own random numbers.
It is drawn as the hf engine draws it, so the same logits and the same seed give the same token.
"""

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.answers import Told
from engine.matching import Mask
from engine.running import BAD_LOGITS, NO_CHOICE, Row

Logits = npt.NDArray[np.float32]

_SHORTLIST = 1024
"""Rows with top-k or top-p look at so many tokens first: a full sort is dearer."""


def choose(logits: Logits, rows: Sequence[Row], mask: Mask) -> list[int]:
    """Return the chosen token of each row.

    A row without anything to choose by gets `BAD_LOGITS` or `NO_CHOICE`.

    Args:
        logits: [len(rows), vocabulary]; may be overwritten.
        rows: who chooses, in the order of `logits`.
        mask: scratch space of one row of 32-bit words, one bit per token.
    """
    address = int(mask.ctypes.data)
    known = {
        place: _log_softmax(logits[place])
        for place, row in enumerate(rows)
        if row.num_logprobs is not None
    }
    for given, row in zip(logits, rows, strict=True):
        if row.adjustment is not None:
            row.adjustment.apply(given)
        if row.matcher is not None:
            row.matcher.fill(mask, address)
            bits = np.unpackbits(mask.view(np.uint8), count=len(given), bitorder="little")
            given[bits == 0] = -np.inf
    chosen = logits.argmax(axis=1)
    best = logits[np.arange(len(rows)), chosen]  # argmax finds a NaN wherever there is one
    found: list[int] = []
    for given, row, likeliest, largest in zip(logits, rows, chosen, best, strict=True):
        if np.isneginf(largest):
            found.append(NO_CHOICE)
        elif not np.isfinite(largest):
            found.append(BAD_LOGITS)
        elif row.temperature > 0 and row.top_k != 1:
            found.append(_draw(given, largest, row))
        else:
            found.append(int(likeliest))
    for place, logprobs in known.items():
        _tell(rows[place], logprobs, found[place])
    return found


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    logprobs: Logits = shifted - np.log(np.exp(shifted).sum(dtype=np.float64)).astype(np.float32)
    return logprobs


def _tell(row: Row, logprobs: Logits, token: int) -> None:
    """Note how likely the chosen token was, and which ones were likelier."""
    most = min(row.num_logprobs or 0, len(logprobs))
    places = np.argpartition(-logprobs, most - 1)[:most] if most else np.empty(0, dtype=np.int64)
    places = places[np.lexsort((places, -logprobs[places]))]
    likeliest = list(zip(places.tolist(), logprobs[places].tolist(), strict=True))
    row.told.append(Told(token, float(logprobs[token]) if token >= 0 else 0.0, likeliest))


def _draw(logits: Logits, largest: np.float32, row: Row) -> int:
    drawn = random.random() if row.rng is None else row.rng.random()  # noqa: S311 -- no secret
    # exp((logit - largest) / T): not normalized; the draw is scaled instead.
    weights = np.exp((logits - largest) / np.float32(row.temperature))
    if row.min_p:
        weights[weights < row.min_p] = 0  # the largest is 1
    if row.top_k <= 0 and row.top_p >= 1:
        return _invert(weights, drawn)
    return _draw_filtered(weights, drawn, row)


def _invert(weights: Logits, drawn: float) -> int:
    """Return the first place at which the weights add up to their share `drawn`."""
    sums = weights.cumsum(dtype=np.float64)
    place = int(sums.searchsorted(drawn * sums[-1], side="right"))
    # Rounding may leave the target past the last weight; step back onto one that is not 0.
    return min(place, int(sums.searchsorted(sums[-1], side="left")))


def _draw_filtered(weights: Logits, drawn: float, row: Row) -> int:
    """Return the token drawn within the row's top-k and then its top-p of what top-k left."""
    vocab_size = len(weights)
    shortlist = min(_SHORTLIST, vocab_size)
    limit = row.top_k if 0 < row.top_k < vocab_size else vocab_size
    total = weights.sum(dtype=np.float64)
    places = np.argpartition(weights, vocab_size - shortlist)[vocab_size - shortlist :]
    share = weights[places].sum(dtype=np.float64) / total
    if limit > shortlist and not (row.top_p < 1 and limit == vocab_size and share >= row.top_p):
        places = np.arange(vocab_size)
    # Equal weights keep the order of their tokens.
    places = places[np.lexsort((places, -weights[places]))]
    sums = weights[places].cumsum(dtype=np.float64)
    last = min(limit, len(places)) - 1
    # Without a top-k the share is of the whole vocabulary, of which `places` may be a part.
    kept = total if limit > len(places) else sums[last]
    last = min(last, int(sums.searchsorted(kept * row.top_p, side="left")))
    place = int(sums.searchsorted(drawn * sums[last], side="right"))
    return int(places[min(place, last)])
