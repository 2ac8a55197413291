import json
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.domain.errors import InvalidLine
from jobs.domain.pooling import EMBEDDINGS, RERANK, SCORE, Pooling, PoolingForm
from jobs.domain.request import (
    CHAT,
    COMPLETIONS,
    PARAMETERS,
    Capabilities,
    Constraint,
    ConstraintKind,
    Line,
    Message,
    SamplingParams,
    custom_id_of,
    parse_line,
)
from jobs.domain.responses import RESPONSES
from jobs.domain.sketch import Sketcher
from jobs.domain.tools import ToolCall
from tests.builders import make_line

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


# --- what is wrong with a line ---


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"", "invalid_json_line", None),
        (b"{", "invalid_json_line", None),
        (b"{} {}", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"null", "invalid_json_line", None),
        (b'{"a":NaN}', "invalid_json_line", None),
        (with_body('"temperature":NaN'), "invalid_json_line", None),
        (with_body('"temperature":-Infinity'), "invalid_json_line", None),
        (with_body(f'"seed":{"9" * 5000}'), "invalid_json_line", None),
        (with_body('"temperature":1e400'), "invalid_json_line", None),
        (with_body(r'"user":"\ud800","foo":1'), "invalid_json_line", None),
        (make_line("a").replace(b'"a"', b'"\\ud800"'), "invalid_json_line", None),
        (b"\xff\xfe{\x00}\x00", "invalid_utf8", None),
        (make_line("a", "X").replace(b"X", b"\xe9"), "invalid_utf8", None),
        (with_body('"metadata":' + "[" * 10_000 + "]" * 10_000), "nesting_too_deep", None),
        (b"[" * 100_000, "nesting_too_deep", None),
        (line_of(without="custom_id"), "missing_required_parameter", "custom_id"),
        (line_of(without="method"), "missing_required_parameter", "method"),
        (line_of(without="url"), "missing_required_parameter", "url"),
        (line_of(without="body"), "missing_required_parameter", "body"),
        (line_of(custom_id=None), "missing_required_parameter", "custom_id"),
        (line_of(body={"model": "m"}), "missing_required_parameter", "body.messages"),
        (line_of(custom_id=7), "invalid_type", "custom_id"),
        (line_of(custom_id=""), "invalid_value", "custom_id"),
        (line_of(custom_id="x" * 513), "invalid_value", "custom_id"),
        (line_of(method="GET"), "invalid_method", "method"),
        (line_of(method="post"), "invalid_method", "method"),
        (line_of(url=COMPLETIONS), "invalid_url", "url"),
        (line_of(url=7), "invalid_url", "url"),
        (line_of(body=[]), "invalid_type", "body"),
        (line_of(body={"model": 1, "messages": USER}), "invalid_type", "body.model"),
        (line_of(body={"model": "", "messages": USER}), "invalid_value", "body.model"),
        (line_of(body={"messages": []}), "invalid_value", "body.messages"),
        (line_of(body={"messages": "x"}), "invalid_type", "body.messages"),
        (with_body('"stream":true'), "streaming_unsupported", "body.stream"),
        (with_body('"stream":true,"metadata":null'), "streaming_unsupported", "body.stream"),
        (with_body('"n":129'), "invalid_value", "body.n"),
        (with_body('"n":0'), "invalid_value", "body.n"),
        (with_body('"top_logprobs":2'), "invalid_value", "body.top_logprobs"),
        (with_body('"logprobs":true,"top_logprobs":21'), "invalid_value", "body.top_logprobs"),
        (with_body('"frequency_penalty":2.5'), "invalid_value", "body.frequency_penalty"),
        (with_body('"presence_penalty":-3'), "invalid_value", "body.presence_penalty"),
        (with_body('"repetition_penalty":0'), "invalid_value", "body.repetition_penalty"),
        (with_body('"min_p":1.5'), "invalid_value", "body.min_p"),
        (with_body('"logit_bias":{"a":1}'), "invalid_value", "body.logit_bias"),
        (with_body('"logit_bias":{"5":101}'), "invalid_value", "body.logit_bias[...]"),
        (with_body('"stop_token_ids":[-1]'), "invalid_value", "body.stop_token_ids[0]"),
        (with_body('"bad_words":[""]'), "invalid_value", "body.bad_words[0]"),
        (with_body('"tools":[{}]'), "missing_required_parameter", "body.tools[0].type"),
        (with_body('"tool_choice":"required"'), "invalid_value", "body.tool_choice"),
        (with_body('"tool_choice":"any"'), "invalid_value", "body.tool_choice"),
        (
            with_body('"tool_choice":{"type":"function","function":{"name":"f"}}'),
            "invalid_value",
            "body.tool_choice",
        ),
        (with_body('"chat_template":"x"'), "unsupported_parameter", "body.chat_template"),
        (with_body('"echo":true'), "unsupported_parameter", "body.echo"),
        (with_body('"skip_special_tokens":1'), "unsupported_parameter", "body.skip_special_tokens"),
        (with_body('"max_tokens":0'), "invalid_value", "body.max_tokens"),
        (with_body('"max_tokens":"5"'), "invalid_type", "body.max_tokens"),
        (with_body('"temperature":2.1'), "invalid_value", "body.temperature"),
        (with_body('"temperature":-0.1'), "invalid_value", "body.temperature"),
        (with_body('"top_p":0'), "invalid_value", "body.top_p"),
        (with_body('"top_k":-2'), "invalid_value", "body.top_k"),
        (with_body('"stop":""'), "invalid_value", "body.stop"),
        (with_body('"stop":["a",""]'), "invalid_value", "body.stop[...]"),
        (with_body('"stop":' + json.dumps(["x"] * 17)), "invalid_value", "body.stop"),
        (
            with_body('"response_format":{"type":"xml"}'),
            "invalid_value",
            "body.response_format.type",
        ),
        (
            with_body('"response_format":{"type":"json_schema","json_schema":{"schema":{}}}'),
            "missing_required_parameter",
            "body.response_format.json_schema.name",
        ),
        (
            with_body(
                '"response_format":{"type":"json_schema","json_schema":{"name":"a b","schema":{}}}'
            ),
            "invalid_value",
            "body.response_format.json_schema.name",
        ),
        (
            with_body(
                '"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":[1]}}'
            ),
            "invalid_schema",
            "body.response_format.json_schema.schema",
        ),
        (with_body('"guided_json":"{"'), "invalid_schema", "body.guided_json"),
        (with_body('"guided_json":5'), "invalid_schema", "body.guided_json"),
        (
            with_body('"structured_outputs":{"json":5}'),
            "invalid_schema",
            "body.structured_outputs.json",
        ),
        (
            with_body('"structured_outputs":{"regex":"a","choice":["b"]}'),
            "invalid_value",
            "body.structured_outputs",
        ),
        (with_body('"structured_outputs":{}'), "invalid_value", "body.structured_outputs"),
        (
            with_body('"structured_outputs":{},"metadata":null'),
            "invalid_value",
            "body.structured_outputs",
        ),
        (
            with_body('"structured_outputs":{"json_object":false}'),
            "invalid_value",
            "body.structured_outputs",
        ),
        (
            with_body('"structured_outputs":{"choice":[]}'),
            "invalid_value",
            "body.structured_outputs.choice",
        ),
        (
            with_body('"structured_outputs":{"structural_tag":"x"}'),
            "unsupported_parameter",
            "body.structured_outputs.structural_tag",
        ),
        (
            with_body('"messages":[{"role":"tool","content":"x"}]'),
            "invalid_messages",
            "body.messages[0].tool_call_id",
        ),
        (
            with_body('"messages":[{"role":"user","content":[{"type":"input_audio"}]}]'),
            "invalid_value",
            "body.messages[0].content[0].type",
        ),
        (
            with_body('"messages":[{"role":"user"}]'),
            "missing_required_parameter",
            "body.messages[0].content",
        ),
    ],
)  # fmt: skip
def test_fault_has_its_code_and_param(line: bytes, code: str, param: str | None) -> None:
    found_code, found_param = refuse(line)
    assert found_code == code
    if param is not None and "[" in param:
        assert found_param is not None
        assert found_param.partition("[")[0] == param.partition("[")[0]
        assert found_param.rpartition("]")[2] == param.rpartition("]")[2]
    else:
        assert found_param == param


