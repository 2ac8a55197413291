from functools import partial

import pytest

from jobs.domain.errors import InvalidLine
from jobs.domain.pooling import EMBEDDINGS, RERANK, SCORE, Pooling, PoolingForm
from jobs.domain.request import (
    CHAT,
    parse_line,
)
from jobs.domain.sketch import Sketcher
from jobs.domain.tools import ToolCall
from tests.unit.jobs.domain.lines import parse, refuse, with_body

TOOL = (
    '{"type":"function","function":{"name":"get_weather","parameters":{"type":"object",'
    '"properties":{"city":{"type":"string"}},"required":["city"]}}}'
)
CALLED = (
    '"messages":[{"role":"user","content":"?"},{"role":"assistant","content":null,"tool_calls":'
    '[{"id":"call_1","type":"function","function":{"name":"get_weather","arguments":"{}"}}]},'
    '{"role":"tool","tool_call_id":"%s","content":"Sunny."}]'
)


def test_tools_are_offered_and_forced_ones_are_a_constraint() -> None:
    offered = parse(with_body(f'"tools":[{TOOL}]'))
    assert offered.tools is not None
    assert offered.tools.choice == "auto"
    assert offered.constraint is None
    forced = parse(with_body(f'"tools":[{TOOL}],"tool_choice":"required"'))
    assert forced.tools is not None
    assert forced.constraint is not None
    assert forced.constraint.kind == "json_schema"
    assert '"get_weather"' in forced.constraint.spec
    none = parse(with_body(f'"tools":[{TOOL}],"tool_choice":"none"'))
    assert none.tools is None
    assert none.constraint is None


def test_turns_that_call_and_answer_are_kept() -> None:
    messages = parse(with_body(CALLED % "call_1")).messages
    assert messages is not None
    assert [(m.role, m.content) for m in messages] == [
        ("user", "?"),
        ("assistant", ""),
        ("tool", "Sunny."),
    ]
    assert messages[1].tool_calls == (ToolCall("get_weather", "{}", "call_1"),)
    assert messages[2].tool_call_id == "call_1"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        (CALLED % "call_2", "invalid_messages", "body.messages[2].tool_call_id"),
        (CALLED.replace('"assistant"', '"user"') % "call_1", "invalid_messages",
         "body.messages[1].tool_calls"),
        (CALLED.replace('"tool",', '"user",') % "call_1", "invalid_messages",
         "body.messages[2].tool_call_id"),
        (f'"tools":[{TOOL},{TOOL}]', "invalid_value", "body.tools"),
        (f'"tools":[{TOOL}],"response_format":{{"type":"json_object"}}', "invalid_value",
         "body.tools"),
        (f'"tools":[{TOOL}],"tool_choice":{{"type":"function","function":{{"name":"x"}}}}',
         "invalid_value", "body.tool_choice"),
        ('"tools":[' + TOOL.replace('"string"', "[" * 100 + "]" * 100) + "]",
         "nesting_too_deep", "body.tools"),
        ('"tools":[' + TOOL.replace('"string"', "[" * 5000 + "]" * 5000) + "]",
         "nesting_too_deep", None),
    ],
)  # fmt: skip
def test_tools_that_make_no_sense_are_refused(fields: str, code: str, param: str | None) -> None:
    assert refuse(with_body(fields)) == (code, param)


@pytest.mark.parametrize(
    "turn",
    [
        r'{"role":"\u0074ool","content":"Sunny."}',
        r'{"role":"user","content":"Hi","\u0074ool_call_id":"call_1"}',
    ],
)
def test_a_turn_of_a_tool_is_seen_however_it_is_spelled(turn: str) -> None:
    line = with_body(f'"messages":[{turn}]')
    with pytest.raises(InvalidLine, match="tool_call_id"):
        parse_line(line, endpoint=CHAT)
    with pytest.raises(InvalidLine, match="tool_call_id"):
        Sketcher(CHAT).sketch(line)


@pytest.mark.parametrize(
    "fields", [f'"tools":[{TOOL}]', f'"tools":[{TOOL}],"tool_choice":"required"', CALLED % "call_1"]
)
def test_planning_tells_lines_with_tools_from_others(fields: str) -> None:
    sketch = Sketcher(CHAT).sketch
    plain = sketch(with_body('"seed":1')).digest()
    assert sketch(with_body(fields)).digest() != plain
    assert sketch(with_body(fields)).digest() == sketch(with_body(fields)).digest()


def pooling_line(endpoint: str, body: str) -> bytes:
    return f'{{"custom_id":"a","method":"POST","url":"{endpoint}","body":{{{body}}}}}'.encode()


@pytest.mark.parametrize(
    ("endpoint", "body", "pooling"),
    [
        (EMBEDDINGS, '"model":"m","input":"a"', Pooling("embed", ("a",))),
        (EMBEDDINGS, '"input":["a","b"],"dimensions":8', Pooling("embed", ("a", "b"), (), 8)),
        (EMBEDDINGS, '"input":[1,2]', Pooling("embed", ((1, 2),))),
        (EMBEDDINGS, '"input":[[1,2],[3]],"user":"u"', Pooling("embed", ((1, 2), (3,)))),
        (
            EMBEDDINGS,
            '"input":"a","encoding_format":"base64"',
            Pooling("embed", ("a",), (), None, PoolingForm(encoding="base64")),
        ),
        (
            RERANK,
            '"query":"q","documents":["a",{"text":"b"}],"top_n":1',
            Pooling("score", ("a", "b"), ("q",), None, PoolingForm(top_n=1)),
        ),
        (SCORE, '"text_1":"q","text_2":["a","b"]', Pooling("score", ("a", "b"), ("q",))),
        (SCORE, '"text_1":["q","r"],"text_2":["a","b"]', Pooling("score", ("a", "b"), ("q", "r"))),
    ],
)
def test_texts_to_embed_or_score_are_read(endpoint: str, body: str, pooling: Pooling) -> None:
    line = pooling_line(endpoint, body)
    assert parse_line(line, endpoint=endpoint).pooling == pooling
    assert Sketcher(endpoint).sketch(line).custom_id == "a"


@pytest.mark.parametrize(
    ("endpoint", "body", "code", "param"),
    [
        (EMBEDDINGS, '"input":[]', "invalid_value", "body.input"),
        (EMBEDDINGS, '"input":""', "invalid_value", "body.input"),
        (EMBEDDINGS, '"input":["a",[1]],"x":1', "unsupported_parameter", "body.x"),
        (EMBEDDINGS, '"input":[1,"a"]', "invalid_value", "body.input"),
        (
            EMBEDDINGS,
            '"input":' + str(["a"] * 2049).replace("'", '"'),
            "invalid_value",
            "body.input",
        ),
        (EMBEDDINGS, '"input":"a","dimensions":0', "invalid_value", "body.dimensions"),
        (RERANK, '"query":"q","documents":[{"image":"x"}]', "invalid_value", "body.documents"),
        (SCORE, '"text_1":["q","r","s"],"text_2":["a","b"]', "invalid_value", "body.text_1"),
        (SCORE, '"text_1":"q"', "missing_required_parameter", "body.text_2"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(
    endpoint: str, body: str, code: str, param: str
) -> None:
    line = pooling_line(endpoint, body)
    for read in (partial(parse_line, endpoint=endpoint), Sketcher(endpoint).sketch):
        with pytest.raises(InvalidLine) as caught:
            read(line)
        assert (caught.value.error_code, caught.value.param) == (code, param)
