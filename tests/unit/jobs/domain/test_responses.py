import json
from typing import Any

import pytest
from openai.types.responses import Response

from jobs.domain.errors import InvalidLine
from jobs.domain.plan import Columns, order
from jobs.domain.request import CHAT, Capabilities, Line, Request, parse_line
from jobs.domain.responses import RESPONSES
from jobs.domain.result import LineError, Result, TokenLogprob, Usage, render_result
from jobs.domain.sketch import Sketcher
from jobs.domain.tools import ToolCall

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": PARAMETERS, "strict": True},
}
TOOL: dict[str, Any] = {"type": "function"} | CHAT_TOOL["function"]
USER = [{"role": "user", "content": "Hi"}]
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=3)


def line_of(body: dict[str, Any], *, endpoint: str = RESPONSES, custom_id: str = "a") -> bytes:
    line = {
        "custom_id": custom_id,
        "method": "POST",
        "url": endpoint,
        "body": {"model": "m"} | body,
    }
    return json.dumps(line).encode()


def read(body: dict[str, Any], *, endpoint: str = RESPONSES) -> Line:
    return parse_line(line_of(body, endpoint=endpoint), endpoint=endpoint)


def refusal(body: dict[str, Any], capabilities: Capabilities | None = None) -> InvalidLine:
    """Return why a body is refused, after proving that planning says the same."""
    with pytest.raises(InvalidLine) as refused:
        parse_line(line_of(body), endpoint=RESPONSES, capabilities=capabilities)
    with pytest.raises(InvalidLine) as planned:
        Sketcher(RESPONSES).sketch(line_of(body)).terms.check(
            capabilities
            or Capabilities(
                model="m",
                engine="hf",
                parameters=(),
            )
        )
    error, same = refused.value, planned.value
    assert (error.message, error.param, error.error_code) == (
        same.message,
        same.param,
        same.error_code,
    )
    return error


# --- translated ---

CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look."},
    {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}", "id": "fc_1"},
    {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    {
        "type": "function_call_output",
        "call_id": "c2",
        "output": [{"type": "input_text", "text": "rain"}],
        "status": "completed",
    },
]
CHAT_CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": c, "type": "function", "function": {"name": "look", "arguments": "{}"}}
            for c in ("c1", "c2")
        ],
    },
    {"role": "tool", "content": "sun", "tool_call_id": "c1"},
    {"role": "tool", "content": [{"type": "text", "text": "rain"}], "tool_call_id": "c2"},
]
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"input": "Hi"}, {"messages": USER}),
    "messages": ({"input": USER}, {"messages": USER}),
    "named type": ({"input": [{"type": "message"} | USER[0]]}, {"messages": USER}),
    "instructions": (
        {"instructions": "Be kind", "input": "Hi"},
        {"messages": [{"role": "system", "content": "Be kind"}, *USER]},
    ),
    "roles": (
        {"input": [{"role": r, "content": r} for r in ("system", "developer", "user")]},
        {"messages": [{"role": r, "content": r} for r in ("system", "developer", "user")]},
    ),
    "parts": (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
    ),
    "an earlier answer": (
        {
            "input": [
                *USER,
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "hm"}],
                },
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Ho", "annotations": []}],
                },
                *USER,
            ]
        },
        {
            "messages": [
                *USER,
                {"role": "assistant", "content": "Ho"},
                *USER,
            ]
        },
    ),
    "calls": ({"input": CALLS, "tools": [TOOL]}, {"messages": CHAT_CALLS, "tools": [CHAT_TOOL]}),
    "a call without text": (
        {"input": [*USER, *CALLS[2:3]]},
        {
            "messages": [
                *USER,
                CHAT_CALLS[1] | {"content": None, "tool_calls": CHAT_CALLS[1]["tool_calls"][:1]},
            ]
        },
    ),
    "sampling": (
        {"input": "Hi", "max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9},
        {"messages": USER, "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9},
    ),
    "further sampling": (
        {"input": "Hi", "seed": 1, "stop": "x", "top_k": 4, "min_p": 0.1, "ignore_eos": True},
        {"messages": USER, "seed": 1, "stop": "x", "top_k": 4, "min_p": 0.1, "ignore_eos": True},
    ),
    "logprobs": (
        {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 3},
        {"messages": USER, "logprobs": True, "top_logprobs": 3},
    ),
    "a schema": (
        {
            "input": "Hi",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        },
        {
            "messages": USER,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            },
        },
    ),
    "any object": (
        {"input": "Hi", "text": {"format": {"type": "json_object"}}},
        {"messages": USER, "response_format": {"type": "json_object"}},
    ),
    "no form": ({"input": "Hi", "text": {"format": {"type": "text"}}}, {"messages": USER}),
    "a regex": (
        {"input": "Hi", "structured_outputs": {"regex": "a+"}},
        {"messages": USER, "structured_outputs": {"regex": "a+"}},
    ),
    "tools": (
        {"input": "Hi", "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {
            "messages": USER,
            "tools": [CHAT_TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    ),
    "a named tool": (
        {"input": "Hi", "tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}},
        {
            "messages": USER,
            "tools": [CHAT_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
        },
    ),
    "no tool": ({"input": "Hi", "tools": [TOOL], "tool_choice": "none"}, {"messages": USER}),
    "what asks for nothing": (
        {
            "input": "Hi",
            "background": False,
            "truncation": "disabled",
            "store": True,
            "metadata": {"k": "v"},
            "previous_response_id": None,
            "conversation": None,
            "reasoning": {"effort": None},
            "stream": False,
            "include": [],
            "user": "u",
            "top_logprobs": 0,
            "tools": [],
        },
        {"messages": USER},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_response_asks_an_engine_what_the_chat_of_the_same_meaning_asks(name: str) -> None:
    response, chat = SAME[name]
    asked = read(response).to_request(1)
    assert asked == read(chat, endpoint=CHAT).to_request(1)
    assert asked.messages
    sketches = (
        Sketcher(RESPONSES).sketch(line_of(response)),
        Sketcher(CHAT).sketch(line_of(chat, endpoint=CHAT)),
    )
    assert sketches[0].digest() == sketches[1].digest()
    assert sketches[0].num_first_chars == sketches[1].num_first_chars
    assert sketches[0].terms.max_tokens == asked.sampling.max_tokens


def test_responses_that_ask_for_the_same_are_looked_at_once() -> None:
    sketcher = Sketcher(RESPONSES)
    first, second = (
        sketcher.sketch(line_of({"input": text, "temperature": 0, "tools": [TOOL]}))
        for text in ("a", "b")
    )
    assert first.terms is second.terms
    assert first.digest() != second.digest()


def test_responses_with_common_instructions_are_grouped() -> None:
    columns = Columns(RESPONSES)
    sketcher = Sketcher(RESPONSES)
    for number in range(64):
        body = {"instructions": f"{number % 2} " + "rule " * 600, "input": f"{number}"}
        line = line_of(body, custom_id=f"{number}-" + "x" * 400)
        sketch = sketcher.sketch(line)
        columns.add(line, num_first_chars=sketch.num_first_chars, key=None, max_tokens=1)
    assert order(columns, cache_tokens=1000).num_groups == 2


# --- refused ---

REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "previous_response_id": (
        {"previous_response_id": "resp_1"},
        "unsupported_parameter",
        "body.previous_response_id",
        "nothing is stored",
    ),
    "conversation": (
        {"conversation": {"id": "conv_1"}},
        "unsupported_parameter",
        "body.conversation",
        "nothing is stored",
    ),
    "background": ({"background": True}, "unsupported_parameter", "body.background", "leave it"),
    "prompt": ({"prompt": {"id": "p"}}, "unsupported_parameter", "body.prompt", "kept at OpenAI"),
    "max_tool_calls": ({"max_tool_calls": 3}, "unsupported_parameter", "body.max_tool_calls", ""),
    "truncation": (
        {"truncation": "auto"},
        "unsupported_parameter",
        "body.truncation",
        "never cut",
    ),
    "stream": ({"stream": True}, "streaming_unsupported", "body.stream", "leave `stream` out"),
    "effort": (
        {"reasoning": {"effort": "high"}},
        "unsupported_parameter",
        "body.reasoning.effort",
        "no such setting",
    ),
    "verbosity": (
        {"text": {"verbosity": "low"}},
        "unsupported_parameter",
        "body.text.verbosity",
        "ask for it in the prompt",
    ),
    "include": (
        {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"]},
        "unsupported_parameter",
        "body.include[1]",
        "reasoning.encrypted_content",
    ),
    "logprobs": ({"top_logprobs": 2}, "invalid_value", "body.top_logprobs", "include"),
    "built-in tool": (
        {"tools": [TOOL, {"type": "web_search"}]},
        "unsupported_parameter",
        "body.tools[1].type",
        "'web_search'",
    ),
    "bad tool": (
        {"tools": [{"type": "function", "parameters": {}}]},
        "missing_required_parameter",
        "body.tools[0].name",
        "'name'",
    ),
    "chat's tool": ({"tools": [CHAT_TOOL]}, "unsupported_parameter", "body.tools[0].function", ""),
    "same names": ({"tools": [TOOL, TOOL]}, "invalid_value", "body.tools", "same name"),
    "choice": (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
        "unsupported_parameter",
        "body.tool_choice.type",
        "'allowed_tools'",
    ),
    "odd choice": (
        {"tools": [TOOL], "tool_choice": "any"},
        "invalid_value",
        "body.tool_choice",
        "",
    ),
    "unknown choice": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}},
        "invalid_value",
        "body.tool_choice",
        "not among the tools",
    ),
    "tools and schema": (
        {
            "tools": [TOOL],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        },
        "invalid_value",
        "body.tools",
        "cannot both",
    ),
    "schema": (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": 5}}},
        "invalid_schema",
        "body.text.format",
        "object",
    ),
    "no item": ({"input": []}, "invalid_value", "body.input", "no message"),
    "no message": (
        {"input": [{"type": "reasoning", "id": "r", "summary": []}]},
        "invalid_value",
        "body.input",
        "no message",
    ),
    "no input": ({"input": None}, "missing_required_parameter", "body.input", "'input'"),
    "item": (
        {"input": [*USER, {"type": "item_reference", "id": "x"}]},
        "unsupported_parameter",
        "body.input[1].type",
        "'item_reference'",
    ),
    "role": (
        {"input": [{"role": "tool", "content": "x"}]},
        "invalid_value",
        "body.input[0].role",
        "",
    ),
    "image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,x"}]}]},
        "unsupported_parameter",
        "body.input[0].content[0].type",
        "write input_text and output_text",
    ),
    "orphan": (
        {"input": [*USER, {"type": "function_call_output", "call_id": "c", "output": "x"}]},
        "invalid_messages",
        "body.input[1].call_id",
        "names none",
    ),
    "unnamed call": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "", "arguments": ""}]},
        "invalid_value",
        "body.input[0].function.name",
        "",
    ),
    "chat's max_tokens": ({"max_tokens": 5}, "unsupported_parameter", "body.max_tokens", ""),
    "no tokens": ({"max_output_tokens": 0}, "invalid_value", "body.max_output_tokens", ">= 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_chat_means_is_refused_with_a_reason(name: str) -> None:
    body, code, param, words = REFUSED[name]
    error = refusal({"input": "Hi"} | body)
    assert (error.error_code, error.param) == (code, param)
    assert words in error.message


def test_what_an_engine_cannot_do_is_told_in_the_words_of_a_response() -> None:
    form = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    few = Capabilities(model="m", engine="e", parameters=("max_completion_tokens",))
    asked = {"input": "Hi", "text": form}
    assert refusal(asked, few).param == "body.text.format"
    error = refusal({"input": "Hi", "include": ["message.output_text.logprobs"]}, few)
    assert (error.param, error.message) == (
        "body.include",
        "Parameter `include` is not supported by engine e.",
    )
    terms = Sketcher(RESPONSES).sketch(line_of(asked)).terms
    assert [where for _, where in terms.list_schemas()] == ["text.format"]


# --- answered ---


def answer(result: Result, asked: dict[str, Any] | None = None) -> Response:
    """Return what the official client makes of an answer, strictly."""
    request: Request = read({"input": "Hi"} | (asked or {})).to_request(1)
    line = render_result(
        result,
        custom_id="c",
        request_id="ab",
        endpoint=RESPONSES,
        model="m",
        created=99,
        request=request,
    )
    return Response.model_validate(json.loads(line)["response"]["body"], strict=True)


def test_an_answer_is_a_response_that_the_official_client_reads() -> None:
    found = answer(
        Result(id=1, text="Ho", usage=USAGE),
        {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 8},
    )
    assert (found.id, found.object, found.model, found.created_at) == (
        "resp_ab",
        "response",
        "m",
        99,
    )
    assert (found.status, found.incomplete_details, found.error) == ("completed", None, None)
    assert found.output_text == "Ho"
    assert [one.type for one in found.output] == ["message"]
    assert (found.temperature, found.top_p, found.max_output_tokens) == (0.5, 0.9, 8)
    usage = found.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 5, 12)
    assert usage.input_tokens_details.cached_tokens == 3