def test_schema_that_is_not_utf8_is_a_fault_of_its_line() -> None:
    schema = '{"type":"json_schema","json_schema":{"name":"a","schema":{"title":"X"}}}'
    line = with_body(f'"response_format":{schema}').replace(b"X", b"\xff")
    assert refuse(line) == ("invalid_utf8", None)
    assert refuse(with_body('"guided_json":{"title":"X"}').replace(b"X", b"\xff")) == (
        "invalid_utf8",
        None,
    )


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (["a", "b"], "unsupported_parameter"),
        ([[1], [2]], "unsupported_parameter"),
        ([1, "a"], "unsupported_parameter"),
        ([], "invalid_value"),
        ([[]], "invalid_value"),
        ([-1], "invalid_value"),
        ([2**31], "invalid_value"),
        ([True], "invalid_value"),
        ([1.5], "invalid_value"),
        (5, "invalid_type"),
        (None, "missing_required_parameter"),
    ],
)
def test_prompt_that_is_not_one_is_refused(prompt: object, code: str) -> None:
    line = line_of(endpoint=COMPLETIONS, body={"model": "m", "prompt": prompt})
    assert refuse(line, endpoint=COMPLETIONS) == (code, "body.prompt")


# --- what a good line means ---


def test_line_keeps_who_it_is_and_what_it_asks() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Really."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "name": "bot", "refusal": None},
    ]
    line = parse(line_of(custom_id="café \U0001f600", body={"model": "m", "messages": messages}))
    assert (line.custom_id, line.model, line.prompt) == ("café \U0001f600", "m", None)
    assert line.messages == (
        Message("system", "Be brief."),
        Message("developer", "Really."),
        Message("user", "a\nb"),
        Message("assistant", "c", "bot"),
    )
    request = line.to_request(7)
    assert (request.id, request.messages, request.sampling) == (7, line.messages, line.sampling)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x", "x"),
        ("", ""),
        (["x"], "x"),
        ([1, 2], (1, 2)),
        ([[1, 2]], (1, 2)),
    ],
)
def test_completion_takes_one_prompt_in_any_of_its_forms(prompt: object, expected: object) -> None:
    line = line_of(endpoint=COMPLETIONS, body={"model": "m", "prompt": prompt})
    parsed = parse(line, endpoint=COMPLETIONS)
    assert parsed.prompt == expected
    assert parsed.messages is None
    assert parsed.sampling.max_tokens == 16, "OpenAI's default for this endpoint"


