import json
from typing import Any

import pytest

from jobs.domain.errors import InvalidLine
from jobs.domain.request import (
    CHAT,
    COMPLETIONS,
    PARAMETERS,
    Constraint,
    Message,
    SamplingParams,
    parse_line,
)
from jobs.domain.sketch import Sketcher
from tests.builders import make_line
from tests.unit.jobs.domain.lines import (
    FORMAT,
    NEUTRAL,
    SCHEMA,
    USER,
    capabilities,
    line_of,
    parse,
    refuse,
    with_body,
)

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


@pytest.mark.parametrize("name", NEUTRAL)
def test_value_that_asks_for_nothing_is_accepted(name: str) -> None:
    plain = parse(make_line())
    assert parse(make_line(**{name: NEUTRAL[name]})) == plain


@pytest.mark.parametrize("name", sorted({*NEUTRAL, *PARAMETERS, "a_field_of_tomorrow"}))
def test_null_asks_for_nothing(name: str) -> None:
    assert parse(with_body(f'"{name}":null')) == parse(line_of())


def test_all_values_that_ask_for_nothing_may_come_together() -> None:
    assert parse(make_line(**NEUTRAL)) == parse(make_line())


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
