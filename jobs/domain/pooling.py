"""Texts to be embedded or scored: what a line asks for, and the body that answers it.

Source: `/v1/embeddings` of OpenAI's API; `/v1/rerank` as Jina and vLLM spell it; `/v1/score`
as vLLM does.
"""

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from jobs.domain.errors import InvalidLine

EMBEDDINGS = "/v1/embeddings"
RERANK = "/v1/rerank"
SCORE = "/v1/score"
POOLING_ENDPOINTS = (EMBEDDINGS, RERANK, SCORE)
MAX_TEXTS = 2048
"""Of one line, as in OpenAI's API."""

Text = str | tuple[int, ...]
PoolingTask = Literal["embed", "score"]


class PoolingForm(msgspec.Struct, frozen=True, array_like=True):
    """How the numbers are written; see `render_pooling`."""

    encoding: Literal["float", "base64"] = "float"
    top_n: int | None = None
    shows_documents: bool = True


class Pooling(msgspec.Struct, frozen=True, array_like=True):
    """Texts, or token ids, to be turned into numbers.

    Attributes:
        task: a vector for each text, or one number for each pair of a query and a text.
        queries: for "score", one for all texts, or one for each.
        dimensions: length of the vectors; None: as the model makes them.
        form: how the numbers are written.
    """

    task: PoolingTask
    texts: tuple[Text, ...]
    queries: tuple[str, ...] = ()
    dimensions: int | None = None
    form: PoolingForm = PoolingForm()

    def pair(self, number: int) -> tuple[str, Text]:
        """Return the query and the text of a pair."""
        return self.queries[number if len(self.queries) > 1 else 0], self.texts[number]


# --- wire types ---

_Model = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
_Tokens = Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]], msgspec.Meta(min_length=1)]


class EmbeddingsBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a line for `/v1/embeddings`."""

    model: _Model | None = None
    input: str | list[Any]
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class RerankBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a line for `/v1/rerank`."""

    model: _Model | None = None
    query: str
    documents: list[str | dict[str, Any]]
    top_n: Annotated[int, msgspec.Meta(ge=0)] | None = None
    return_documents: bool | None = None
    user: str | None = None


class ScoreBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a line for `/v1/score`; each name is one that vLLM takes."""

    model: _Model | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    user: str | None = None


POOLING_BODIES: dict[str, type[EmbeddingsBody | RerankBody | ScoreBody]] = {
    EMBEDDINGS: EmbeddingsBody,
    RERANK: RerankBody,
    SCORE: ScoreBody,
}


def read_pooling(body: EmbeddingsBody | RerankBody | ScoreBody) -> Pooling:
    """Return what a body asks for.

    Raises:
        InvalidLine: there is nothing to work on, or too much.
    """
    if isinstance(body, EmbeddingsBody):
        texts = _texts(body.input)
        _check_number(texts, "body.input")
        form = PoolingForm(encoding=body.encoding_format or "float")
        return Pooling("embed", texts, (), body.dimensions, form)
    if isinstance(body, RerankBody):
        documents = tuple(_document(one) for one in body.documents)
        _check_number(documents, "body.documents")
        form = PoolingForm(
            top_n=body.top_n or None, shows_documents=body.return_documents is not False
        )
        return Pooling("score", documents, (body.query,), None, form)
    queries = _strings(body.text_1 if body.text_1 is not None else body.queries, "text_1")
    found = _strings(body.text_2 if body.text_2 is not None else body.documents, "text_2")
    _check_number(found, "body.text_2")
    if len(queries) not in {1, len(found)}:
        raise _invalid("text_1 holds one text, or as many as text_2.", "body.text_1")
    return Pooling("score", found, queries)


def _texts(given: str | list[Any]) -> tuple[Text, ...]:
    if isinstance(given, str):
        return (given,)
    try:
        if given and isinstance(given[0], int):
            return (tuple(msgspec.convert(given, _Tokens)),)
        found = msgspec.convert(given, list[str | _Tokens])
    except msgspec.ValidationError:
        raise _invalid(
            "input is a text, a list of texts, token ids, or a list of lists of token ids.",
            "body.input",
        ) from None
    return tuple(one if isinstance(one, str) else tuple(one) for one in found)


def _document(given: str | dict[str, Any]) -> str:
    text = given if isinstance(given, str) else given.get("text")
    if not isinstance(text, str):
        raise _invalid("A document is a text, or an object with a `text`.", "body.documents")
    return text


def _strings(given: str | list[str] | None, name: str) -> tuple[str, ...]:
    if given is None:
        raise InvalidLine(
            f"Missing required parameter: '{name}'.",
            param=f"body.{name}",
            error_code="missing_required_parameter",
        )
    return (given,) if isinstance(given, str) else tuple(given)


def _check_number(texts: Sequence[Text], param: str) -> None:
    if not texts or any(not one for one in texts):
        raise _invalid("There is an empty text, or none at all.", param)
    if len(texts) > MAX_TEXTS:
        raise _invalid(f"A line holds {MAX_TEXTS} texts at most; this one has more.", param)


def _invalid(message: str, param: str) -> InvalidLine:
    return InvalidLine(message, param=param, error_code="invalid_value")


# --- the body that answers ---


def render_pooling(
    endpoint: str, pooling: Pooling, *, vectors: Sequence[bytes], scores: Sequence[float]
) -> dict[str, Any]:
    """Return the part of a response's body that holds the numbers.

    Args:
        vectors: one for each text: 32-bit floats, little-endian.
        scores: one for each text, or none where vectors were asked for.
    """
    form = pooling.form
    if endpoint == EMBEDDINGS:
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": number, "embedding": _written(vector, form)}
                for number, vector in enumerate(vectors)
            ],
        }
    if endpoint == SCORE:
        return {
            "object": "list",
            "data": [
                {"index": number, "object": "score", "score": score}
                for number, score in enumerate(scores)
            ],
        }
    ranked = sorted(range(len(scores)), key=lambda number: -scores[number])[: form.top_n]
    return {
        "results": [
            {
                "index": number,
                **({"document": {"text": pooling.texts[number]}} if form.shows_documents else {}),
                "relevance_score": scores[number],
            }
            for number in ranked
        ]
    }


def _written(vector: bytes, form: PoolingForm) -> list[float] | str:
    if form.encoding == "base64":
        return base64.b64encode(vector).decode()
    # Nine digits tell every 32-bit float from its neighbours.
    return [float(f"{value:.9g}") for value in struct.unpack(f"<{len(vector) // 4}f", vector)]
