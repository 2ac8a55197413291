"""What a model said, taken apart: its reasoning, its words, and the tools it wants called.

Models write calls in many ways; which one a model learned stands in its chat template only. So
every common form is looked for, the marked ones anywhere in the text, the bare ones (JSON or Python
without a mark around it) only where they are the whole answer and name tools that were offered.

    text ─► reasoning | rest ─► marked blocks, or all of it as bare calls ─► calls, what is left

Source: the formats as the chat templates of Qwen, Hermes, Llama 3 and 4, Mistral, DeepSeek,
Granite, GLM, Kimi, Phi, InternLM and gpt-oss render an assistant's own calls.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jobs.domain.nesting import is_nested_deeper
from jobs.domain.reasoning import begins_with_thought, split_reasoning
from jobs.domain.request import Constraint
from jobs.domain.tools import ToolCall, Tools, schemas_of

_MAX_PYTHON_CHARS = 100_000
_SPACE = " \t\r\n"
_json = json.JSONDecoder()
Schemas = Mapping[str, Mapping[str, Any]]
"""The parameters' JSON schema of each tool on offer, by the tool's name."""


class Speech(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, taken apart.

    Attributes:
        content: what is said to the user.
        reasoning: what the model said to itself before; None where it did not.
        tool_calls: what it wants called, in its order.
        complaint: what is wrong with a call that it tried to write; never the model's own words.
    """

    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    complaint: str = ""


class _Malformed(Exception):
    """A marked call cannot be read; the text says what is wrong."""


def takes_tools(template: str) -> bool:
    """Return whether a chat template shows the model what tools there are."""
    return "tools" in template


def take_apart(text: str, *, tools: Schemas, is_cut: bool = False) -> Speech:
    """Return an answer's parts.

    Args:
        tools: what was offered; empty: nothing is looked for, all is content.
        is_cut: whether it ends where its tokens ran out.
    """
    is_deep = is_nested_deeper(text.encode(errors="replace"))
    if "<|channel|>" in text:
        return _channels(text, {} if is_deep else tools)
    reasoning, rest = split_reasoning(text)
    if not tools:
        return Speech(content=rest, reasoning=reasoning)
    if reasoning is not None and not begins_with_thought(text) and _begins_with_call(reasoning):
        reasoning, rest = None, text  # the end of a thought is quoted in an argument
    if is_cut and _ends_inside_call(rest):
        return Speech(content=rest, reasoning=reasoning, complaint="a tool call has no end")
    if is_deep:
        complaint = "a tool call is nested too deep" if _MARK.search(rest) else ""
        return Speech(content=rest, reasoning=reasoning, complaint=complaint)
    try:
        calls, content = _marked(rest, tools)
        if not calls:
            bare = _bare(rest, tools)
            if bare is not None:
                calls, content = bare, ""
    except _Malformed as error:
        return Speech(content=rest, reasoning=reasoning, complaint=str(error))
    return Speech(
        content=content.strip() if calls else rest, reasoning=reasoning, tool_calls=tuple(calls)
    )


class Offer(msgspec.Struct, frozen=True):
    """The tools of a request, ready to hold answers against them."""

    schemas: Schemas
    constraints: Mapping[str, Constraint]


def open_offer(tools: Tools) -> Offer:
    """Return what a request offers."""
    schemas = schemas_of(tools)
    return Offer(
        schemas,
        {
            name: Constraint("json_schema", msgspec.json.encode(schema).decode())
            for name, schema in schemas.items()
        },
    )


def judge(
    calls: Sequence[ToolCall],
    tools: Tools,
    offer: Offer,
    *,
    validate: Callable[[Constraint, str], str | None],
) -> str | None:
    """Return why calls are not what was asked for, or None where they are; quotes nothing.

    Args:
        validate: says why a text breaks a constraint; see `engine.sandbox`.
    """
    if tools.is_forced and not calls:
        return "it calls no tool"
    if len(calls) > 1 and not (tools.is_parallel and tools.choice in {"auto", "required"}):
        return "it calls more than one tool"
    for call in calls:
        constraint = offer.constraints.get(call.name)
        if constraint is None:
            return "it calls a tool that was not offered"
        if tools.choice not in {"auto", "required", call.name}:
            return "it calls another tool than the one that was asked for"
        reason = validate(constraint, call.arguments)
        if reason is not None:
            return f"the arguments of a tool call do not fit: {reason}"
    return None


