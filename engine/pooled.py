"""Texts on their way through an encoder, whichever engine it runs in.

    Request -> one Part for each sequence -> a vector for each -> Result

A model without a head for scores scores a pair by the cosine of its two embeddings, as vLLM does.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from engine.answers import refuse
from engine.sampling import OPENAI_DEFAULTS
from jobs.domain.pooling import Pooling, Text
from jobs.domain.request import Request, SamplingParams
from jobs.domain.result import LineError, Result, Usage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer


_NO_NUMBERS = LineError(
    code="numerical_error",
    message="What the model makes of a text are not numbers; the text may overflow this precision.",
    status_code=500,
)


class Part:
    """One sequence of a request: a text to embed, or a pair to score."""

    __slots__ = ("held", "ids", "number", "types")

    def __init__(self, held: "Held", number: int, ids: list[int], types: list[int]) -> None:
        """Note that `ids` is sequence `number` of a request; `types` tells query from text."""
        self.held = held
        self.number = number
        self.ids = ids
        self.types = types


class Held:
    """One request, and what there is of its answer."""

    __slots__ = ("num_left", "num_tokens", "pooling", "request_id", "vectors")

    def __init__(self, request_id: int, pooling: Pooling) -> None:
        """Begin with nothing."""
        self.request_id = request_id
        self.pooling = pooling
        self.num_tokens = 0
        self.num_left = 0
        self.vectors: dict[int, NDArray[np.float32]] = {}

    def receive(self, number: int, vector: "NDArray[np.float32]") -> bool:
        """Note what the model made of a sequence; return whether it was the last one missing."""
        self.vectors[number] = vector
        self.num_left -= 1
        return not self.num_left


class Parting:
    """Turns requests into sequences, and what a model made of these into results."""

    def __init__(
        self, backend: "Tokenizer", *, scores: bool, context_tokens: int, vocab_size: int
    ) -> None:
        """Use a tokenizer.

        Args:
            backend: of the `tokenizers` library; it must not cut or pad.
            scores: whether the model has a head which gives a pair of texts one number.
            context_tokens: the longest sequence.
        """
        self._backend = backend
        self._scores = scores
        self._context_tokens = context_tokens
        self._vocab_size = vocab_size

    def encode(self, request: Request) -> list[Part] | Result:
        """Return the sequences of a request, or its result where it cannot run."""
        pooling = request.pooling
        if pooling is None:
            return _refused(
                request, "unsupported_endpoint", "This model embeds and scores; it writes no text."
            )
        if pooling.task == "embed" and self._scores:
            return _refused(
                request, "unsupported_endpoint", "This model scores pairs; it embeds nothing."
            )
        held = Held(request.id, pooling)
        parts: list[Part] = []
        for number in range(len(pooling.texts)):
            if pooling.task == "score" and self._scores:
                query, text = pooling.pair(number)
                parts.append(self._part(held, number, text, query))
            else:
                parts.append(self._part(held, number, pooling.texts[number]))
        if pooling.task == "score" and not self._scores:
            first = len(pooling.texts)
            parts += [
                self._part(held, first + number, query)
                for number, query in enumerate(pooling.queries)
            ]
        longest = max(len(part.ids) for part in parts)
        if longest > self._context_tokens:
            return _refused(
                request,
                "context_length_exceeded",
                f"A text has {longest} tokens; this model takes {self._context_tokens}.",
            )
        if any(part.ids and max(part.ids) >= self._vocab_size for part in parts):
            return _refused(request, "invalid_value", "A token id is not in the vocabulary.")
        held.num_left = len(parts)
        held.num_tokens = sum(len(part.ids) for part in parts)
        return parts

    def conclude(self, held: Held) -> Result:
        """Return the result of a request whose sequences all have their vectors."""
        pooling = held.pooling
        usage = Usage(prompt_tokens=held.num_tokens)
        num = len(pooling.texts)
        if not all(np.isfinite(vector).all() for vector in held.vectors.values()):
            return Result(id=held.request_id, usage=usage, error=_NO_NUMBERS)
        if pooling.task == "score":
            found = (
                [_sigmoid(float(held.vectors[n][0])) for n in range(num)]
                if self._scores
                else [
                    _cosine(
                        held.vectors[n],
                        held.vectors[num + (n if len(pooling.queries) > 1 else 0)],
                    )
                    for n in range(num)
                ]
            )
            return Result(id=held.request_id, usage=usage, scores=tuple(found))
        vectors: list[bytes] = []
        for n in range(num):
            vector = held.vectors[n]
            if pooling.dimensions is not None and pooling.dimensions < len(vector):
                vector = vector[: pooling.dimensions]
                vector = vector / max(float(np.linalg.norm(vector)), _TINY)
            vectors.append(vector.astype("<f4").tobytes())
        return Result(id=held.request_id, usage=usage, vectors=tuple(vectors))

    def _part(self, held: Held, number: int, text: Text, query: str | None = None) -> Part:
        if not isinstance(text, str):
            return Part(held, number, list(text), [0] * len(text))
        encoded = self._backend.encode(*((text,) if query is None else (query, text)))
        return Part(held, number, encoded.ids, encoded.type_ids)


class PoolingEngine:
    """What engines that embed and score have in common."""

    _parting: Parting

    @property
    def tuning(self) -> None:
        """Nothing: how much it works on depends on the lengths of the texts alone."""
        return

    def count_tokens(self, request: Request) -> int:
        """Return the number of tokens of a request's texts; 0 where it cannot run."""
        parts = self._parting.encode(request)
        return 0 if isinstance(parts, Result) else sum(len(part.ids) for part in parts)

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the defaults: nothing is sampled."""
        del request
        return OPENAI_DEFAULTS


_TINY = 1e-12
"""Least length that is divided by, as in torch."""


def _sigmoid(logit: float) -> float:
    # Of a number that is far below zero, exp() of its opposite would overflow.
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _cosine(one: "NDArray[np.float32]", other: "NDArray[np.float32]") -> float:
    lengths = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.dot(one, other)) / max(lengths, _TINY)


def _refused(request: Request, code: str, message: str) -> Result:
    return refuse(request, code, message, param="input")
