"""Lines to be read, and what they are read with."""

import json
from typing import Any

import pytest

from jobs.domain.errors import InvalidLine
from jobs.domain.request import (
    CHAT,
    PARAMETERS,
    Capabilities,
    ConstraintKind,
    Line,
    parse_line,
)

USER = [{"role": "user", "content": "x"}]


def line_of(*, endpoint: str = CHAT, without: str = "", **changes: object) -> bytes:
    body: dict[str, object] = {"model": "m"}
    body |= {"messages": USER} if endpoint == CHAT else {"prompt": "x"}
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body} | changes
    line.pop(without, None)
    return json.dumps(line).encode()


def with_body(text: str) -> bytes:
    """Return a line whose body ends with this JSON text."""
    return (
        '{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":'
        '{"model":"m","messages":[{"role":"user","content":"x"}],' + text + "}}"
    ).encode()


def parse(line: bytes, *, endpoint: str = CHAT) -> Line:
    return parse_line(line, endpoint=endpoint)


def refuse(line: bytes, *, endpoint: str = CHAT) -> tuple[str, str | None]:
    with pytest.raises(InvalidLine) as caught:
        parse_line(line, endpoint=endpoint)
    assert "\n" not in caught.value.message
    return caught.value.error_code, caught.value.param


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "stream": False,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "min_tokens": 0,
    "logit_bias": {},
    "bad_words": [],
    "stop_token_ids": [],
    "tool_choice": "none",
    "tools": [],
    "modalities": ["text"],
    "chat_template_kwargs": {},
    "response_format": {"type": "text"},
    "user": "somebody",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "prompt_cache_key": "k",
    "parallel_tool_calls": True,
    "stream_options": {"include_usage": True},
    "priority": 3,
    "safety_identifier": "s",
}


SCHEMA = '{"type":"object"}'
FORMAT = '"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":%s}}'


def capabilities(
    *, parameters: tuple[str, ...] = PARAMETERS, constraints: tuple[ConstraintKind, ...] = ()
) -> Capabilities:
    return Capabilities(model="m", engine="e", parameters=parameters, constraints=constraints)