# --- one call, however it is written ---


def _call(name: object, arguments: object, tools: Schemas) -> ToolCall:
    """Return a call whose parts have been found.

    Raises:
        _Malformed: there is no such tool, or its arguments are no object.
    """
    if not isinstance(name, str) or name.removeprefix("functions.") not in tools:
        raise _Malformed("the answer calls a tool that was not offered")
    if isinstance(arguments, str):
        arguments = _load(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _Malformed("the arguments of a tool call are not a JSON object")
    return ToolCall(name.removeprefix("functions."), json.dumps(arguments, ensure_ascii=False))


def _from_object(value: object, tools: Schemas) -> ToolCall:
    if not isinstance(value, dict):
        raise _Malformed("a tool call is not a JSON object")
    function = value.get("function")
    if isinstance(function, dict):
        value = function
        function = None
    name = value.get("name", function if function is not None else value.get("tool"))
    for key in ("arguments", "parameters", "args", "input"):
        if key in value:
            return _call(name, value[key], tools)
    return _call(name, {}, tools)


def _from_json(value: object, tools: Schemas) -> list[ToolCall]:
    values = value if isinstance(value, list) else [value]
    return [_from_object(one, tools) for one in values]


def _load(text: str) -> Any:  # noqa: ANN401 -- any JSON
    value, end = _load_first(text, 0)
    if text[end:].strip():
        raise _Malformed("a tool call is not valid JSON")
    return value


def _load_first(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and where it ends."""
    while start < len(text) and text[start] in _SPACE:
        start += 1
    try:
        return _json.raw_decode(text, start)
    except (ValueError, RecursionError):  # a quote that stands by itself hides its depth
        raise _Malformed("a tool call is not valid JSON") from None


# --- marked calls ---

_Reader = Callable[[str, int, Schemas], tuple[list[ToolCall], int]]
"""Reads what stands behind a mark: text, place, tools -> calls, place behind them."""

_XML_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\s]+)>(.*?)(?:</parameter>|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\s*```(?:json|tool_call|tool_code|python)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_NAME = re.compile(r"\s*(?:functions\.)?([\w.-]+?)(?::\d+)?\s*(?=\{|\[ARGS\]|\[CALL_ID\]|<|\Z)")


def _until(text: str, start: int, end_mark: str) -> tuple[str, int]:
    """Return what stands before a closing mark (or the end), and the place behind it."""
    end = text.find(end_mark, start)
    return (text[start:], len(text)) if end < 0 else (text[start:end], end + len(end_mark))


def _typed(name: str, key: str, text: str, tools: Schemas) -> object:
    """Return a parameter that was written as plain text, as its schema means it."""
    properties = tools.get(name, {}).get("properties")
    schema = properties.get(key) if isinstance(properties, dict) else None
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _from_xml(body: str, tools: Schemas) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for name, inner in _XML_FUNCTION.findall(body):
        if inner.lstrip().startswith("{"):
            calls.append(_call(name, inner, tools))
            continue
        arguments = {
            key: _typed(name, key, value.removeprefix("\n").removesuffix("\n"), tools)
            for key, value in _XML_PARAMETER.findall(inner)
        }
        calls.append(_call(name, arguments, tools))
    return calls


def _read_tagged(text: str, start: int, tools: Schemas) -> tuple[list[ToolCall], int]:
    """Read `<tool_call>`: JSON (Hermes, Qwen), XML (Qwen coder) or keys and values (GLM)."""
    body, end = _until(text, start, "</tool_call>")
    fenced = _FENCE.fullmatch(body)
    body = fenced[1] if fenced else body
    if body.lstrip().startswith("<function="):
        return _from_xml(body, tools), end
    if "<arg_key>" in body:
        name = body.partition("<arg_key>")[0].strip()
        arguments = {
            key.strip(): _typed(name, key.strip(), value, tools)
            for key, value in _ARGUMENT.findall(body)
        }
        return [_call(name, arguments, tools)], end
    if body.strip() in tools:
        return [_call(body.strip(), {}, tools)], end
    return list(_objects(body, tools)), end


def _objects(text: str, tools: Schemas) -> Iterator[ToolCall]:
    """Yield the calls of JSON values that stand behind each other, or behind semicolons."""
    place = 0
    while True:
        while place < len(text) and text[place] in " \t\r\n;,":
            place += 1
        if place == len(text):
            return
        value, place = _load_first(text, place)
        yield from _from_json(value, tools)


def _read_function(text: str, start: int, tools: Schemas) -> tuple[list[ToolCall], int]:
    """Read `<function=name>`, whose mark is part of what is read."""
    start = text.rindex("<function=", 0, start)
    body, end = _until(text, start, "</function>")
    return _from_xml(body, tools), end


def _read_values(text: str, start: int, tools: Schemas) -> tuple[list[ToolCall], int]:
    """Read JSON values, objects or lists, for as long as they follow each other."""
    calls: list[ToolCall] = []
    place = start
    while True:
        ahead = place
        while ahead < len(text) and text[ahead] in " \t\r\n;":
            ahead += 1
        if not text.startswith(("{", "["), ahead):
            break
        value, place = _load_first(text, ahead)
        calls += _from_json(value, tools)
    if not calls:
        raise _Malformed("a tool call is not valid JSON")
    return calls, place


def _read_mistral(text: str, start: int, tools: Schemas) -> tuple[list[ToolCall], int]:
    """Read `[TOOL_CALLS]`: a list, or a name and arguments, newer ones with `[ARGS]` between."""
    if text[start:].lstrip().startswith(("[", "{")):
        return _read_values(text, start, tools)
    found = _NAME.match(text, start)
    if found is None:
        raise _Malformed("a tool call has no name")
    place = found.end()
    if text.startswith("[CALL_ID]", place):
        place = max(place, text.find("[ARGS]", place))
    if text.startswith("[ARGS]", place):
        place += len("[ARGS]")
    arguments, place = _load_first(text, place)
    return [_call(found[1], arguments, tools)], place


def _read_deepseek(text: str, start: int, tools: Schemas) -> tuple[list[ToolCall], int]:
    """Read one call between DeepSeek's marks: `function<sep>name` and a fence, or `name<sep>{}`."""
    body, end = _until(text, start, "<｜tool▁call▁end｜>")  # noqa: RUF001 -- as they are spelled
    kind, _, rest = body.partition("<｜tool▁sep｜>")  # noqa: RUF001
    if kind.strip() == "function":
        name, _, rest = rest.partition("\n")
        fenced = _FENCE.fullmatch(rest)
        return [_call(name.strip(), fenced[1] if fenced else rest, tools)], end
    return [_call(kind.strip(), rest, tools)], end


def _read_kimi(text: str, start: int, tools: Schemas) -> tuple[list[ToolCall], int]:
    body, end = _until(text, start, "<|tool_call_end|>")
    name, _, arguments = body.partition("<|tool_call_argument_begin|>")
    name = name.strip().removeprefix("functions.").partition(":")[0]
    return [_call(name, arguments, tools)], end


def _read_plugin(text: str, start: int, tools: Schemas) -> tuple[list[ToolCall], int]:
    body, end = _until(text, start, "<|action_end|>")
    return _from_json(_load(body), tools), end


_READERS: dict[str, _Reader] = {
    "<tool_call>": _read_tagged,
    "<function=": _read_function,
    "<|tool_call|>": _read_values,
    "<tool_calls>": _read_values,
    "<|python_tag|>": _read_values,
    "[TOOL_CALLS]": _read_mistral,
    "[AVAILABLE_TOOLS]": _read_values,
    "functools": _read_values,
    "<|action_start|><|plugin|>": _read_plugin,
    "<｜tool▁call▁begin｜>": _read_deepseek,  # noqa: RUF001
    "<|tool_call_begin|>": _read_kimi,
}
_FRAMES = re.compile(
    r"</tool_calls>|<｜tool▁calls▁(?:begin|end)｜>|<\|tool_calls_section_(?:begin|end)\|>"  # noqa: RUF001
)
"""Marks around all calls of an answer, which say nothing beside those of each call."""
_MARK = re.compile(
    "|".join(
        r"functools(?=\[)" if mark == "functools" else re.escape(mark)
        for mark in sorted(_READERS, key=len, reverse=True)
    )
)


def _marked(text: str, tools: Schemas) -> tuple[list[ToolCall], str]:
    """Return the calls between marks, and the text without them."""
    calls: list[ToolCall] = []
    kept: list[str] = []
    place = 0
    while (found := _MARK.search(text, place)) is not None:
        kept.append(text[place : found.start()])
        read, place = _READERS[found[0]](text, found.end(), tools)
        calls += read
    kept.append(text[place:])
    return calls, _FRAMES.sub("", "".join(kept))


def _begins_with_call(text: str) -> bool:
    return text.startswith(("{", "[")) or _MARK.search(text) is not None


def _ends_inside_call(text: str) -> bool:
    """Return whether a call without an end is of a form which would be taken for whole.

    That of JSON would not be.
    """
    for mark, end in (("<tool_call>", "</tool_call>"), ("<function=", "</function>")):
        begun = text.rfind(mark)
        if begun <= text.rfind(end):
            continue
        inner = text[begun + len(mark) :]
        if mark == "<function=":
            inner = inner.partition(">")[2]
        elif "<function=" in inner:
            continue
        if not inner.lstrip().startswith(("{", "[", "```")):
            return True
    return False


# --- bare calls ---


def _bare(text: str, tools: Schemas) -> list[ToolCall] | None:
    """Return the calls that an answer without marks is, or None where it is something else."""
    body = text.strip()
    if (fenced := _FENCE.fullmatch(body)) is not None:
        body = fenced[1].strip()
    if not body.startswith(("{", "[")) or not body.endswith(("}", "]")):
        return None
    try:
        return list(_objects(body, tools)) or None
    except _Malformed:
        return _pythonic(body, tools)


def _pythonic(body: str, tools: Schemas) -> list[ToolCall] | None:
    """Return the calls of `[f(a=1), g()]`, or None where it is something else."""
    if not body.startswith("[") or len(body) > _MAX_PYTHON_CHARS:
        return None
    try:
        listed = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(listed, ast.List) or not listed.elts:
        return None
    calls: list[ToolCall] = []
    for one in listed.elts:
        if not isinstance(one, ast.Call) or one.args:
            return None
        try:
            arguments = {
                keyword.arg: ast.literal_eval(keyword.value)
                for keyword in one.keywords
                if keyword.arg is not None
            }
            calls.append(_call(ast.unparse(one.func), arguments, tools))
        except (ValueError, TypeError, RecursionError, _Malformed):
            return None
    return calls


# --- channels of gpt-oss ---

_CHANNEL = re.compile(
    r"<\|channel\|>(?P<name>\w+)(?P<header>[^<]*)(?:<\|constrain\|>\w*)?\s*<\|message\|>"
    r"(?P<text>.*?)(?=<\|end\|>|<\|call\|>|<\|return\|>|<\|start\|>|<\|channel\|>|\Z)",
    re.DOTALL,
)
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


def _channels(text: str, tools: Schemas) -> Speech:
    """Return what was said in the channels of the harmony format."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    complaint = ""
    for found in _CHANNEL.finditer(text):
        begin = max(0, text.rfind("<|start|>", 0, found.start()))
        recipient = _RECIPIENT.search(found["header"]) or _RECIPIENT.search(
            text, begin, found.start()
        )
        if recipient is not None and tools:
            try:
                calls.append(_call(recipient[1], found["text"], tools))
            except _Malformed as error:
                complaint = str(error)
        elif found["name"] == "final":
            content.append(found["text"])
        elif found["name"] == "analysis":
            reasoning.append(found["text"])
        else:
            content.append(found["text"])
    return Speech(
        content="".join(content),
        reasoning="\n".join(reasoning) or None,
        tool_calls=tuple(calls),
        complaint=complaint,
    )