def test_line_without_a_model_is_good_in_itself() -> None:
    assert parse(line_of(body={"messages": USER})).model is None


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    both = parse(with_body('"max_tokens":5,"max_completion_tokens":7'))
    assert both.sampling.max_tokens == 7
    assert parse(with_body('"max_tokens":5')).sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("null", ()), ("[]", ()), ('"a"', ("a",)), ('["a","b"]', ("a", "b"))],
)
def test_stop_is_a_string_or_a_list(stop: str, expected: tuple[str, ...]) -> None:
    assert parse(with_body(f'"stop":{stop}')).sampling.stop == expected


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


@pytest.mark.parametrize("name", NEUTRAL)
def test_value_that_asks_for_nothing_is_accepted(name: str) -> None:
    plain = parse(make_line())
    assert parse(make_line(**{name: NEUTRAL[name]})) == plain


@pytest.mark.parametrize("name", sorted({*NEUTRAL, *PARAMETERS, "a_field_of_tomorrow"}))
def test_null_asks_for_nothing(name: str) -> None:
    assert parse(with_body(f'"{name}":null')) == parse(line_of())


def test_all_values_that_ask_for_nothing_may_come_together() -> None:
    assert parse(make_line(**NEUTRAL)) == parse(make_line())


SCHEMA = '{"type":"object"}'
FORMAT = '"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":%s}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"response_format":{"type":"text"}', None),
        ('"response_format":{"type":"json_object"}', Constraint("json_object")),
        (FORMAT % SCHEMA, Constraint("json_schema", SCHEMA)),
        (FORMAT % "true", Constraint("json_schema", "true")),
        (FORMAT % "null", Constraint("json_object")),
        (
            '"response_format":{"type":"json_schema","json_schema":{"name":"a","strict":true}}',
            Constraint("json_object"),
        ),
        (f'"structured_outputs":{{"json":{SCHEMA}}}', Constraint("json_schema", SCHEMA)),
        (
            f'"structured_outputs":{{"json":{json.dumps(SCHEMA)}}}',
            Constraint("json_schema", SCHEMA),
        ),
        ('"structured_outputs":{"json":null,"regex":"a+"}', Constraint("regex", "a+")),
        ('"structured_outputs":{"choice":["a","b"]}', Constraint("choice", '["a","b"]')),
        ('"structured_outputs":{"grammar":"start: \\"a\\""}', Constraint("grammar", 'start: "a"')),
        ('"structured_outputs":{"json_object":true}', Constraint("json_object")),
        (f'"guided_json":{SCHEMA}', Constraint("json_schema", SCHEMA)),
        (f'"guided_json":{json.dumps(SCHEMA)}', Constraint("json_schema", SCHEMA)),
        ('"guided_regex":"a+","guided_decoding_backend":"x"', Constraint("regex", "a+")),
        ('"guided_choice":["a"]', Constraint("choice", '["a"]')),
        ('"guided_grammar":"start: \\"a\\""', Constraint("grammar", 'start: "a"')),
    ],
)
def test_form_of_an_answer_is_understood_in_every_spelling(
    text: str, expected: Constraint | None
) -> None:
    assert parse(with_body(text)).constraint == expected
    assert parse(with_body(text + ',"metadata":null')).constraint == expected, (
        "the slow path agrees"
    )


