"""What the answers and refusals of a server with OpenAI's API mean.

Nothing of a server's error message is kept: servers repeat prompts in them. What is kept is the
status, and of `code`, `type` and `param` what has the form of a name.
"""

import base64
import email.utils
import math
import re
import struct
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

import msgspec

from jobs.domain.result import FinishReason, LineError, TokenLogprob, Usage
from jobs.domain.tools import ToolCall

TroubleKind = Literal["fault", "load", "away"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\[\]-]{0,63}")
_TOO_LONG = re.compile(
    r"maximum context length|max_model_len|maximum model length|context window|context_length"
    r"|exceeds? the (?:available )?context|prompt is too long|input is too long"
    # vLLM of a prompt that leaves no room: we never ask for less than one token.
    r"|max_tokens must be at least 1, got (?:0|-\d)",
    re.IGNORECASE,
)
_CONTEXT_SIZE = re.compile(r"(?:maximum context length|maximum model length)\D{0,40}(\d{1,9})")
_ABOUT_CONSTRAINT = re.compile(
    r"response_format|response format|structured.?output|json_schema|json_object|guided|grammar"
    r"|schema|regex|\bjson\b",
    re.IGNORECASE,
)
_ABOUT_STREAM = re.compile(r"\bstream(?:ing|_options)?\b", re.IGNORECASE)
_ABOUT_CONTENT = re.compile(r"content_?(?:filter|policy)|moderation|flagged", re.IGNORECASE)
_NO_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_STATUS_CODES: Mapping[int, str] = {
    401: "unauthorized",
    402: "insufficient_quota",
    403: "permission_denied",
    404: "model_not_found",
    413: "request_too_large",
    422: "invalid_request",
}
_RETRIED = frozenset({408, 409, 425, 500, 502, 504, 520, 521, 522, 523, 524})
_OVERLOADED = frozenset({429, 503, 529})
_SLOWING = frozenset({408, 502, 504, 522, 524})
_MAX_RETRY_AFTER_SECONDS = 7 * 86400.0
FLOAT_BYTES = 4


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said; `refused` says that it, or a filter, would not answer in full."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    refused: Literal["", "content_filter", "refusal"] = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    vectors: tuple[bytes, ...] = ()
    scores: tuple[float, ...] = ()


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no answer yet, where trying again may bring one.

    Attributes:
        kind: something about this request went wrong, the server has too much to do, or it is
            not there.
        slows: whether fewer requests at once may help.
    """

    kind: TroubleKind
    code: str
    status: int = 0
    retry_after: float | None = None
    slows: bool = False


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why trying again brings nothing.

    The flags say what a changed request could do without, so far as the server's words tell.
    """

    error: LineError
    status: int
    about_constraint: bool = False
    about_stream: bool = False
    about_max_tokens: bool = False
    about_content: bool = False
    no_quota: bool = False


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Said(msgspec.Struct):
    content: Any = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Likely(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list["_Likely"] = []


class _Logprobs(msgspec.Struct):
    """As chats have them, a list of tokens; or as completions do, several lists."""

    content: list[_Likely] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    message: _Said | None = None
    delta: _Said | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Number(msgspec.Struct):
    """What was made of one text: a vector, or a score by one of its names."""

    index: int
    embedding: list[float] | str | None = None
    score: float | None = None
    relevance_score: float | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    data: list[_Number] | None = None
    results: list[_Number] | None = None


_decoder = msgspec.json.Decoder(_Reply)


def read_answer(body: bytes, *, content_type: str) -> Answer | Trouble | Refusal:
    """Return what a whole answer with a status of 200 says."""
    if not body.strip():
        return Trouble(kind="fault", code="empty_answer", status=200)
    try:
        reply = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _unreadable(body, content_type, status=200)
    if reply.error:
        return _read_error_object(reply.error, status=200, headers={})
    if reply.data is not None or reply.results is not None:
        return _read_numbers(reply)
    if not reply.choices:
        return Trouble(kind="fault", code="invalid_answer", status=200)
    choice = reply.choices[0]
    said = choice.message or _Said()
    text = choice.text if choice.text is not None else _text_of(said.content)
    calls = _Calls()
    calls.add(said.tool_calls or ())
    return _conclude(
        text,
        said.refusal,
        choice.finish_reason,
        reply.usage,
        reasoning=said.reasoning or said.reasoning_content,
        calls=calls,
        logprobs=_read_logprobs(choice.logprobs),
    )


def _read_numbers(reply: _Reply) -> Answer | Trouble:
    """Return vectors or scores, in the order of the texts."""
    found = sorted(reply.data or reply.results or (), key=lambda one: one.index)
    usage = reply.usage or _Usage()
    counted = Usage(prompt_tokens=usage.prompt_tokens or usage.total_tokens or 0)
    try:
        vectors = tuple(_vector_of(one.embedding) for one in found if one.embedding is not None)
    except (ValueError, OverflowError, struct.error):
        return Trouble(kind="fault", code="invalid_answer", status=200)
    scores = tuple(
        score
        for one in found
        if (score := one.score if one.score is not None else one.relevance_score) is not None
    )
    if [one.index for one in found] != list(range(max(len(vectors), len(scores)))):
        return Trouble(kind="fault", code="invalid_answer", status=200)
    return Answer(text="", finish_reason="stop", usage=counted, vectors=vectors, scores=scores)


def _vector_of(given: list[float] | str) -> bytes:
    """Return 32-bit floats.

    Raises:
        ValueError, OverflowError, struct.error: it holds something else.
    """
    if not isinstance(given, str):
        return struct.pack(f"<{len(given)}f", *given)
    vector = base64.b64decode(given, validate=True)
    if not vector or len(vector) % FLOAT_BYTES:
        raise ValueError
    return vector


def _read_logprobs(found: _Logprobs | None) -> list[TokenLogprob]:
    if found is None:
        return []
    if found.content is not None:
        return [
            TokenLogprob(
                _bytes_of(one),
                one.logprob,
                tuple((_bytes_of(other), other.logprob) for other in one.top_logprobs),
            )
            for one in found.content
        ]
    tokens = found.tokens or []
    likeliest = found.top_logprobs or [None] * len(tokens)
    return [
        TokenLogprob(
            token.encode(),
            logprob or 0.0,
            tuple((other.encode(), its) for other, its in (others or {}).items()),
        )
        for token, logprob, others in zip(
            tokens, found.token_logprobs or (), likeliest, strict=False
        )
    ]


def _bytes_of(one: _Likely) -> bytes:
    try:
        return bytes(one.bytes) if one.bytes is not None else one.token.encode()
    except ValueError:
        return one.token.encode()


class _Calls:
    """Puts tool calls together, whole ones or pieces that come one after the other."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, list[str]]] = []
        self._newest: dict[int, list[str]] = {}  # of each index

    def add(self, calls: Sequence[_Call]) -> None:
        """Take what one message or delta holds of them."""
        for number, call in enumerate(calls):
            index = number if call.index is None else call.index
            function = call.function or _Function()
            part = self._newest.get(index)
            # Some servers send every call whole, and all with one index. Others make up an id for
            # each piece, but name the function in the first alone.
            if part is None or (call.id and function.name and part[0] not in {"", call.id}):
                part = self._newest[index] = ["", "", ""]
                self._parts.append((index, part))
            part[0] = part[0] or call.id or ""
            part[1] = part[1] or function.name or ""
            part[2] += function.arguments or ""

    def whole(self) -> tuple[ToolCall, ...]:
        """Return the calls in their order."""
        return tuple(
            ToolCall(name, arguments or "{}", call_id)
            for _, (call_id, name, arguments) in sorted(self._parts, key=itemgetter(0))
        )


class StreamReader:
    """Puts an answer together that comes as server-sent events."""

    def __init__(self) -> None:
        """Begin before the first byte."""
        self._rest = b""
        self._texts: list[str] = []
        self._refusals: list[str] = []
        self._reasoning: list[str] = []
        self._calls = _Calls()
        self._logprobs: list[TokenLogprob] = []
        self._finish: str | None = None
        self._usage: _Usage | None = None
        self._is_done = False
        self._has_choice = False
        self._failure: Trouble | Refusal | None = None

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._read_line(line)

    def result(self) -> Answer | Trouble | Refusal:
        """Return what was said, once no more bytes come."""
        self._read_line(self._rest)
        if self._failure is not None:
            return self._failure
        if not self._has_choice:
            return Trouble(kind="fault", code="empty_answer", status=200)
        if not self._is_done and self._finish is None:
            return Trouble(kind="fault", code="half_answer", status=200, slows=True)
        refusal = "".join(self._refusals) or None
        return _conclude(
            "".join(self._texts),
            refusal,
            self._finish,
            self._usage,
            reasoning="".join(self._reasoning) or None,
            calls=self._calls,
            logprobs=self._logprobs,
        )

    def _read_line(self, line: bytes) -> None:
        if not line.startswith(b"data:") or self._failure is not None:
            return  # names of events, comments that keep the connection, empty lines
        content = line[5:].strip()
        if content == b"[DONE]":
            self._is_done = True
            return
        try:
            reply = _decoder.decode(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._failure = Trouble(kind="fault", code="invalid_answer", status=200)
            return
        if reply.error:
            self._failure = _read_error_object(reply.error, status=200, headers={})
        self._usage = reply.usage or self._usage
        for choice in reply.choices or ():
            self._has_choice = True
            said = choice.delta or choice.message or _Said()
            self._texts.append(choice.text if choice.text is not None else _text_of(said.content))
            self._refusals.append(said.refusal or "")
            self._reasoning.append(said.reasoning or said.reasoning_content or "")
            self._calls.add(said.tool_calls or ())
            self._logprobs += _read_logprobs(choice.logprobs)
            self._finish = choice.finish_reason or self._finish


def read_failure(
    status: int, headers: Mapping[str, str], body: bytes, *, now: float | None = None
) -> Trouble | Refusal:
    """Return what an answer with another status than 200 means.

    Args:
        headers: with lower-case names.
        now: unix seconds; unset, the present.
    """
    try:
        content = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        content = None
    error = content.get("error", content) if isinstance(content, dict) else content
    return _read_error_object(error, status=status, headers=headers, now=now)


def read_retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Return how many seconds the server asks to wait, or None where it does not say.

    Source: RFC 9110, 10.2.3 (seconds or a date); `retry-after-ms` as OpenAI's client reads it.
    """
    try:
        if (text := headers.get("retry-after-ms")) is not None:
            return _bounded(float(text) / 1000)
    except ValueError:
        pass
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        return _bounded(float(text))
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, TypeError):
        return None
    return _bounded(at - (time.time() if now is None else now))


