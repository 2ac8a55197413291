"""Chooses the next token of every row of logits: constraint, temperature, top-k, top-p, seed.

A row's choice depends on that row alone: its logits, its parameters and its own random numbers.
So a seed gives the same answer whoever else is in the batch.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from engine.answers import Told
from engine.matching import Mask, Masks
from engine.running import BAD_LOGITS, NO_CHOICE, Row

_SHORTLIST = 1024
"""Rows with top-k or top-p look at so many tokens first: a full sort is 20 times dearer."""


def begin_masks(rows: Sequence[Row], masks: Masks) -> None:
    """Begin to fill the masks of a step, which `choose` needs in the end."""
    masks.begin([row.matcher for row in rows if row.matcher is not None])


def choose(logits: torch.Tensor, rows: Sequence[Row], masks: Masks) -> torch.Tensor:
    """Return the chosen token of each row, as int64 on the device of `logits`.

    A row without anything to choose by gets `BAD_LOGITS` or `NO_CHOICE`.

    Args:
        logits: [len(rows), vocabulary]; may be overwritten.
        rows: who chooses, in the order of `logits`.
        masks: those that `begin_masks` began to fill for the same rows.
    """
    asked = [i for i, row in enumerate(rows) if row.num_logprobs is not None]
    # Of the model's own logits, whatever the request does to them.
    known = logits[asked].log_softmax(dim=-1) if asked else None
    for i, row in enumerate(rows):
        if row.adjustment is not None:
            row.adjustment.apply(logits[i])
    constrained = [i for i, row in enumerate(rows) if row.matcher is not None]
    allowed = masks.take()
    if allowed.open:
        logits = _constrain(
            logits, len(rows), [constrained[at] for at in allowed.open], allowed.words
        )
    best, chosen = logits.max(dim=-1)
    sampled = [i for i, row in enumerate(rows) if row.temperature > 0 and row.top_k != 1]
    if sampled:
        everyone = len(sampled) == len(rows)
        at = torch.tensor(sampled, device=logits.device)
        picked = _sample(
            logits if everyone else logits[at],
            best if everyone else best[at],
            [rows[i] for i in sampled],
        )
        chosen = picked if everyone else chosen.index_copy(0, at, picked)
    if allowed.known:
        fixed = {constrained[place]: token for place, token in allowed.known.items()}
        chosen = chosen.index_copy(
            0,
            torch.tensor(list(fixed), device=logits.device),
            torch.tensor(list(fixed.values()), device=logits.device),
        )
        for i, token in fixed.items():
            if rows[i].adjustment is not None and torch.isneginf(logits[i, token]):
                best[i] = -torch.inf  # it is what the request rules out
    if known is not None:
        _tell(known, chosen[asked], [rows[i] for i in asked])
    # The largest of a row that holds a NaN is NaN; of a row without any choice it is -inf.
    return chosen.masked_fill_(~torch.isfinite(best), BAD_LOGITS).masked_fill_(
        torch.isneginf(best), NO_CHOICE
    )


def _tell(known: torch.Tensor, chosen: torch.Tensor, rows: list[Row]) -> None:
    """Note for each row how likely the chosen token was, and which ones were likelier."""
    most = max(row.num_logprobs or 0 for row in rows)
    own = known.gather(1, chosen.unsqueeze(-1)).squeeze(-1).tolist()
    values, tokens = known.topk(min(most, known.shape[1]), dim=-1)
    likeliest = [
        list(zip(some, logs, strict=True))
        for some, logs in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
    for row, token, logprob, others in zip(rows, chosen.tolist(), own, likeliest, strict=True):
        row.told.append(Told(token, logprob, others[: row.num_logprobs or 0]))


def skip(row: Row) -> None:
    """Pass over a token that was known: the next ones are drawn as if it had been chosen."""
    if row.rng is not None:
        row.rng.random()


def _constrain(
    logits: torch.Tensor, num_rows: int, constrained: list[int], words: Mask
) -> torch.Tensor:
    if logits.device.type == "cpu":
        # Turned over while it is short: what is unpacked is then the answer, byte for byte.
        bits = np.unpackbits(np.invert(words).view(np.uint8), axis=1, bitorder="little")
        forbidden = torch.from_numpy(bits[:, : logits.shape[1]]).view(torch.bool)
    else:
        packed = torch.from_numpy(words).to(logits.device, non_blocking=True)
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        spread = (packed.unsqueeze(-1) >> shifts) & 1
        forbidden = spread.flatten(1)[:, : logits.shape[1]] == 0
    if forbidden.shape[1] < logits.shape[1]:
        # Rows of the embedding that no token stands for.
        forbidden = torch.nn.functional.pad(
            forbidden, (0, logits.shape[1] - forbidden.shape[1]), value=True
        )
    if len(constrained) == num_rows:
        return logits.masked_fill_(forbidden, -torch.inf)
    at = torch.tensor(constrained, device=logits.device)
    return logits.index_copy_(0, at, logits[at].masked_fill_(forbidden, -torch.inf))


def _draw(row: Row) -> float:
    if row.drawn is None:
        row.drawn = random.random() if row.rng is None else row.rng.random()  # noqa: S311
    return row.drawn


def _exact(device: torch.device) -> torch.dtype:
    """Return what to add probabilities up in: 150,000 of them lose digits in float32."""
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def _sample(logits: torch.Tensor, best: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    device = logits.device
    temperatures = torch.tensor([row.temperature for row in rows], device=device)
    drawn = torch.tensor(
        [_draw(row) for row in rows],
        device=device,
        dtype=_exact(device),
    )
    # exp((logit - best) / T): not normalized; the draw is scaled instead. As a power of 2, which
    # has no slow way through -inf: a constraint leaves that nearly everywhere.
    scales = temperatures.unsqueeze_(-1).mul_(math.log(2))
    weights = (logits - best.unsqueeze(-1)).div_(scales).exp2_()
    if any(row.min_p for row in rows):
        # The largest weight is 1, so that the share of it is the weight itself.
        least = torch.tensor([row.min_p for row in rows], device=device)
        weights = weights.masked_fill_(weights < least.unsqueeze(-1), 0)
    filtered = [i for i, row in enumerate(rows) if row.top_k > 0 or row.top_p < 1]
    if not filtered:
        return _invert(weights, drawn)
    if len(filtered) == len(rows):
        return _sample_filtered(weights, drawn, rows)
    plain = [i for i in range(len(rows)) if i not in set(filtered)]
    chosen = torch.empty(len(rows), dtype=torch.int64, device=device)
    chosen[plain] = _invert(weights[plain], drawn[plain])
    chosen[filtered] = _sample_filtered(
        weights[filtered], drawn[filtered], [rows[i] for i in filtered]
    )
    return chosen


def _invert(weights: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Return for each row the first place at which its weights add up to its share `drawn`."""
    sums = weights.cumsum(dim=-1, dtype=_exact(weights.device))
    targets = (drawn * sums[:, -1]).unsqueeze(-1)
    places = torch.searchsorted(sums, targets, right=True).squeeze(-1)
    # Rounding may leave the target past the last weight; step back onto one that is not 0.
    return torch.minimum(places, (sums < sums[:, -1:]).sum(dim=-1))


