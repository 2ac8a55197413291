"""Batches that embed, rerank, score or call tools, from a file to its answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.domain.pooling import EMBEDDINGS, RERANK, SCORE
from jobs.domain.request import CHAT
from tests.integration.runs import Folder
from tests.unit.engine.conftest import make_tiny_model
from tests.unit.engine.test_pooling import make_encoder

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALLING_TEMPLATE = (
    "{%- if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
    "<|im_start|>assistant\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def lines_of(endpoint: str, *bodies: dict[str, Any]) -> bytes:
    return b"".join(
        json.dumps({"custom_id": f"r{n}", "method": "POST", "url": endpoint, "body": body}).encode()
        + b"\n"
        for n, body in enumerate(bodies)
    )


def run(folder: Folder, content: bytes, model: Path) -> dict[str, Any]:
    """Run lines on a model of a folder; return the bodies of the answers by their ids."""
    ended = folder.run(
        folder.write("in.jsonl", content),
        *("--engine", "hf", "--model", str(model), "--output", "out.jsonl"),
        seconds=240,
    )
    assert ended.code == 0, ended.stderr
    return {line["custom_id"]: line["response"]["body"] for line in folder.lines("out.jsonl")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_texts_are_embedded_ranked_and_scored(
    folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tmp_path_factory.mktemp("encoder")
    make_encoder(model)
    texts = ["alpha beta", "gamma", "delta json text"]
    embedded = run(
        folder, lines_of(EMBEDDINGS, {"input": texts}, {"input": texts[0], "dimensions": 4}), model
    )
    assert [len(one["embedding"]) for one in embedded["r0"]["data"]] == [32, 32, 32]
    assert len(embedded["r1"]["data"][0]["embedding"]) == 4
    assert embedded["r0"]["usage"]["prompt_tokens"] > 0
    ranked = run(folder, lines_of(RERANK, {"query": "gamma", "documents": texts}), model)
    results = ranked["r0"]["results"]
    assert results[0]["document"]["text"] == "gamma"
    assert results[0]["relevance_score"] == pytest.approx(1, abs=0.02)
    scored = run(folder, lines_of(SCORE, {"text_1": "gamma", "text_2": texts}), model)
    scores = [one["score"] for one in scored["r0"]["data"]]
    assert sorted(scores, reverse=True) == pytest.approx(
        [one["relevance_score"] for one in results], abs=0.02
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_never_learned_to_call_tools_is_made_to(
    folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tmp_path_factory.mktemp("caller")
    make_tiny_model(model, hidden_size=64)
    (model / "chat_template.jinja").write_text(CALLING_TEMPLATE)
    chat = {"messages": [{"role": "user", "content": "Bern?"}], "max_tokens": 200}
    forced: dict[str, Any] = {**chat, "tools": [TOOL], "tool_choice": "required"}
    once = {**forced, "parallel_tool_calls": False, "temperature": 0}
    bodies = run(folder, lines_of(CHAT, once, {**once, "seed": 5}), model)
    for body in bodies.values():
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"])["city"] in {"Bern", "Oslo"}


@pytest.mark.parametrize(
    ("change", "line", "code"),
    [
        pytest.param({"tools": [TOOL]}, 1, "unsupported_parameter", id="no tools"),
        pytest.param(
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            1,
            "invalid_value",
            id="no such tool",
        ),
    ],
)
def test_tools_that_cannot_be_called_are_refused_before_anything_runs(
    folder: Folder,
    tmp_path_factory: pytest.TempPathFactory,
    change: dict[str, Any],
    line: int,
    code: str,
) -> None:
    model = tmp_path_factory.mktemp("plain")
    make_tiny_model(model, hidden_size=64)
    chat = {"messages": [{"role": "user", "content": "x"}], **change}
    ended = folder.run(
        folder.write("in.jsonl", lines_of(CHAT, chat)), "--engine", "hf", "--model", str(model)
    )
    ended.assert_problem(line, code)


def test_a_tool_with_a_schema_that_is_none_is_refused_with_its_line(
    folder: Folder, make_tool: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    bad = make_tool({"type": "nothing"})
    good = {"messages": [{"role": "user", "content": "x"}]}
    ended = folder.run(
        folder.write("in.jsonl", lines_of(CHAT, good, {**good, "tools": [bad]})),
        *("--model", "simulated"),
    )
    ended.assert_problem(2, "invalid_schema")


@pytest.fixture
def make_tool() -> Callable[[dict[str, Any]], dict[str, Any]]:
    def make(parameters: dict[str, Any]) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "parameters": parameters}}

    return make
