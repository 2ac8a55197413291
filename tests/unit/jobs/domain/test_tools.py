"""Tools that a line offers, and the schema of an answer that has to call one."""

import json
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from jobs.domain.errors import InvalidLine
from jobs.domain.tools import Tools, WireChoice, WireTool, forced_schema, read_tools, schemas_of

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "$defs": {"city": {"type": "string", "minLength": 2}},
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


def tools_of(*tools: dict[str, Any]) -> list[WireTool]:
    return msgspec.convert(list(tools), list[WireTool])


def offer(*tools: dict[str, Any], choice: Any = None, is_parallel: bool = True) -> Tools:  # noqa: ANN401
    if isinstance(choice, str) and choice not in {"auto", "required", "none"}:
        choice = msgspec.convert({"type": "function", "function": {"name": choice}}, WireChoice)
    read = read_tools(tools_of(*tools), choice, is_parallel=is_parallel)
    assert read is not None
    return read


def test_a_tool_may_be_called_unless_the_line_says_otherwise() -> None:
    assert offer(WEATHER).choice == "auto"
    assert not offer(WEATHER).is_forced
    assert offer(WEATHER, choice="required").is_forced
    assert read_tools(tools_of(WEATHER), "none", is_parallel=True) is None
    assert read_tools([], None, is_parallel=True) is None


@pytest.mark.parametrize(
    ("tools", "choice", "complaint"),
    [
        ([NOW, NOW], None, "same name"),
        ([], "required", "there are no tools"),
        ([NOW], "get_weather", "not among the tools"),
        (
            [NOW | {"function": {"name": f"f{i}"}} for i in range(129)],
            None,
            "at most",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    tools: list[dict[str, Any]], choice: str | None, complaint: str
) -> None:
    with pytest.raises(InvalidLine, match=complaint):
        read_tools(
            tools_of(*tools),
            msgspec.convert({"type": "function", "function": {"name": choice}}, WireChoice)
            if choice == "get_weather"
            else choice,  # type: ignore[arg-type]
            is_parallel=True,
        )


def test_a_function_without_parameters_takes_none() -> None:
    schema = schemas_of(offer(NOW))["now"]
    assert jsonschema_rs.is_valid(schema, {})
    assert not jsonschema_rs.is_valid(schema, {"a": 1})


@pytest.mark.parametrize(
    ("answer", "is_good"),
    [
        ([{"name": "get_weather", "arguments": {"city": "Bern"}}], True),
        ([{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}], True),
        ([{"name": "get_weather", "arguments": {"city": "B"}}], False),
        ([{"name": "get_weather", "arguments": {}}], False),
        ([{"name": "rm", "arguments": {}}], False),
        ([{"name": "now"}], False),
        ([], False),
        ({"name": "now", "arguments": {}}, False),
    ],
)
def test_a_forced_answer_is_a_list_of_good_calls(answer: object, *, is_good: bool) -> None:
    schema = json.loads(forced_schema(offer(WEATHER, NOW, choice="required")))
    assert jsonschema_rs.is_valid(schema, answer) is is_good


def test_a_named_function_is_called_once_and_no_other_is() -> None:
    schema = json.loads(forced_schema(offer(WEATHER, NOW, choice="now")))
    validator = jsonschema_rs.validator_for(schema)
    now = {"name": "now", "arguments": {}}
    assert validator.is_valid([now])
    assert not validator.is_valid([now, now])
    assert not validator.is_valid([{"name": "get_weather", "arguments": {"city": "Bern"}}])


def test_without_parallel_calls_there_is_one() -> None:
    schema = json.loads(forced_schema(offer(NOW, choice="required", is_parallel=False)))
    now = {"name": "now", "arguments": {}}
    assert not jsonschema_rs.is_valid(schema, [now, now])
