"""Responses, the newer of OpenAI's two ways to ask for an answer: read as chats, written as theirs.

A body is translated to the chat that means the same, so that everything behind it (sketches,
equal requests, engines) knows of chats only. What a chat has no word for is refused, and why.

Source: `/v1/responses` of OpenAI's API, and the types of its Python client.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from jobs.domain.errors import InvalidLine
from jobs.domain.slow import explain, quoted
from jobs.domain.tools import Tools, WireCall, WireChoice, WireFunction, WireTool
from jobs.domain.wire import (
    ChatBody,
    FlatSchema,
    JsonObject,
    JsonSchema,
    NamedSchema,
    Part,
    PlainText,
    ResponsesBody,
    TextPart,
    WireMessage,
)

RESPONSES = "/v1/responses"

_LOGPROBS = "message.output_text.logprobs"
# What these may hold beside nothing, and why they may hold nothing else.
_REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "background": ((False,), "every line of a batch runs in the background; leave it out"),
    "conversation": ((), "nothing is stored between requests; write its items into `input`"),
    "max_tool_calls": ((), "it counts calls of built-in tools, and there are none"),
    "previous_response_id": (
        (),
        "nothing is stored between requests; write the earlier items into `input`",
    ),
    "prompt": ((), "prompt templates are kept at OpenAI; write the prompt into `input`"),
    "truncation": (
        ("disabled",),
        "a prompt is never cut, one that is too long is an error; leave it out",
    ),
}
# How a chat calls what a response has another name for.
_NAMES = {
    "response_format": "text.format",
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
}
_T = TypeVar("_T")
_Status = Literal["in_progress", "completed", "incomplete"]


class Translated(ChatBody, kw_only=True, forbid_unknown_fields=True):
    """The chat that means the same as a response."""


# --- items, parts and tools, each by the name of its type ---


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"
    id: str | None = None
    status: _Status | None = None
    phase: None = None


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: _Status | None = None


class _CallOutput(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: _Status | None = None


class _Text(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["input_text", "output_text", "text"]
    text: str
    # What an answer says of its text, which goes into the next turn's history as it is.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class _Function(WireFunction, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]


class _Named(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


# --- reading ---


def translate(body: ResponsesBody) -> Translated:
    """Return the chat that means the same.

    Raises:
        InvalidLine: no chat does.
    """
    for name, (fine, why) in _REFUSED.items():
        value = getattr(body, name)
        if value is not None and value not in fine:
            raise _unsupported(f"`{name}` is not supported with this value: {why}.", f"body.{name}")
    if body.reasoning:
        _check_reasoning(body.reasoning)
    if body.text is not None and body.text.verbosity is not None:
        raise _unsupported(
            "`text.verbosity` is not supported: no local model knows it; ask for it in the prompt.",
            "body.text.verbosity",
        )
    return Translated(
        model=body.model,
        messages=_read_input(body),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=body.stop,
        ignore_eos=body.ignore_eos,
        repetition_penalty=body.repetition_penalty,
        min_p=body.min_p,
        structured_outputs=body.structured_outputs,
        stream=body.stream,
        logprobs=_wants_logprobs(body),
        top_logprobs=body.top_logprobs,
        response_format=_read_form(body.text.format) if body.text is not None else None,
        tools=[_read_tool(one, f"body.tools[{n}]") for n, one in enumerate(body.tools)]
        if body.tools
        else None,
        tool_choice=_read_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
    )


def in_its_words(error: InvalidLine) -> InvalidLine:
    """Return what is wrong with a chat as something that is wrong with the response it was."""
    message, param = error.message, error.param or ""
    for chat, name in _NAMES.items():
        message = message.replace(f"`{chat}`", f"`{name}`")
        if param == f"body.{chat}" or param.startswith(f"body.{chat}."):
            param = f"body.{name}"
    return InvalidLine(message, param=param or None, error_code=error.error_code)


def _unsupported(message: str, param: str) -> InvalidLine:
    return InvalidLine(message, param=param, error_code="unsupported_parameter")


def _convert(value: object, to: type[_T], at: str) -> _T:
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise explain(error, at=at) from None


def _check_reasoning(reasoning: Mapping[str, object]) -> None:
    for name, value in reasoning.items():
        if value is not None:
            raise _unsupported(
                f"`reasoning.{quoted(name)}` is not supported: local models have no such setting; "
                "what a model thinks is told apart in its answer.",
                f"body.reasoning.{quoted(name)}",
            )


def _wants_logprobs(body: ResponsesBody) -> bool | None:
    for number, name in enumerate(body.include or ()):
        if name != _LOGPROBS:
            raise _unsupported(
                f"Answers include no {quoted(name)!r}; {_LOGPROBS!r} is what can be asked for.",
                f"body.include[{number}]",
            )
    if body.include:
        return True
    if body.top_logprobs:
        raise InvalidLine(
            f"top_logprobs needs {_LOGPROBS!r} in `include`.",
            param="body.top_logprobs",
            error_code="invalid_value",
        )
    return None


def _read_form(
    form: PlainText | JsonObject | FlatSchema | None,
) -> PlainText | JsonObject | JsonSchema | None:
    if isinstance(form, FlatSchema):
        return JsonSchema(NamedSchema(form.name, form.schema, form.description, form.strict))
    return form


def _read_tool(tool: dict[str, Any], at: str) -> WireTool:
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "function":
        raise _unsupported(
            f"Tool {quoted(kind)!r} runs at OpenAI and not here; only functions, which the caller "
            "runs, can be offered.",
            f"{at}.type",
        )
    found = _convert(tool, _Function, at)
    return WireTool(
        "function",
        WireFunction(found.name, found.description, found.parameters, found.strict),
    )


def _read_choice(
    choice: str | dict[str, Any] | None,
) -> Literal["none", "auto", "required"] | WireChoice | None:
    at = "body.tool_choice"
    if choice is None:
        return None
    if isinstance(choice, str):
        return _convert(choice, Literal["none", "auto", "required"], at)  # type: ignore[arg-type]  # msgspec takes it
    kind = choice.get("type")
    if isinstance(kind, str) and kind != "function":
        raise _unsupported(
            f"A tool_choice of type {quoted(kind)!r} is not supported; name one function, or say "
            "none, auto or required.",
            f"{at}.type",
        )
    named = _convert(choice, _Named, at)
    return msgspec.convert({"type": "function", "function": {"name": named.name}}, WireChoice)


def _read_input(body: ResponsesBody) -> list[WireMessage]:
    messages: list[WireMessage] = []
    if body.instructions is not None:
        messages.append(WireMessage("system", body.instructions))
    if isinstance(body.input, str):
        messages.append(WireMessage("user", body.input))
        return messages
    num_before = len(messages)
    called: set[str] = set()
    for number, item in enumerate(body.input):
        at = f"body.input[{number}]"
        kind = item.get("type", "message")
        read = _ITEMS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise _unsupported(
                f"Items of type {quoted(str(kind))!r} are not supported; a batch line takes "
                f"{', '.join(_ITEMS)}.",
                f"{at}.type",
            )
        read(item, messages, called, at)
    if len(messages) == num_before:
        raise InvalidLine(
            "`input` holds no message.", param="body.input", error_code="invalid_value"
        )
    return messages


def _add_message(
    item: dict[str, Any], messages: list[WireMessage], _called: set[str], at: str
) -> None:
    message = _convert(item, _Message, at)
    messages.append(WireMessage(message.role, _read_content(message.content, f"{at}.content")))


def _add_call(item: dict[str, Any], messages: list[WireMessage], called: set[str], at: str) -> None:
    """Read a call into the assistant's turn that it belongs to, as a chat has it."""
    call = _convert(item, _Call, at)
    named = {"name": call.name, "arguments": call.arguments}
    read = _convert({"id": call.call_id, "function": named}, WireCall, at)
    called.add(call.call_id)
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant":
        last = WireMessage("assistant", None)
        messages.append(last)
    last.tool_calls = [*(last.tool_calls or ()), read]