def test_an_answer_that_was_cut_is_incomplete() -> None:
    found = answer(Result(id=1, text="Ho", finish_reason="length"))
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.output[0].type == "message"
    assert found.output[0].status == "incomplete"


def test_calls_of_an_answer_are_items_and_the_tools_are_told_again() -> None:
    calls = (ToolCall("look", '{"city":"Bern"}'), ToolCall("look", "{}", "given"))
    found = answer(
        Result(id=1, text="", tool_calls=calls),
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}},
    )
    assert [one.type for one in found.output] == ["function_call"] * 2
    first, second = found.output
    assert first.type == second.type == "function_call"
    assert (first.name, first.arguments, second.call_id) == ("look", '{"city":"Bern"}', "given")
    assert len({first.call_id, second.call_id, first.id, second.id}) == 4
    assert found.tools[0].type == "function"
    assert (found.tools[0].name, found.tools[0].parameters) == ("look", PARAMETERS)
    assert found.tool_choice.name == "look"  # type: ignore[union-attr]  # as it was asked
    # What was answered can be put into the next line as it is.
    output = [{"type": "function_call_output", "call_id": first.call_id, "output": "sun"}]
    history = [*USER, *(one.model_dump(mode="json") for one in found.output), *output]
    for item in history:
        for name in [name for name, value in item.items() if value is None]:
            del item[name]
    assert read({"input": history}).messages is not None