def test_response_format_goes_before_the_other_spellings() -> None:
    asked = '"response_format":{"type":"json_object"},"structured_outputs":{"regex":"a"}'
    assert parse(with_body(asked)).constraint == Constraint("json_object")
    assert parse(with_body(asked + ',"guided_regex":"b"')).constraint == Constraint("json_object")
    both = '"structured_outputs":{"regex":"a"},"guided_regex":"b"'
    assert parse(with_body(both)).constraint == Constraint("regex", "a")


# --- what an engine cannot do ---


def capabilities(
    *, parameters: tuple[str, ...] = PARAMETERS, constraints: tuple[ConstraintKind, ...] = ()
) -> Capabilities:
    return Capabilities(model="m", engine="e", parameters=parameters, constraints=constraints)


def test_parameter_that_the_engine_does_not_obey_is_refused() -> None:
    some = capabilities(parameters=tuple(name for name in PARAMETERS if name != "top_k"))
    with pytest.raises(InvalidLine) as caught:
        parse_line(with_body('"top_k":5'), endpoint=CHAT, capabilities=some)
    assert (caught.value.error_code, caught.value.param) == (
        "unsupported_parameter",
        "body.top_k",
    )
    assert parse_line(line_of(), endpoint=CHAT, capabilities=some).model == "m"


def test_constraint_that_the_engine_cannot_keep_is_refused() -> None:
    some = capabilities(constraints=("regex",))
    assert parse_line(with_body('"guided_regex":"a"'), endpoint=CHAT, capabilities=some).constraint
    with pytest.raises(InvalidLine) as caught:
        parse_line(with_body(f'"guided_json":{SCHEMA}'), endpoint=CHAT, capabilities=some)
    assert caught.value.error_code == "unsupported_parameter"


# --- properties ---

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(sorted({*PARAMETERS, *NEUTRAL, "messages", "prompt", "model"}))
plausible: st.SearchStrategy[Any] = st.sampled_from(
    [0, 1, 2, -1, 0.5, True, False, None, "", "a", [], ["a"], {}, {"type": "text"}, {"json": {}}]
)


def parse_or_explain(line: bytes, *, endpoint: str) -> Line | None:
    """Return the line, or None when it was refused for a reason that can be read."""
    try:
        return parse_line(line, endpoint=endpoint)
    except InvalidLine as error:
        if not (error.error_code and error.message):
            raise
        return None


@given(st.binary(max_size=60), st.sampled_from([CHAT, COMPLETIONS]))
def test_any_bytes_are_a_line_or_an_invalid_line(line: bytes, endpoint: str) -> None:
    parse_or_explain(line, endpoint=endpoint)


@given(st.data())
def test_any_damage_to_a_good_line_leaves_a_line_or_an_invalid_line(data: st.DataObject) -> None:
    good = with_body(
        '"temperature":1,"stop":["a"],'
        + FORMAT % SCHEMA
        + ',"guided_json":{"a":"b"},"metadata":null'
    )
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 4)))
    line = good[:start] + data.draw(st.binary(max_size=4)) + good[end:]
    parse_or_explain(line, endpoint=CHAT)


@given(
    st.dictionaries(fields, plausible | json_values, max_size=5),
    st.sampled_from([CHAT, COMPLETIONS]),
    st.booleans(),
)
def test_any_body_is_a_line_or_an_invalid_line(
    body: dict[str, Any],
    endpoint: str,
    complete: bool,  # noqa: FBT001
) -> None:
    if complete:
        body = {"messages": USER} | body if endpoint == CHAT else {"prompt": "x"} | body
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    parsed = parse_or_explain(json.dumps(line).encode(), endpoint=endpoint)
    if parsed is None:
        return
    assert (parsed.messages is None) is (endpoint == COMPLETIONS)
    msgspec.msgpack.encode(parsed.to_request(1))  # it can cross to the engine


