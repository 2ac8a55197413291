"""What a request asks of the logits beside a constraint: penalties, biases, words to leave out.

One object for each answer, told of every token it takes; the same for every engine whose logits we
see. In numpy terms, so that an engine without torch can use it: an engine asks which places of a
row change, and writes them its own way.

Source: the order and the meaning of vLLM's sampler; OpenAI's penalties count what was generated,
`repetition_penalty` counts the prompt as well.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.domain.request import SamplingParams

Places = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class Adjustment:
    """Changes one answer's logits before its next token is chosen."""

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        prompt: Sequence[int],
        ends: Iterable[int],
        bad_words: Sequence[tuple[int, ...]],
        vocab_size: int,
    ) -> None:
        """Begin before the first token.

        Args:
            sampling: with every default filled in.
            ends: tokens that end the answer, which `min_tokens` keeps away.
            bad_words: the tokens of each text that must not appear.
            vocab_size: bounds the tokens that a bias or an end may name; others are left out.
        """
        self._repetition = sampling.repetition_penalty or 1.0
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._min_tokens = sampling.min_tokens
        self._ends = np.array(sorted({e for e in ends if e < vocab_size}), dtype=np.int64)
        self._bad_words = bad_words
        biases = {token: bias for token, bias in sampling.logit_bias if token < vocab_size}
        self._biased = np.array(list(biases), dtype=np.int64)
        self._biases = np.array(list(biases.values()), dtype=np.float32)
        self._said: list[int] = []
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if self._repetition != 1 else set()

    @staticmethod
    def is_needed(sampling: SamplingParams) -> bool:
        """Return whether a request asks for any of it."""
        return bool(
            sampling.presence_penalty
            or sampling.frequency_penalty
            or (sampling.repetition_penalty or 1.0) != 1
            or sampling.min_tokens
            or sampling.logit_bias
            or sampling.bad_words
        )

    def note(self, token: int) -> None:
        """Take the token that was chosen."""
        self._said.append(token)
        self._counts[token] += 1
        if self._repetition != 1:
            self._seen.add(token)

    def apply(self, row: Any) -> None:  # noqa: ANN401 -- a row of numpy or of torch
        """Change a row of logits: [vocabulary], float32."""
        for places in self._forbidden():
            row[places] = -np.inf
        if len(self._biased):
            row[self._biased] += _as(row, self._biases)
        if self._repetition != 1 and self._seen:
            places = np.fromiter(self._seen, dtype=np.int64)
            found = row[places]
            # A logit above 0 is divided, one below it multiplied.
            row[places] = found * (
                (found > 0) * (1 / self._repetition) + (found <= 0) * self._repetition
            )
        if (self._presence or self._frequency) and self._counts:
            places = np.fromiter(self._counts, dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float32)
            row[places] -= _as(row, self._presence + self._frequency * counts)

    def _forbidden(self) -> Iterable[Places]:
        if len(self._said) < self._min_tokens and len(self._ends):
            yield self._ends
        last = [
            word[-1]
            for word in self._bad_words
            if len(word) == 1 or tuple(self._said[1 - len(word) :]) == word[:-1]
        ]
        if last:
            yield np.array(last, dtype=np.int64)


def _as(row: Any, values: Values) -> Any:  # noqa: ANN401 -- numpy's or torch's
    """Return values as `row` takes them."""
    return row.new_tensor(values) if hasattr(row, "new_tensor") else values
