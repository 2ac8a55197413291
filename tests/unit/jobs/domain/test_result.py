import base64
import json
import struct
from typing import Any

import pytest

from jobs.domain.pooling import EMBEDDINGS, RERANK, SCORE, Pooling, PoolingForm
from jobs.domain.request import CHAT, COMPLETIONS
from jobs.domain.result import LineError, Result, Usage, render_result
from jobs.domain.tools import ToolCall

USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=3)
RENDERED_USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
}


def render(result: Result, *, endpoint: str = CHAT) -> dict[str, Any]:
    line = render_result(
        result, custom_id="caller's", request_id="ab", endpoint=endpoint, model="m", created=99
    )
    assert b"\n" not in line
    value: dict[str, Any] = json.loads(line)
    return value


def test_chat_answer_has_the_keys_of_the_contract() -> None:
    assert render(Result(id=1, text="Hi\n", usage=USAGE)) == {
        "id": "batch_req_ab",
        "custom_id": "caller's",
        "response": {
            "status_code": 200,
            "request_id": "req_ab",
            "body": {
                "id": "chatcmpl-ab",
                "object": "chat.completion",
                "created": 99,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Hi\n", "refusal": None},
                        "finish_reason": "stop",
                        "logprobs": None,
                    }
                ],
                "usage": RENDERED_USAGE,
            },
        },
        "error": None,
    }


def test_completion_has_the_keys_of_the_contract() -> None:
    line = render(
        Result(id=1, text="Hi", finish_reason="length", usage=USAGE), endpoint=COMPLETIONS
    )
    assert line["response"]["body"] == {
        "id": "cmpl-ab",
        "object": "text_completion",
        "created": 99,
        "model": "m",
        "choices": [{"index": 0, "text": "Hi", "finish_reason": "length", "logprobs": None}],
        "usage": RENDERED_USAGE,
    }


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_request_that_never_ran_has_an_error_and_no_response(endpoint: str) -> None:
    error = LineError(code="batch_expired", message="Too late.")
    assert render(Result(id=1, error=error), endpoint=endpoint) == {
        "id": "batch_req_ab",
        "custom_id": "caller's",
        "response": None,
        "error": {"code": "batch_expired", "message": "Too late."},
    }


@pytest.mark.parametrize(
    ("status_code", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (499, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_request_that_ran_and_failed_has_a_response_and_no_error(
    status_code: int, kind: str
) -> None:
    error = LineError(code="c", message="No.", status_code=status_code, param="messages")
    line = render(Result(id=1, error=error))
    assert line["error"] is None
    assert line["response"] == {
        "status_code": status_code,
        "request_id": "req_ab",
        "body": {"error": {"message": "No.", "type": kind, "param": "messages", "code": "c"}},
    }


def test_rejected_answer_keeps_its_text_its_tokens_and_how_often_it_was_asked_for() -> None:
    error = LineError(code="schema_mismatch", message="No.", status_code=500)
    line = render(
        Result(id=1, text="{", usage=USAGE, error=error, attempts=3, constraint="validated")
    )
    body = line["response"]["body"]
    assert body["raw_text"] == "{"
    assert body["usage"] == RENDERED_USAGE
    assert body["batchctl"] == {"constraint": "validated", "attempts": 3}
    assert set(body) == {"error", "raw_text", "usage", "batchctl"}


def test_our_addition_is_there_only_where_it_says_something() -> None:
    assert "batchctl" not in render(Result(id=1, text="x"))["response"]["body"]
    asked_again = render(Result(id=1, text="x", attempts=2))["response"]["body"]
    assert asked_again["batchctl"] == {"constraint": None, "attempts": 2}
    enforced = render(Result(id=1, text="x", constraint="enforced"))["response"]["body"]
    assert enforced["batchctl"] == {"constraint": "enforced", "attempts": 1}


@pytest.mark.parametrize("text", ["", '\u2028 \x00 "quoted" \\ \U0001f600', "a\r\nb"])
def test_any_answer_survives(text: str) -> None:
    line = render(Result(id=1, text=text))
    assert line["response"]["body"]["choices"][0]["message"]["content"] == text


def test_usages_add_up() -> None:
    assert Usage(prompt_tokens=14, completion_tokens=10, cached_tokens=6) == USAGE + USAGE


def rendered(result: Result, *, endpoint: str, pooling: Pooling | None = None) -> dict[str, Any]:
    line = render_result(
        result, custom_id="a", request_id="1", endpoint=endpoint, model="m", created=7,
        pooling=pooling,
    )  # fmt: skip
    body: dict[str, Any] = json.loads(line)["response"]["body"]
    return body


def test_tool_calls_are_written_as_openai_does() -> None:
    result = Result(id=1, tool_calls=(ToolCall("now", '{"zone":"UTC"}'), ToolCall("f", "{}", "c")))
    (choice,) = rendered(result, endpoint=CHAT)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {
            "id": "call_1_0",
            "type": "function",
            "function": {"name": "now", "arguments": '{"zone":"UTC"}'},
        },
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]


def test_reasoning_stands_beside_the_answer_to_a_chat_only() -> None:
    result = Result(id=1, text="<think>Hm.</think>Yes.")
    message = rendered(result, endpoint=CHAT)["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("Yes.", "Hm.")
    assert rendered(result, endpoint=COMPLETIONS)["choices"][0]["text"] == result.text
    plain = rendered(Result(id=1, text="Yes."), endpoint=CHAT)["choices"][0]["message"]
    assert "reasoning" not in plain


def test_vectors_are_numbers_or_their_bytes() -> None:
    vector = struct.pack("<2f", 0.25, -2.5)
    result = Result(id=1, vectors=(vector,), usage=Usage(prompt_tokens=3))
    body = rendered(result, endpoint=EMBEDDINGS, pooling=Pooling("embed", ("a",)))
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": [0.25, -2.5]}]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    form = PoolingForm(encoding="base64")
    coded = rendered(result, endpoint=EMBEDDINGS, pooling=Pooling("embed", ("a",), (), None, form))
    assert base64.b64decode(coded["data"][0]["embedding"]) == vector


def test_documents_are_ranked_by_their_scores() -> None:
    pooling = Pooling("score", ("a", "b", "c"), ("q",), None, PoolingForm(top_n=2))
    result = Result(id=1, scores=(0.1, 0.9, 0.5))
    assert rendered(result, endpoint=RERANK, pooling=pooling)["results"] == [
        {"index": 1, "document": {"text": "b"}, "relevance_score": 0.9},
        {"index": 2, "document": {"text": "c"}, "relevance_score": 0.5},
    ]
    scores = rendered(result, endpoint=SCORE, pooling=pooling)["data"]
    assert [one["score"] for one in scores] == [0.1, 0.9, 0.5]