sampling = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 2**31 - 1),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 2**31 - 1),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.lists(st.text(min_size=1, max_size=5), max_size=16),
        "ignore_eos": st.booleans(),
    },
)


@given(
    sampling,
    st.text(min_size=1, max_size=50).filter(lambda s: s.isprintable()),
    st.text(max_size=40),
    st.booleans(),
)
def test_what_is_accepted_arrives_as_it_was_written(
    asked: dict[str, Any],
    custom_id: str,
    content: str,
    slowly: bool,  # noqa: FBT001
) -> None:
    line = make_line(custom_id, content, **asked, **({"best_of": 1} if slowly else {}))
    parsed = parse(line)
    expected = SamplingParams(**asked | {"stop": tuple(asked.get("stop", ()))})
    assert parsed.sampling == expected
    assert parsed.custom_id == custom_id == custom_id_of(line)
    assert parsed.messages == (Message("user", content),)


# --- what planning sees of a line ---

contents = st.sampled_from(
    [
        "x",
        "",
        "é\u2028\U0001f600",
        [{"type": "text", "text": "x"}],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "a\nb",
        [{"type": "image"}],
        7,
    ]
)
conversations = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "nobody"]), "content": contents},
        optional={"name": st.sampled_from(["me", None, 1])},
    ),
    max_size=3,
)
prompts = st.sampled_from(["x", ["x"], [1, 2], [[1, 2]], [], ["x", "y"], [-1], None])
asked_for = st.one_of(
    sampling,
    st.dictionaries(fields, plausible | json_values, max_size=3),
    st.sampled_from(
        [
            {"max_completion_tokens": 5},
            {"max_tokens": 5},
            {"max_tokens": 5, "n": 1, "user": "me"},
            {"n": 2},
            {"logprobs": 0},
            {"response_format": {"type": "json_object"}},
            {"guided_json": {"type": "object"}},
            {"guided_json": '{"type": "object"}'},
            {"stop": "a"},
            {"stop": ["a"]},
            {"ignore_eos": False},
        ]
    ),
)


def _asking(url: str, talk: list[Any], prompt: object) -> dict[str, Any]:
    names: dict[str, tuple[str, object]] = {CHAT: ("messages", talk), RESPONSES: ("input", talk)}
    name, asked = names.get(url, ("prompt", prompt))
    return {name: asked}


written_lines = st.builds(
    lambda custom_id, url, model, talk, prompt, asked, style, damage: _damaged(
        json.dumps(
            {
                "custom_id": custom_id,
                "method": "POST",
                "url": url,
                "body": model | _asking(url, talk, prompt) | asked,
            },
            **style,
        ).encode(),
        damage,
    ),
    st.sampled_from(["a", "b", "é", "", "x" * 513, 5]),
    st.sampled_from([CHAT, CHAT, CHAT, COMPLETIONS, RESPONSES]),
    st.sampled_from([{"model": "m"}, {"model": "other"}, {}]),
    conversations,
    prompts,
    asked_for,
    st.sampled_from([{}, {"ensure_ascii": False}, {"separators": (",", ":")}, {"sort_keys": True}]),
    st.none() | st.tuples(st.integers(0, 200), st.binary(max_size=2)),
)


def _damaged(line: bytes, damage: tuple[int, bytes] | None) -> bytes:
    if damage is None:
        return line
    at, written = damage
    return line[:at] + written + line[at + len(written) :]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(written_lines, st.integers(1, 2)), min_size=1, max_size=8),
    st.sampled_from([CHAT, CHAT, COMPLETIONS, RESPONSES]),
)
def test_planning_and_running_agree_on_every_line(
    lines: list[tuple[bytes, int]], endpoint: str
) -> None:
    sketcher = Sketcher(endpoint)
    some = Capabilities(
        model="m", engine="hf", parameters=("seed",), constraints=("regex",), endpoints=(CHAT,)
    )
    seen: dict[bytes, bytes] = {}
    for line in [line for line, times in lines for _ in range(times)]:
        reason = _reason(partial(parse_line, line, endpoint=endpoint))
        assert _reason(partial(sketcher.sketch, line)) == reason
        if reason is not None:
            continue
        parsed = parse_line(line, endpoint=endpoint)
        sketch = sketcher.sketch(line)
        terms, asked = sketch.terms, parsed.sampling
        assert (sketch.custom_id, terms.model) == (parsed.custom_id, parsed.model)
        assert (terms.max_tokens, terms.temperature, terms.seed, terms.constraint) == (
            asked.max_tokens,
            asked.temperature,
            asked.seed,
            parsed.constraint,
        )
        first = [len(message.content) for message in (parsed.messages or ())[:-1]]
        assert sketch.num_first_chars == sum(first)
        # Equal where and only where what the engine is asked is.
        request = msgspec.msgpack.encode(parsed.to_request(0))
        digest = sketch.digest()
        assert seen.setdefault(digest, request) == request
        assert len(set(seen.values())) == len(seen)
        assert _reason(partial(terms.check, some)) == _reason(
            partial(parse_line, line, endpoint=endpoint, capabilities=some)
        )


