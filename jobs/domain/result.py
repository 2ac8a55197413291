"""What one request became, and how it is written as a line of the output or error file."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Literal

import msgspec

from jobs.domain.pooling import POOLING_ENDPOINTS, Pooling, render_pooling
from jobs.domain.reasoning import split_reasoning
from jobs.domain.request import Request
from jobs.domain.responses import RESPONSES, render_response, render_usage
from jobs.domain.tools import ToolCall

FinishReason = Literal["stop", "length"]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens really computed; when an answer was asked for again, the sum over all attempts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Return the sum of two usages."""
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request has no answer.

    `status_code` is the HTTP status the request would have got, or 0 when it never ran.
    """

    code: str
    message: str
    status_code: int = 0
    param: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """How likely a token of an answer was, as a natural logarithm; and which ones were likeliest.

    Tokens are spelled as bytes, since one may be a part of a character.
    """

    token: bytes
    logprob: float
    likeliest: tuple[tuple[bytes, float], ...] = ()


class Choice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A further answer to a request that wanted several; see Result."""

    text: str = ""
    finish_reason: FinishReason = "stop"
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine made of one request; final.

    Attributes:
        id: the engine request's id.
        text: the answer, or the last rejected answer when `error` says so.
        attempts: how many times the model was asked.
        constraint: how the answer's constraint was kept: "enforced" while generating and
            validated after, "validated" only after, or None where there was none.
        reasoning: what the model said to itself before, where that was told apart.
        tool_calls: what it wants called.
        vectors: one for each text that was to be embedded: 32-bit floats, little-endian.
        scores: one for each text that was to be scored.
        logprobs: of each token of the answer, where that was asked for.
        further: the other answers, where several were asked for.
    """

    id: int
    text: str = ""
    finish_reason: FinishReason = "stop"
    usage: Usage = Usage()
    error: LineError | None = None
    attempts: int = 1
    constraint: Literal["enforced", "validated"] | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    vectors: tuple[bytes, ...] = ()
    scores: tuple[float, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    further: tuple[Choice, ...] = ()


_CHAT = "/v1/chat/completions"
_CLIENT_ERRORS = range(400, 500)
_encode = msgspec.json.Encoder().encode


def _error_type(status_code: int) -> str:
    return "invalid_request_error" if status_code in _CLIENT_ERRORS else "server_error"


def render_result(
    result: Result,
    *,
    custom_id: str,
    request_id: str,
    endpoint: str,
    model: str,
    created: int,
    same_as: str | None = None,
    pooling: Pooling | None = None,
    reused_from: str | None = None,
    request: Request | None = None,
) -> bytes:
    """Return the line (without its newline) that the output or error file holds.

    A result with an error belongs in the error file, any other in the output file.
    `request_id` is unique in the system; `created` is in unix seconds. `same_as` is the custom_id
    of the equal request that ran for this one: what was computed is told there, and is 0 here.
    So it is with `reused_from`, the id of the earlier batch that the answer was taken from.
    `pooling` is what was asked for where the answer is no text. `request` is all that was asked
    for, which a response tells again.

    Source: the JSONL formats of the OpenAI Batch API; `batchctl` is an addition of ours, present
    only where there was a constraint or a second attempt.
    """
    line: dict[str, object] = {"id": f"batch_req_{request_id}", "custom_id": custom_id}
    error = result.error
    if error is not None and not error.status_code:
        line["response"] = None
        line["error"] = {"code": error.code, "message": error.message}
        return _encode(line)
    usage = result.usage if same_as is None and reused_from is None else Usage()
    usage_body = _usage(usage, endpoint)
    body: dict[str, object]
    if error is not None:
        status = error.status_code
        body = {
            "error": {
                "message": error.message,
                "type": _error_type(status),
                "param": error.param,
                "code": error.code,
            }
        }
        if usage.completion_tokens or result.text:
            body["raw_text"] = result.text
            body["usage"] = usage_body
    else:
        status = 200
        answers: tuple[Result | Choice, ...] = (result, *result.further)
        if pooling is not None and endpoint in POOLING_ENDPOINTS:
            body = {"id": f"pool-{request_id}", "created": created, "model": model}
            body |= render_pooling(endpoint, pooling, vectors=result.vectors, scores=result.scores)
            body["usage"] = {
                "prompt_tokens": usage.prompt_tokens,
                "total_tokens": usage.prompt_tokens,
            }
        elif endpoint == _CHAT:
            body = {"id": f"chatcmpl-{request_id}", "object": "chat.completion"}
            choices = [
                {
                    "index": number,
                    "message": _message(
                        one,
                        f"{request_id}_{number}" if number else request_id,
                        is_held=result.constraint is not None,
                    ),
                    "finish_reason": "tool_calls" if one.tool_calls else one.finish_reason,
                    "logprobs": _chat_logprobs(one.logprobs),
                }
                for number, one in enumerate(answers)
            ]
            body.update(created=created, model=model, choices=choices, usage=usage_body)
        elif endpoint == RESPONSES:
            body = _response(result, request_id, request)
            body.update(created_at=created, model=model, usage=usage_body)
        else:
            body = {"id": f"cmpl-{request_id}", "object": "text_completion"}
            choices = [
                {
                    "index": number,
                    "text": one.text,
                    "finish_reason": one.finish_reason,
                    "logprobs": _completion_logprobs(one.logprobs),
                }
                for number, one in enumerate(answers)
            ]
            body.update(created=created, model=model, choices=choices, usage=usage_body)
    is_copy = same_as is not None or reused_from is not None
    if result.constraint is not None or result.attempts > 1 or is_copy:
        told = {"constraint": result.constraint, "attempts": result.attempts}
        copied = {"same_as": same_as, "reused_from": reused_from}
        body["batchctl"] = told | {key: source for key, source in copied.items() if source}
    line["response"] = {"status_code": status, "request_id": f"req_{request_id}", "body": body}
    line["error"] = None
    return _encode(line)


def _usage(usage: Usage, endpoint: str) -> dict[str, object]:
    told = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    return render_usage(told) if endpoint == RESPONSES else told


def _response(result: Result, request_id: str, request: Request | None) -> dict[str, object]:
    logprobs = _chat_logprobs(result.logprobs)
    body = render_response(
        request_id,
        _message(result, request_id, is_held=result.constraint is not None),
        logprobs=logprobs["content"] if logprobs is not None else None,
        is_cut=result.finish_reason == "length" and not result.tool_calls,
        tools=request.tools if request is not None else None,
    )
    if request is not None:
        sampling = request.sampling
        body.update(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_output_tokens=sampling.max_tokens,
            top_logprobs=sampling.logprobs,
        )
    return body


def _message(result: Result | Choice, request_id: str, *, is_held: bool) -> dict[str, object]:
    """Return what an assistant said, as OpenAI spells it, and `reasoning` as vLLM does.

    Args:
        is_held: whether its text was held against a constraint: all of it is the answer then.
    """
    reasoning, text = result.reasoning, result.text
    if reasoning is None and not is_held:
        reasoning, text = split_reasoning(text)
    message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
    if reasoning is not None:
        message["reasoning"] = reasoning
    if result.tool_calls:
        message["content"] = text or None
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{request_id}_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for number, call in enumerate(result.tool_calls)
        ]
    return message


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, object] | None:
    if not logprobs:
        return None
    return {
        "content": [
            _spelled(one.token, one.logprob)
            | {"top_logprobs": [_spelled(token, logprob) for token, logprob in one.likeliest]}
            for one in logprobs
        ],
        "refusal": None,
    }


def _spelled(token: bytes, logprob: float) -> dict[str, object]:
    return {"token": _shown(token), "logprob": logprob, "bytes": list(token)}


def _shown(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _completion_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, object] | None:
    if not logprobs:
        return None
    offsets: list[int] = []
    place = 0
    decoder = getincrementaldecoder("utf-8")("replace")
    for one in logprobs:
        offsets.append(place)
        place += len(decoder.decode(one.token))
    return {
        "tokens": [_shown(one.token) for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [
            {_shown(token): logprob for token, logprob in one.likeliest} for one in logprobs
        ],
        "text_offset": offsets,
    }