def test_text_and_calls_of_one_answer_are_items_of_their_own() -> None:
    found = answer(Result(id=1, text="I look.", tool_calls=(ToolCall("look", "{}"),)))
    assert [one.type for one in found.output] == ["message", "function_call"]
    assert found.output_text == "I look."


def test_reasoning_is_an_item_of_its_own() -> None:
    found = answer(Result(id=1, text="<think>hm</think>Ho"))
    first = found.output[0]
    assert first.type == "reasoning"
    assert first.content is not None
    assert first.content[0].text == "hm"
    assert found.output_text == "Ho"


def test_logprobs_stand_with_the_text() -> None:
    logprobs = (TokenLogprob(b"Ho", -0.5, ((b"Ho", -0.5), (b"x", -1.0))),)
    found = answer(
        Result(id=1, text="Ho", logprobs=logprobs),
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    )
    message = found.output[0]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert (part.logprobs[0].token, part.logprobs[0].logprob) == ("Ho", -0.5)
    assert [one.token for one in part.logprobs[0].top_logprobs] == ["Ho", "x"]
    assert found.top_logprobs == 2


def test_a_failed_response_has_the_error_of_every_endpoint() -> None:
    error = LineError(code="output_invalid", message="m", status_code=422)
    line = render_result(
        Result(id=1, text="raw", error=error, usage=USAGE),
        custom_id="c",
        request_id="ab",
        endpoint=RESPONSES,
        model="m",
        created=99,
    )
    body = json.loads(line)["response"]["body"]
    assert body["error"]["code"] == "output_invalid"
    assert (body["raw_text"], body["usage"]["input_tokens"]) == ("raw", 7)
