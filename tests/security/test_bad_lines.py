"""One file with every kind of bad line among good ones: each costs its own line and nothing else.

What planning can see it reports, all of it at once; what only the engine finds goes to the error
file, beside the answers to all the others.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config import HfConfig
from engine.registry import describe_model
from jobs.domain.batch import BatchStatus
from tests.builders import Bench, make_line
from tests.integration.runs import Folder
from tests.integration.test_endpoints import CALLING_TEMPLATE, TOOL
from tests.security.test_schemas import chain, tree
from tests.unit.engine.conftest import make_tiny_model

PAGE_TOKENS = 16
NUM_BLOCKS = 12
"""A cache of 192 tokens, where the context has 512."""
WORD = "alpha "

Line = tuple[str, dict[str, Any]]


def tool(name: str, parameters: object = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def form(schema: object) -> dict[str, Any]:
    named = {"name": "n", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": "hello"}
TWICE = [{"$ref": "#"}, {"$ref": "#"}]

# --- what planning reports: the body, its code, its field, and a word of the hint ---

PLANNED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "max_tokens 0": ({"max_tokens": 0}, "invalid_value", "body.max_tokens", ">= 1"),
    "max_tokens below": ({"max_tokens": -5}, "invalid_value", "body.max_tokens", ">= 1"),
    "max_tokens beyond": ({"max_tokens": 2**31}, "invalid_value", "body.max_tokens", "<="),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        "invalid_value",
        "body.messages[0].role",
        "'robot'",
    ),
    "no messages": ({"messages": []}, "invalid_value", "body.messages", "length >= 1"),
    "empty message": (
        {"messages": [{"role": "user"}]},
        "missing_required_parameter",
        "body.messages[0].content",
        "'content'",
    ),
    "tools of one name": (
        {"tools": [tool("f"), tool("f")]},
        "invalid_value",
        "body.tools",
        "same name",
    ),
    "a choice that is no tool": (
        {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "invalid_value",
        "body.tool_choice",
        "not among the tools",
    ),
    "a choice without tools": (
        {"tool_choice": "required"},
        "invalid_value",
        "body.tool_choice",
        "no tools",
    ),
    "tools and a form": (
        {"tools": [tool("f")], **form({"type": "object"})},
        "invalid_value",
        "body.tools",
        "leave `tools` or the format out",
    ),
    "an answer to no call": (
        {"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "c"}]},
        "invalid_messages",
        "body.messages[1].tool_call_id",
        "names none",
    ),
    "a user who calls": (
        {"messages": [USER | {"tool_calls": [CALL]}]},
        "invalid_messages",
        "body.messages[0].tool_calls",
        "Only an assistant",
    ),
    "a tool's schema": (
        {"tools": [tool("f", {"type": "nothing"})]},
        "invalid_schema",
        "body.tools",
        "at `type`",
    ),
    "a tool's bomb": ({"tools": [tool("f", chain("anyOf"))]}, "invalid_schema", "body.tools", ""),
    "recursion without end": (
        form({"$ref": "#"}),
        "invalid_schema",
        "body.response_format",
        "cannot be satisfied",
    ),
    "references to nowhere": (
        form({"$ref": "#/$defs/none"}),
        "invalid_schema",
        "body.response_format",
        "",
    ),
    "references, exponentially": (
        form(chain("allOf")),
        "invalid_schema",
        "body.response_format",
        "references are followed",
    ),
    "unions, exponentially": (
        form(chain("anyOf")),
        "invalid_schema",
        "body.response_format",
        "references are followed",
    ),
    "a long way of references": (
        form(chain("contains", links=1_500)),
        "invalid_schema",
        "body.response_format",
        "references are followed",
    ),
    "a huge enum": (
        form({"enum": list(range(5_001))}),
        "invalid_schema",
        "body.response_format",
        "enum of more than",
    ),
    "a huge schema": (
        form({"description": "x" * (256 << 10)}),
        "invalid_schema",
        "body.response_format",
        "larger than",
    ),
    "a regex that is none": (
        {"structured_outputs": {"regex": "("}},
        "invalid_regex",
        "body.structured_outputs",
        "",
    ),
    "a grammar that is none": (
        {"structured_outputs": {"grammar": "start: ("}},
        "invalid_grammar",
        "body.structured_outputs",
        "",
    ),
    "a grammar bomb": (
        {"structured_outputs": {"grammar": "start: " + "(" * 20_000 + ")" * 20_000}},
        "invalid_grammar",
        "body.structured_outputs",
        "",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model that is shown tools."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder, hidden_size=64)
    (folder / "chat_template.jinja").write_text(CALLING_TEMPLATE)
    return folder


def test_planning_reports_every_bad_line_with_its_number_code_and_hint(
    bench: Bench, model: Path
) -> None:
    describe = partial(describe_model, HfConfig(model=str(model)))
    content = b""
    expected: dict[int, str] = {}
    for number, (name, (body, *_)) in enumerate(PLANNED.items()):
        content += make_line(f"good-{number}") + b"\n" + make_line(name, **body) + b"\n"
        expected[2 * number + 2] = name
    bench.submit(content)
    batch = bench.plan(describe=describe)
    assert batch.status is BatchStatus.FAILED
    found = {problem.line: problem for problem in batch.errors}
    told = {expected[line or 0]: (problem.code, problem.param) for line, problem in found.items()}
    assert told == {name: (code, param) for name, (_, code, param, _) in PLANNED.items()}
    for line, name in expected.items():
        assert PLANNED[name][3] in found[line].message
        assert len(found[line].message) < 1_000


# --- what only the engine finds ---

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "longer than the context": ({"content": WORD * 2_000}, "context_length_exceeded"),
    "longer than the cache": ({"content": WORD * 300}, "context_length_exceeded"),
}
GOOD: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 10_000_000},
    "huge enum": {**form({"enum": [f"value {n}" for n in range(4_000)]}), "max_tokens": 16},
    "tree": {**form(tree()), "max_tokens": 16},
    "regex bomb": {
        "structured_outputs": {"regex": "((a{0,500}){0,500}){0,500}b"},
        "max_tokens": 8,
    },
    "regex": {"structured_outputs": {"regex": "(a+)+b?"}, "max_tokens": 8},
    "tool": {
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 120,
    },
}


def _asking(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"content": name, "temperature": 0} | body


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_only_the_engine_finds_costs_its_own_line(tmp_path: Path, model: Path) -> None:
    options = {"num_blocks": NUM_BLOCKS, "page_tokens": PAGE_TOKENS}
    entry = {"source": str(model), "engine": "hf", "options": options}
    folder = Folder(tmp_path, settings={"BATCHCTL_MODELS": json.dumps({"tiny": entry})})
    bodies: dict[str, dict[str, Any]] = {}
    for number, (name, (body, _)) in enumerate(BAD.items()):
        bodies[f"before-{number}"] = {"max_tokens": 4}
        bodies[name] = body
    bodies |= GOOD
    bodies["last"] = {"max_tokens": 4}
    content = b"".join(
        make_line(name, model="tiny", **_asking(name, body)) + b"\n"
        for name, body in bodies.items()
    )
    arguments = ("--model", "tiny", "--output", "out.jsonl")
    ended = folder.run(folder.write("in.jsonl", content), *arguments, seconds=240)
    assert ended.code == 4, ended.stderr
    assert "Traceback" not in ended.stderr
    errors = {line["custom_id"]: line for line in folder.lines("out.errors.jsonl")}
    told = {name: line["response"]["body"]["error"]["code"] for name, line in errors.items()}
    assert told == {name: code for name, (_, code) in BAD.items()}
    for name in ("longer than the context", "longer than the cache"):
        assert "no room for an answer" in errors[name]["response"]["body"]["error"]["message"]
    answers = {line["custom_id"]: line for line in folder.lines("out.jsonl")}
    assert sorted(answers) == sorted(set(bodies) - set(BAD))
    usage = answers["max_tokens"]["response"]["body"]["usage"]
    assert usage["total_tokens"] <= NUM_BLOCKS * PAGE_TOKENS
