"""What servers are asked beside plain text, and what comes back: tools, numbers, probabilities."""

import base64
import json
import struct
from typing import Any

import pytest

from engine.config import GenerationDefaults
from engine.openai_answers import Answer, StreamReader, Trouble, read_answer
from engine.openai_api import build_body, endpoint_of, may_be_long
from jobs.domain.images import Image
from jobs.domain.pooling import Pooling
from jobs.domain.request import Message, Request, SamplingParams
from jobs.domain.result import TokenLogprob
from jobs.domain.tools import ToolCall, Tools
from tests.seeing import data_url, make_image

USER = (Message("user", "x"),)
NOW = '[{"type":"function","function":{"name":"now"}}]'


def body_of(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        build_body(
            request,
            model="m",
            defaults=GenerationDefaults(),
            constraint_fields={"response_format": {"type": "json_object"}},
            streams=False,
            max_tokens_name="max_tokens",
        )
    )
    return body


def read(body: dict[str, Any]) -> Answer:
    answer = read_answer(json.dumps(body).encode(), content_type="application/json")
    assert isinstance(answer, Answer)
    return answer


@pytest.mark.parametrize(
    ("tools", "choice", "parallel"),
    [
        (Tools(NOW), "auto", None),
        (Tools(NOW, "required", False), "required", False),  # noqa: FBT003
        (Tools(NOW, "now"), {"type": "function", "function": {"name": "now"}}, None),
    ],
)
def test_a_server_calls_tools_its_own_way(tools: Tools, choice: object, *, parallel: bool) -> None:
    body = body_of(Request(id=1, messages=USER, tools=tools))
    assert body["tools"] == json.loads(NOW)
    assert body["tool_choice"] == choice
    assert body.get("parallel_tool_calls") is parallel
    assert "response_format" not in body, "the schema of a forced call is ours"


def test_turns_that_call_and_answer_are_sent() -> None:
    messages = (
        Message("assistant", "", None, (ToolCall("now", "{}", "c1"),)),
        Message("tool", "12:00", None, (), "c1"),
    )
    assert body_of(Request(id=1, messages=messages))["messages"] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
    ]


def test_calls_come_whole_or_in_pieces() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a":1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Hm."}
    whole = read({"choices": [{"index": 0, "message": said, "finish_reason": "tool_calls"}]})
    assert whole.tool_calls == (ToolCall("now", '{"a":1}', "c1"),)
    assert whole.reasoning == "Hm."
    stream = StreamReader()
    for piece in (
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "now", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "f", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
    ):
        event = {"choices": [{"index": 0, "delta": piece, "finish_reason": None}]}
        stream.feed(f"data: {json.dumps(event)}\n\n".encode())
    stream.feed(b"data: [DONE]\n\n")
    answer = stream.result()
    assert isinstance(answer, Answer)
    assert answer.tool_calls == (ToolCall("now", '{"a":1}', "c1"), ToolCall("f", "{}", "c2"))


def stream_of(*deltas: dict[str, Any], finish: str = "tool_calls") -> StreamReader:
    stream = StreamReader()
    for delta in deltas:
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        stream.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    stream.feed(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
    return stream


@pytest.mark.parametrize("index", [{}, {"index": 0}], ids=["no index", "one index"])
def test_calls_that_a_server_does_not_number_are_told_apart_by_their_ids(
    index: dict[str, int],
) -> None:
    stream = stream_of(
        *(
            {"tool_calls": [{**index, "id": one, "function": {"name": one, "arguments": "{}"}}]}
            for one in ("f", "g")
        ),
    )
    answer = stream.result()
    assert isinstance(answer, Answer)
    assert answer.tool_calls == (ToolCall("f", "{}", "f"), ToolCall("g", "{}", "g"))


def test_pieces_of_a_call_with_ids_that_a_server_made_up_are_one_call() -> None:
    named = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}
    pieces = [
        {"index": 0, "id": f"x{number}", "function": {"arguments": text}}
        for number, text in enumerate(('{"a"', ":1}"))
    ]
    answer = stream_of(*({"tool_calls": [one]} for one in (named, *pieces))).result()
    assert isinstance(answer, Answer)
    assert answer.tool_calls == (ToolCall("f", '{"a":1}', "c1"),)


def test_an_answer_that_a_server_broke_off_is_no_answer() -> None:
    said = {"message": {"content": "half of"}, "finish_reason": "abort"}
    whole = read_answer(json.dumps({"choices": [said]}).encode(), content_type="application/json")
    assert isinstance(whole, Trouble)
    assert isinstance(stream_of({"content": "half of"}, finish="abort").result(), Trouble)


