"""What is said to a server with OpenAI's API; `openai_answers` reads what comes back."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec

from engine.config import GenerationDefaults
from engine.sampling import longest_answer
from jobs.domain.images import Image
from jobs.domain.pooling import EMBEDDINGS, RERANK, SCORE, Pooling
from jobs.domain.request import CHAT, COMPLETIONS, Constraint, Message, Request
from jobs.domain.tools import Tools

Level = Literal["strict", "plain", "none"]
"""How a constraint is sent: held strictly, only named, or not at all."""

_VERSION = re.compile(r"v\d+\w*")
_encoder = msgspec.json.Encoder()


# --- where ---


def base_url(url: str) -> str:
    """Return the URL that `/chat/completions` is put behind.

    `/v1` is added unless the path names a version already, as in `/v1beta/openai`.
    """
    parts = urlsplit(url.strip())
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/completions"):
        path = path.removesuffix(ending)
    if not any(_VERSION.fullmatch(segment) for segment in path.split("/")):
        path += "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def shown_url(url: str) -> str:
    """Return a URL for a message: without a user, a password or a query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# --- what is asked ---


def may_be_long(request: Request, defaults: GenerationDefaults, *, than: int) -> bool:
    """Return whether the answer may have more than so many tokens."""
    if request.pooling is not None:
        return False
    most = longest_answer(request.sampling, defaults)
    return most is None or most > than


def build_body(
    request: Request,
    *,
    model: str,
    defaults: GenerationDefaults,
    constraint_fields: Mapping[str, Any],
    streams: bool,
    max_tokens_name: str,
) -> bytes:
    """Return the body of the request; what nobody set is left out, for the server to choose."""
    if request.pooling is not None:
        return _pooling_body(request.pooling, model)
    asked = request.sampling
    body: dict[str, Any] = {"model": model}
    if request.messages is not None:
        body["messages"] = messages_of(request.messages)
    else:
        body["prompt"] = request.prompt
        max_tokens_name = "max_tokens"
    fields = {
        max_tokens_name: longest_answer(asked, defaults),
        "temperature": asked.temperature if asked.temperature is not None else defaults.temperature,
        "top_p": asked.top_p if asked.top_p is not None else defaults.top_p,
        "top_k": asked.top_k if asked.top_k is not None else defaults.top_k,
        "seed": asked.seed if asked.seed is not None else defaults.seed,
        "stop": list(asked.stop or defaults.stop) or None,
        "ignore_eos": asked.ignore_eos or None,
        "presence_penalty": asked.presence_penalty or None,
        "frequency_penalty": asked.frequency_penalty or None,
        "repetition_penalty": asked.repetition_penalty,
        "min_p": asked.min_p,
        "min_tokens": asked.min_tokens or None,
        "logit_bias": {str(token): bias for token, bias in asked.logit_bias} or None,
        "stop_token_ids": list(asked.stop_token_ids) or None,
        "bad_words": list(asked.bad_words) or None,
    }
    if asked.logprobs is not None and request.messages is not None:
        fields |= {"logprobs": True, "top_logprobs": asked.logprobs or None}
    elif asked.logprobs is not None:
        fields["logprobs"] = asked.logprobs
    body |= {name: value for name, value in fields.items() if value is not None}
    if request.tools is not None:
        # The server writes calls in the form that its model learned; what is forced is its job.
        body |= _tool_fields(request.tools)
    else:
        body |= constraint_fields
    if streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return _encoder.encode(body)