def _bounded(seconds: float) -> float | None:
    if not math.isfinite(seconds):
        return None
    return min(max(0.0, seconds), _MAX_RETRY_AFTER_SECONDS)


def _read_error_object(
    error: object, *, status: int, headers: Mapping[str, str], now: float | None = None
) -> Trouble | Refusal:
    found = error if isinstance(error, dict) else {"message": error}
    message = found.get("message")
    message = message if isinstance(message, str) else ""
    code, kind, param = (_name(found.get(key)) for key in ("code", "type", "param"))
    inner = found.get("code")
    if status < 400:  # an error in the clothes of an answer  # noqa: PLR2004
        status = inner if isinstance(inner, int) and 400 <= inner < 600 else 500  # noqa: PLR2004
    no_quota = code in _NO_QUOTA or kind in _NO_QUOTA or status == 402  # noqa: PLR2004
    if not no_quota and (status in _OVERLOADED or status in _RETRIED or status > 505):  # noqa: PLR2004
        return Trouble(
            kind="load" if status in _OVERLOADED else "fault",
            code=str(status),
            status=status,
            retry_after=read_retry_after(headers, now=now),
            slows=status in _OVERLOADED or status in _SLOWING,
        )
    is_too_long = status in {400, 413, 422} and (
        code == "context_length_exceeded" or _TOO_LONG.search(message) is not None
    )
    about_content = any(_ABOUT_CONTENT.search(part or "") for part in (code, kind))
    if is_too_long:
        line_error = _too_long(message, param)
    else:
        named = ", ".join(part for part in dict.fromkeys((code, kind)) if part)
        line_error = LineError(
            code=code or _STATUS_CODES.get(status, "invalid_request"),
            message=f"The server refused the request with status {status}"
            + (f" ({named})" if named else "")
            + (f", because of parameter {param}" if param else "")
            + ".",
            status_code=status,
            param=param,
        )
    said = f"{code or ''} {param or ''} {message}"
    can_change = status in {400, 404, 405, 415, 422, 501}
    return Refusal(
        error=line_error,
        status=status,
        about_constraint=can_change and _ABOUT_CONSTRAINT.search(said) is not None,
        about_stream=can_change and _ABOUT_STREAM.search(said) is not None,
        about_max_tokens=can_change
        and (param == "max_tokens" or "max_completion_tokens" in message)
        and not is_too_long,
        about_content=about_content or (status == 403 and _ABOUT_CONTENT.search(said) is not None),  # noqa: PLR2004
        no_quota=no_quota,
    )