def test_every_parameter_is_sent_and_what_nobody_asked_for_is_not() -> None:
    sampling = SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        min_p=0.1,
        min_tokens=3,
        logit_bias=((7, -100.0),),
        stop_token_ids=(9,),
        bad_words=("no",),
        logprobs=2,
    )
    body = body_of(Request(id=1, messages=USER, sampling=sampling))
    assert {name: body[name] for name in body if name not in {"model", "messages"}} == {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "min_p": 0.1,
        "min_tokens": 3,
        "logit_bias": {"7": -100.0},
        "stop_token_ids": [9],
        "bad_words": ["no"],
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_object"},
    }
    plain = body_of(Request(id=1, prompt="x", sampling=SamplingParams(logprobs=0)))
    assert plain == {
        "model": "m",
        "prompt": "x",
        "logprobs": 0,
        "response_format": {"type": "json_object"},
    }


def test_probabilities_are_read_in_either_form() -> None:
    likely = {"token": "a", "logprob": -0.5, "bytes": [97]}
    content = [{**likely, "top_logprobs": [likely, {"token": "b", "logprob": -1, "bytes": None}]}]
    said = {"message": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": content}}
    expected = (TokenLogprob(b"a", -0.5, ((b"a", -0.5), (b"b", -1.0))),)
    assert read({"choices": [said]}).logprobs == expected
    lists = {
        "tokens": ["a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"a": -0.5, "b": -1.0}],
        "text_offset": [0],
    }
    plain = {"text": "a", "finish_reason": "stop", "logprobs": lists}
    assert read({"choices": [plain]}).logprobs == expected


@pytest.mark.parametrize(
    ("pooling", "endpoint", "body"),
    [
        (
            Pooling("embed", ("a", (1, 2)), (), 4),
            "/embeddings",
            {"input": ["a", [1, 2]], "encoding_format": "float", "dimensions": 4},
        ),
        (Pooling("score", ("a", "b"), ("q",)), "/rerank", {"query": "q", "documents": ["a", "b"]}),
        (
            Pooling("score", ("a", "b"), ("q", "r")),
            "/score",
            {"text_1": ["q", "r"], "text_2": ["a", "b"]},
        ),
    ],
)
def test_texts_go_where_they_are_embedded_or_scored(
    pooling: Pooling, endpoint: str, body: dict[str, Any]
) -> None:
    request = Request(id=1, pooling=pooling)
    assert endpoint_of(request) == endpoint
    assert body_of(request) == {"model": "m", **body}
    assert not may_be_long(request, GenerationDefaults(), than=10)


def test_numbers_come_back_in_the_order_of_the_texts() -> None:
    packed = struct.pack("<2f", 0.5, -2)
    data = [
        {"object": "embedding", "index": 1, "embedding": base64.b64encode(packed).decode()},
        {"object": "embedding", "index": 0, "embedding": [1.0, 0.25]},
    ]
    embedded = read({"data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    assert embedded.vectors == (struct.pack("<2f", 1.0, 0.25), packed)
    assert embedded.usage.prompt_tokens == 3
    ranked = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]
    assert read({"results": ranked, "usage": {"total_tokens": 5}}).scores == (0.1, 0.9)
    scored = [{"index": 0, "object": "score", "score": 0.5}]
    assert read({"data": scored}).scores == (0.5,)


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": "no base64!"}],
        [{"index": 0, "embedding": base64.b64encode(b"int8s").decode()}],
        [{"index": 0, "embedding": ""}],
        [{"index": 0, "embedding": [1e39]}],
        [{"index": 1, "embedding": [1.0]}],
        [{"index": 0}],
    ],
)
def test_numbers_that_make_no_sense_are_a_fault(data: list[dict[str, Any]]) -> None:
    answer = read_answer(json.dumps({"data": data}).encode(), content_type="application/json")
    assert isinstance(answer, Trouble)


def test_a_server_is_sent_images_in_their_order_among_texts() -> None:
    content = make_image(1, kind="webp")
    shown = Image(content, "webp", 40, 30, "low")
    message = Message("user", "a\nb", parts=("a", shown, "b", Image(content, "webp", 40, 30)))
    url = data_url(content, "webp")
    assert body_of(Request(id=1, messages=(message, *USER)))["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                {"type": "text", "text": "b"},
                {"type": "image_url", "image_url": {"url": url}},
            ],
        },
        {"role": "user", "content": "x"},
    ]