def _tool_fields(tools: Tools) -> dict[str, Any]:
    fields: dict[str, Any] = {"tools": msgspec.Raw(tools.spec.encode())}
    if tools.choice in {"auto", "required"}:
        fields["tool_choice"] = tools.choice
    else:
        fields["tool_choice"] = {"type": "function", "function": {"name": tools.choice}}
    if not tools.is_parallel:
        fields["parallel_tool_calls"] = False
    return fields


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return a conversation as a body holds it."""
    return [_turn_of(message) for message in messages]


def _turn_of(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts:
        turn["content"] = [_part_of(part) for part in message.parts]
    if message.name:
        turn["name"] = message.name
    if message.tool_calls:
        turn["content"] = message.content or None
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _part_of(part: str | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    shown = {"url": part.data_url()}
    if part.detail is not None:
        shown["detail"] = part.detail
    return {"type": "image_url", "image_url": shown}


def _pooling_endpoint(pooling: Pooling) -> str:
    if pooling.task == "embed":
        return EMBEDDINGS
    return RERANK if len(pooling.queries) == 1 else SCORE


def _pooling_body(pooling: Pooling, model: str) -> bytes:
    endpoint = _pooling_endpoint(pooling)
    body: dict[str, Any] = {"model": model}
    if endpoint == EMBEDDINGS:
        body |= {"input": list(pooling.texts), "encoding_format": "float"}
        if pooling.dimensions is not None:
            body["dimensions"] = pooling.dimensions
    elif endpoint == RERANK:
        body |= {"query": pooling.queries[0], "documents": list(pooling.texts)}
    else:
        body |= {"text_1": list(pooling.queries), "text_2": list(pooling.texts)}
    return _encoder.encode(body)


def estimate_tokens(request: Request) -> int:
    """Return about how many tokens a prompt has: a quarter of its bytes."""
    if request.pooling is not None:
        return sum(
            len(text) // (4 if isinstance(text, str) else 1) for text in request.pooling.texts
        )
    if request.messages is not None:
        return sum(len(m.content.encode()) // 4 + 4 for m in request.messages)
    prompt = request.prompt or ""
    return len(prompt) if isinstance(prompt, tuple) else max(1, len(prompt.encode()) // 4)


def endpoint_of(request: Request) -> str:
    """Return what the URL ends with, behind the version."""
    if request.pooling is not None:
        return _pooling_endpoint(request.pooling).removeprefix("/v1")
    return (CHAT if request.messages is not None else COMPLETIONS).removeprefix("/v1")


def constraint_levels(
    constraint: Constraint | None, native: Literal["openai", "vllm", "none"], *, chat: bool
) -> tuple[Level, ...]:
    """Return how the constraint may be sent, the strictest first; "none" is always the last."""
    if constraint is None or native == "none":
        return ("none",)
    if native == "vllm":
        return ("plain", "none")
    if not chat or constraint.kind not in {"json_schema", "json_object"}:
        return ("none",)
    if constraint.kind == "json_schema" and _fits_strict(msgspec.json.decode(constraint.spec)):
        return ("strict", "plain", "none")
    return ("plain", "none")


def constraint_fields(
    constraint: Constraint | None, native: Literal["openai", "vllm", "none"], level: Level
) -> dict[str, Any]:
    """Return the fields of the body that ask the server to keep a constraint.

    Source: OpenAI's `response_format`; vLLM's `structured_outputs` (0.12 and later).
    """
    if constraint is None or level == "none":
        return {}
    spec = constraint.spec
    if native == "vllm":
        wanted: dict[str, Any]
        if constraint.kind == "json_object":
            wanted = {"json_object": True}
        elif constraint.kind == "json_schema":
            wanted = {"json": msgspec.Raw(spec.encode())}
        elif constraint.kind == "choice":
            wanted = {"choice": msgspec.json.decode(spec)}
        else:
            wanted = {constraint.kind: spec}
        return {"structured_outputs": wanted}
    if constraint.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    named: dict[str, Any] = {"name": "answer", "schema": msgspec.Raw(spec.encode())}
    if level == "strict":
        named["strict"] = True
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _fits_strict(schema: object) -> bool:
    """Return whether every object in a schema is closed and requires all it has.

    Source: the conditions of OpenAI's strict mode; a schema outside of them is refused there.
    """
    if isinstance(schema, list):
        return all(_fits_strict(one) for one in schema)
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    if schema.get("type") == "object" or properties is not None:
        if not isinstance(properties, dict) or schema.get("additionalProperties") is not False:
            return False
        required = schema.get("required", [])
        if not isinstance(required, list) or set(properties) != {str(name) for name in required}:
            return False
    return all(_fits_strict(one) for name, one in schema.items() if name not in {"enum", "const"})
