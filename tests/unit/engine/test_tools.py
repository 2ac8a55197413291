# ruff: noqa: RUF001 -- DeepSeek's marks are spelled with these letters
"""What a model said is taken apart, however it writes its calls."""

import json

import pytest

from engine.tools import Speech, take_apart
from jobs.domain.reasoning import split_reasoning
from jobs.domain.tools import ToolCall

TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "now": {"type": "object", "properties": {}},
}
WEATHER = ToolCall("get_weather", json.dumps({"city": "Zürich", "days": 3}, ensure_ascii=False))
NOW = ToolCall("now", "{}")
OBJECT = '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}'

ONE_CALL = {
    "hermes": f"<tool_call>\n{OBJECT}\n</tool_call>",
    "hermes without its end": f"<tool_call>\n{OBJECT}",
    "hermes in a fence": f"<tool_call>\n```json\n{OBJECT}\n```\n</tool_call>",
    "qwen coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "function tag": '<function=get_weather>{"city": "Zürich", "days": 3}</function>',
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "llama 3": '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 3}}',
    "llama 3 with its tag": f"<|python_tag|>{OBJECT}",
    "llama 4": '[get_weather(city="Zürich", days=3)]',
    "mistral": f"[TOOL_CALLS] [{OBJECT}]",
    "mistral, newer": '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich", "days": 3}',
    "mistral, with an id": '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Zürich", '
    '"days": 3}',
    "mistral, without [ARGS]": '[TOOL_CALLS]get_weather{"city": "Zürich", "days": 3}',
    "deepseek 3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    '```json\n{"city": "Zürich", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek 3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Zürich", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city": "Zürich", "days": 3}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
    "granite": f"<|tool_call|>[{OBJECT}]",
    "phi": f"functools[{OBJECT}]",
    "internlm": f"<|action_start|><|plugin|>{OBJECT}<|action_end|>",
    "jamba": f"<tool_calls>[{OBJECT}]</tool_calls>",
    "openai": '[{"type": "function", "function": {"name": "get_weather", "arguments": '
    '"{\\"city\\": \\"Zürich\\", \\"days\\": 3}"}}]',
    "bare list": f"[{OBJECT}]",
    "fence": f"```json\n{OBJECT}\n```",
    "gpt-oss": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Zürich", "days": 3}<|call|>',
}


@pytest.mark.parametrize("text", ONE_CALL.values(), ids=ONE_CALL.keys())
def test_a_call_is_found_in_every_common_form(text: str) -> None:
    assert take_apart(text, tools=TOOLS) == Speech(tool_calls=(WEATHER,))


@pytest.mark.parametrize(
    "text",
    [
        f'<tool_call>{OBJECT}</tool_call>\n<tool_call>{{"name": "now"}}</tool_call>',
        f'<tool_call>{OBJECT}\n{{"name": "now", "arguments": {{}}}}</tool_call>',
        f'[TOOL_CALLS][{OBJECT}, {{"name": "now", "arguments": {{}}}}]',
        '[TOOL_CALLS]get_weather{"city": "Zürich", "days": 3}[TOOL_CALLS]now{}',
        f'{OBJECT}; {{"name": "now", "parameters": {{}}}}',
        f'{OBJECT}\n{{"name": "now", "parameters": null}}',
        '[get_weather(city="Zürich", days=3), now()]',
        '<function=get_weather>{"city": "Zürich", "days": 3}</function><function=now></function>',
    ],
)
def test_calls_keep_their_order(text: str) -> None:
    assert take_apart(text, tools=TOOLS).tool_calls == (WEATHER, NOW)


def test_words_around_a_call_are_content() -> None:
    found = take_apart(f"Let me look.\n<tool_call>{OBJECT}</tool_call>\n", tools=TOOLS)
    assert (found.content, found.tool_calls) == ("Let me look.", (WEATHER,))


def test_a_parameter_written_as_text_is_what_its_schema_says() -> None:
    text = (
        "<tool_call><function=get_weather><parameter=city>\n12\n</parameter>"
        "<parameter=days>12</parameter></function></tool_call>"
    )
    (call,) = take_apart(text, tools=TOOLS).tool_calls
    assert json.loads(call.arguments) == {"city": "12", "days": 12}