def _reason(check: Callable[[], object]) -> tuple[str, str | None, str] | None:
    try:
        check()
    except InvalidLine as error:
        return error.error_code, error.param, error.message
    return None


def test_lines_in_a_row_that_ask_for_the_same_share_their_terms() -> None:
    sketcher = Sketcher(CHAT)
    first = sketcher.sketch(make_line("a", "one", max_tokens=5, user="me"))
    second = sketcher.sketch(make_line("b", "two", max_tokens=5, user="you"))
    third = sketcher.sketch(make_line("c", "two", max_tokens=6))
    assert first.terms is second.terms
    assert third.terms is not second.terms
    assert len({first.digest(), second.digest(), third.digest()}) == 3


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


def digest(**body: Any) -> bytes:  # noqa: ANN401
    return Sketcher(CHAT).sketch(make_line("a", **body)).digest()


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 5},
        {"temperature": 1},
        {"top_p": 0.5},
        {"top_k": 5},
        {"seed": 5},
        {"stop": "a"},
        {"ignore_eos": True},
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "a"},
        {"content": "bye"},
        {"messages": [{"role": "system", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hello", "name": "me"}]},
    ],
    ids=lambda body: next(iter(body)),
)
def test_requests_that_differ_have_other_digests(body: dict[str, Any]) -> None:
    assert digest(**body) != digest()


@pytest.mark.parametrize(
    ("body", "other"),
    [
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": []}, {}),
        ({"max_tokens": 5}, {"max_completion_tokens": 5}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"ignore_eos": False}, {}),
        ({"user": "me", "n": 1, "stream": False, "model": "other", "tools": []}, {}),
        ({"messages": [{"content": [{"type": "text", "text": "hello"}], "role": "user"}]}, {}),
        (
            {"guided_json": {"type": "object"}},
            {"structured_outputs": {"json": {"type": "object"}}},
        ),
    ],
)
def test_requests_that_are_written_differently_have_one_digest(
    body: dict[str, Any], other: dict[str, Any]
) -> None:
    assert digest(**body) == digest(**other)


def test_every_sampling_parameter_is_read() -> None:
    fields = (
        '"n":3,"logprobs":true,"top_logprobs":2,"presence_penalty":0.5,"frequency_penalty":-1,'
        '"repetition_penalty":1.2,"min_p":0.1,"min_tokens":4,"logit_bias":{"7":-100,"5":1},'
        '"stop_token_ids":[9],"bad_words":["no"]'
    )
    line = with_body(fields)
    assert parse(line).sampling == SamplingParams(
        n=3,
        logprobs=2,
        presence_penalty=0.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.2,
        min_p=0.1,
        min_tokens=4,
        logit_bias=((5, 1.0), (7, -100.0)),
        stop_token_ids=(9,),
        bad_words=("no",),
    )


@pytest.mark.parametrize(
    "field",
    [
        '"n":3',
        '"logprobs":true',
        '"logprobs":true,"top_logprobs":2',
        '"presence_penalty":0.5',
        '"frequency_penalty":0.5',
        '"repetition_penalty":1.2',
        '"min_p":0.1',
        '"min_tokens":4',
        '"logit_bias":{"7":-100}',
        '"stop_token_ids":[9]',
        '"bad_words":["no"]',
    ],
)
def test_a_sampling_parameter_makes_it_another_request(field: str) -> None:
    sketch = Sketcher(CHAT).sketch
    assert sketch(with_body(field)).digest() != sketch(with_body('"seed":null')).digest()