def _add_output(
    item: dict[str, Any], messages: list[WireMessage], called: set[str], at: str
) -> None:
    given = _convert(item, _CallOutput, at)
    if given.call_id not in called:
        raise InvalidLine(
            "A function_call_output answers a function_call before it; this call_id names none.",
            param=f"{at}.call_id",
            error_code="invalid_messages",
        )
    text = _read_content(given.output, f"{at}.output")
    messages.append(WireMessage("tool", text, tool_call_id=given.call_id))


def _skip(_item: dict[str, Any], _messages: list[WireMessage], _called: set[str], _at: str) -> None:
    """Leave out what a model said to itself, as a chat does with an earlier turn's reasoning."""


_ITEMS: Mapping[str, Callable[[dict[str, Any], list[WireMessage], set[str], str], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_output,
    "reasoning": _skip,
}


def _read_content(content: str | Sequence[dict[str, Any]], at: str) -> str | list[Part]:
    """Return what a chat's message holds for the content of an item."""
    if isinstance(content, str):
        return content
    parts: list[Part] = []
    for number, part in enumerate(content):
        kind = part.get("type")
        if isinstance(kind, str) and kind not in {"input_text", "output_text", "text"}:
            raise _unsupported(
                f"Parts of type {quoted(kind)!r} are not supported in a response; write "
                "input_text and output_text.",
                f"{at}[{number}].type",
            )
        parts.append(TextPart(_convert(part, _Text, f"{at}[{number}]").text))
    return parts


# --- writing ---


def render_usage(usage: Mapping[str, Any]) -> dict[str, object]:
    """Return the usage of a chat as a response tells it; how much was reasoning nobody counts."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def render_response(
    request_id: str,
    message: Mapping[str, Any],
    *,
    logprobs: object,
    is_cut: bool,
    tools: Tools | None,
) -> dict[str, object]:
    """Return the body of a response that says the same as the message of a chat.

    Args:
        message: of the assistant, as a chat tells it.
        logprobs: of its tokens, as a chat tells them; None: not asked for.
        is_cut: whether it may have wanted to say more.
        tools: what was offered.
    """
    status = "incomplete" if is_cut else "completed"
    output: list[dict[str, object]] = []
    if message.get("reasoning") is not None:
        thought = {"type": "reasoning_text", "text": message["reasoning"]}
        output.append(
            {"id": f"rs_{request_id}", "type": "reasoning", "summary": [], "content": [thought]}
        )
    calls = message.get("tool_calls", ())
    if message["content"] or not calls:
        text: dict[str, object] = {
            "type": "output_text",
            "text": message["content"] or "",
            "annotations": [],
        }
        if logprobs is not None:
            text["logprobs"] = logprobs
        output.append(
            {
                "id": f"msg_{request_id}",
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": [text],
            }
        )
    output += [
        {
            "id": f"fc_{request_id}_{number}",
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
            "status": "completed",
        }
        for number, call in enumerate(calls)
    ]
    return {
        "id": f"resp_{request_id}",
        "object": "response",
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": output,
        "background": False,
        "truncation": "disabled",
        "previous_response_id": None,
        **_render_tools(tools),
    }


def _render_tools(tools: Tools | None) -> dict[str, object]:
    if tools is None:
        return {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    offered = [
        {
            "type": "function",
            "name": tool.function.name,
            "description": tool.function.description,
            "parameters": tool.function.parameters,
            "strict": tool.function.strict,
        }
        for tool in msgspec.json.decode(tools.spec, type=list[WireTool])
    ]
    choice: object = tools.choice
    if tools.choice not in {"auto", "required"}:
        choice = {"type": "function", "name": tools.choice}
    return {"tools": offered, "tool_choice": choice, "parallel_tool_calls": tools.is_parallel}