@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        '{"name": "Ada", "age": 36}',
        '{"name": "unknown_tool", "arguments": {}}',
        "[1, 2, 3]",
        "[unknown(a=1)]",
        "[get_weather(open('/etc/passwd'))]",
        "[__import__('os').system('true')]",
        '{"name": "get_weather", "arguments": {"city": ',
        f"See {OBJECT}",
        "[" * 500 + "]" * 500,
        f"[{'a.' * 1500}a(x=1)]",
        '{"a": ' * 5000 + "}" * 5000,
    ],
)
def test_an_answer_that_calls_nothing_stays_as_it_is(text: str) -> None:
    found = take_apart(text, tools=TOOLS)
    assert (found.content, found.tool_calls, found.complaint) == (text, (), "")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<tool_call>{broken</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "rm"}</tool_call>', "was not offered"),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>', "not a JSON object"),
        ('<tool_call>{"name": "now", "arguments": "no"}</tool_call>', "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "not a JSON object"),
        ("[TOOL_CALLS]", "no name"),
        ("<tool_call>" + "[" * 9999, "nested too deep"),
        ('A 5" pipe: <tool_call>' + "[" * 9999, "not valid JSON"),
        ("<|channel|>commentary to=functions.rm<|message|>{}<|call|>", "was not offered"),
    ],
)
def test_a_marked_call_that_cannot_be_read_is_complained_of(text: str, complaint: str) -> None:
    found = take_apart(text, tools=TOOLS)
    assert complaint in found.complaint
    assert not found.tool_calls


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nZür",
        "<tool_call><function=now>",
        "<function=get_weather><parameter=city>Zürich</parameter>",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zür",
        "<tool_call>now",
    ],
)
def test_a_call_that_is_cut_off_is_none_where_its_form_does_not_tell(text: str) -> None:
    assert take_apart(text, tools=TOOLS).tool_calls, "whole, as far as anybody can see"
    found = take_apart(text, tools=TOOLS, is_cut=True)
    assert (found.tool_calls, found.complaint) == ((), "a tool call has no end")


@pytest.mark.parametrize("text", ONE_CALL.values(), ids=ONE_CALL)
def test_a_call_that_is_whole_stays_one_when_tokens_ran_out_behind_it(text: str) -> None:
    if "without its end" not in text:
        assert take_apart(text, tools=TOOLS, is_cut=True) == take_apart(text, tools=TOOLS)


def test_the_end_of_a_thought_in_an_argument_ends_no_thought() -> None:
    call = ToolCall("get_weather", json.dumps({"city": "a</think>b"}))
    for text in (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "a</think>b"}}</tool_call>',
        '{"name": "get_weather", "arguments": {"city": "a</think>b"}}',
    ):
        found = take_apart(text, tools=TOOLS)
        assert (found.tool_calls, found.reasoning) == ((call,), None)


def test_without_tools_nothing_is_looked_for() -> None:
    text = f"<tool_call>{OBJECT}</tool_call>"
    assert take_apart(text, tools={}) == Speech(content=text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
        ("Hm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
        ("<think>Hm.", ("Hm.", "")),
        ("[THINK]Hm.[/THINK]Yes.", ("Hm.", "Yes.")),
        (
            "Write <think> first and </think> last.",
            (None, "Write <think> first and </think> last."),
        ),
        ("Yes.", (None, "Yes.")),
    ],
)
def test_reasoning_is_set_apart(text: str, parts: tuple[str | None, str]) -> None:
    assert split_reasoning(text) == parts


def test_calls_are_looked_for_behind_the_reasoning_only() -> None:
    text = f"<think>Maybe <tool_call>{{}}</tool_call>?</think><tool_call>{OBJECT}</tool_call>"
    found = take_apart(text, tools=TOOLS)
    assert found.tool_calls == (WEATHER,)
    assert found.reasoning == "Maybe <tool_call>{}</tool_call>?"


def test_channels_are_told_apart() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
        "<|return|>"
    )
    assert take_apart(text, tools=TOOLS) == Speech(content="Yes.", reasoning="Hm.")
