"""Tools as a line offers them: checked, and where one has to be called, as a schema of the answer.

Source: `tools`, `tool_choice` and `parallel_tool_calls` of OpenAI's chat completions.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from jobs.domain.errors import InvalidLine
from jobs.domain.nesting import MAX_NESTING, is_nested_deeper

MAX_TOOLS = 128
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


class ToolCall(msgspec.Struct, frozen=True, array_like=True):
    """One tool to be called; `arguments` is the text of a JSON object, as in OpenAI's API.

    `id` is what the tool's answer refers to; empty until somebody gives it one.
    """

    name: str
    arguments: str
    id: str = ""


class Tools(msgspec.Struct, frozen=True, array_like=True):
    """What a model may call.

    `spec` is the JSON text of the list of tools, as OpenAI's API spells it; `choice` is "auto"
    where one may be called, "required" where one has to be, and the name of the one that has to
    be; `is_parallel` says whether one answer may hold several calls.
    """

    spec: str
    choice: str = "auto"
    is_parallel: bool = True

    @property
    def is_forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice != "auto"


# --- wire types ---


class WireFunction(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A function on offer; `parameters` is a JSON schema."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class WireTool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool on offer; only functions can be called from a batch."""

    type: Literal["function"]
    function: WireFunction


class _NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class WireChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The one function that has to be called."""

    type: Literal["function"]
    function: _NamedFunction


class _CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    arguments: str


class WireCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call that an assistant's turn made."""

    id: Annotated[str, msgspec.Meta(max_length=256)]
    function: _CalledFunction
    type: Literal["function"] = "function"

    def to_call(self) -> ToolCall:
        """Return the call."""
        return ToolCall(self.function.name, self.function.arguments, self.id)


def read_tools(
    tools: Sequence[WireTool],
    choice: Literal["none", "auto", "required"] | WireChoice | None,
    *,
    is_parallel: bool,
) -> Tools | None:
    """Return what a line offers; None where nothing may be called.

    Raises:
        InvalidLine: tools and choice contradict each other.
    """
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise _contradiction("Two tools have the same name.", "body.tools")
    if len(names) > MAX_TOOLS:
        raise _contradiction(f"A line offers {MAX_TOOLS} tools at most.", "body.tools")
    if isinstance(choice, WireChoice):
        if choice.function.name not in names:
            raise _contradiction(
                "tool_choice names a function that is not among the tools.", "body.tool_choice"
            )
        chosen = choice.function.name
    elif choice == "none":
        return None
    elif not names:
        if choice == "required":
            raise _contradiction(
                "tool_choice is required, but there are no tools.", "body.tool_choice"
            )
        return None
    else:
        chosen = choice or "auto"
    try:
        spec = msgspec.json.encode(tools)
    except RecursionError:
        spec = b""
    if not spec or is_nested_deeper(spec):
        raise InvalidLine(
            f"The tools are nested more than {MAX_NESTING} levels deep.",
            param="body.tools",
            error_code="nesting_too_deep",
        )
    return Tools(spec.decode(), chosen, is_parallel)


def _contradiction(message: str, param: str) -> InvalidLine:
    return InvalidLine(message, param=param, error_code="invalid_value")


def schemas_of(tools: Tools) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each tool's arguments, by the tool's name."""
    offered = msgspec.json.decode(tools.spec, type=list[WireTool])
    return {
        tool.function.name: tool.function.parameters
        # OpenAI's: without parameters a function takes none.
        or {"type": "object", "properties": {}, "additionalProperties": False}
        for tool in offered
    }


def forced_schema(tools: Tools) -> str:
    """Return the JSON text of the schema of an answer that has to be calls.

    The answer is a list of objects with a name and arguments, which is a form that every model
    can be held to, whatever form its own training gave it.
    """
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for number, (name, parameters) in enumerate(schemas_of(tools).items()):
        if tools.choice not in {"required", name}:
            continue
        # References count from the root of the schema, which each tool's own is no longer.
        key = f"tool{number}"
        definitions[key] = _moved(parameters, f"#/$defs/{key}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{key}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    answer: dict[str, Any] = {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        "$defs": definitions,
    }
    if not tools.is_parallel or tools.choice != "required":
        answer["maxItems"] = 1
    return msgspec.json.encode(answer).decode()


def _moved(schema: object, to: str) -> object:
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: to + value[1:]
        if name in _REFERENCES and isinstance(value, str) and value.startswith("#")
        else _moved(value, to)
        for name, value in schema.items()
    }