def _too_long(message: str, param: str | None) -> LineError:
    size = _CONTEXT_SIZE.search(message)
    holds = f", which holds {size[1]} tokens" if size else ""
    return LineError(
        code="context_length_exceeded",
        message="The server says that prompt and answer together do not fit in the model's "
        f"context{holds}.",
        status_code=400,
        param=param,
    )


def _name(value: object) -> str | None:
    """Return a value that has the form of a name; anything else might be somebody's text."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def _unreadable(body: bytes, content_type: str, *, status: int) -> Trouble:
    start = body[:512].lstrip().lower()
    if "html" in content_type or start.startswith((b"<!doctype", b"<html", b"<")):
        return Trouble(kind="fault", code="html_answer", status=status)
    if start.startswith((b"{", b"[")) and not body.rstrip().endswith((b"}", b"]")):
        return Trouble(kind="fault", code="half_answer", status=status, slows=True)
    return Trouble(kind="fault", code="invalid_answer", status=status)


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(part for part in parts if isinstance(part, str))
    return ""


def _conclude(
    text: str,
    refusal: str | None,
    finish: str | None,
    usage: _Usage | None,
    *,
    reasoning: str | None,
    calls: _Calls,
    logprobs: Sequence[TokenLogprob],
) -> Answer | Trouble:
    # vLLM and routers: the engine behind the server failed, or was stopped in the middle.
    if finish in {"error", "abort"}:
        return Trouble(kind="fault", code="engine_error", status=200)
    counted = Usage()
    if usage is not None:
        details = usage.prompt_tokens_details
        counted = Usage(
            prompt_tokens=usage.prompt_tokens or 0,
            completion_tokens=usage.completion_tokens or 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )
    is_cut = finish in {"length", "max_tokens", "model_length"}
    refused: Literal["", "content_filter", "refusal"] = ""
    if finish == "content_filter":
        refused = "content_filter"
    elif refusal and not text:
        refused = "refusal"
    return Answer(
        text=text or refusal or "",
        finish_reason="length" if is_cut else "stop",
        usage=counted,
        refused=refused,
        reasoning=reasoning,
        tool_calls=calls.whole(),
        logprobs=tuple(logprobs),
    )