def _sample_filtered(weights: torch.Tensor, drawn: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    vocab_size = weights.shape[1]
    shortlist = min(_SHORTLIST, vocab_size)
    exact = _exact(weights.device)
    totals = weights.sum(dim=-1, dtype=exact)
    top, places = weights.topk(shortlist, dim=-1)
    sums = top.cumsum(dim=-1, dtype=exact)
    chosen = torch.empty(len(rows), dtype=torch.int64, device=weights.device)
    short: list[int] = []
    limits: list[int] = []
    shares = (sums[:, -1] / totals).tolist()
    for i, row in enumerate(rows):
        limit = row.top_k if 0 < row.top_k < vocab_size else vocab_size
        if limit <= shortlist or (row.top_p < 1 and limit == vocab_size and shares[i] >= row.top_p):
            short.append(i)
            limits.append(limit)
        else:
            ordered, at = weights[i : i + 1].sort(dim=-1, descending=True, stable=True)
            place = _cut(ordered, drawn[i : i + 1], totals[i : i + 1], [row], [limit])
            chosen[i] = at[0, place[0]]
    if short:
        taken = _cut(top[short], drawn[short], totals[short], [rows[i] for i in short], limits)
        chosen[short] = places[short].gather(1, taken.unsqueeze(-1)).squeeze(-1)
    return chosen


def _cut(
    ordered: torch.Tensor,
    drawn: torch.Tensor,
    totals: torch.Tensor,
    rows: list[Row],
    limits: list[int],
) -> torch.Tensor:
    """Return the place drawn in each row of falling weights, within its top-k and then its top-p.

    As everywhere, top-p counts shares of what top-k left.
    """
    device = ordered.device
    sums = ordered.cumsum(dim=-1, dtype=_exact(device))
    last = torch.tensor(limits, device=device).clamp_(max=ordered.shape[1]) - 1
    # Without a top-k the share is of the whole vocabulary, of which `ordered` may be a part.
    is_whole = torch.tensor([limit > ordered.shape[1] for limit in limits], device=device)
    kept = torch.where(is_whole, totals, sums.gather(1, last.unsqueeze(-1)).squeeze(-1))
    shares = torch.tensor([row.top_p for row in rows], device=device, dtype=_exact(device))
    nucleus = torch.searchsorted(sums, (kept * shares).unsqueeze(-1)).squeeze(-1)
    last = torch.minimum(last, nucleus)
    reach = sums.gather(1, last.unsqueeze(-1))
    places = torch.searchsorted(sums, drawn.unsqueeze(-1) * reach, right=True).squeeze(-1)
    return torch.minimum(places, last)
