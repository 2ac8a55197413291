"""What comes from others and ends in a database: rows 21, 30, 37 and 40 of the security table.

Messages forged at the broker are in tests/integration/fleet/test_fleet.py.
"""

import ast
import json

import pytest

from jobs.broker import transport_settings
from jobs.domain.batch import BatchStatus
from jobs.wakeups import BrokerConfig
from storage import batches
from tests.builders import Bench, make_line
from tests.security.measuring import REPOSITORY

ODD = ["\0", "\0\0", "a\0b", "\x1b[2J", "\u202e", "'; DROP TABLE batches;--", "\U0001f600" * 100]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_row_37_whatever_a_line_says_can_be_reported_and_kept(bench: Bench, text: str) -> None:
    """A NUL in a message would fail every write of it, and so the planner, again and again."""
    lines = [
        make_line("a", model=text),
        make_line("b").replace(b'"messages"', json.dumps(text).encode() + b': 1, "messages"'),
        make_line("c", messages=[{"role": text, "content": "x"}]),
        make_line("d", response_format={"type": text}),
        make_line("e", guided_json={"type": text}),
        make_line("f", guided_json={"$ref": text}),
        make_line("g", guided_regex=f"({text}"),
        make_line("h", guided_grammar=f"start: {text} {text}"),
        make_line("i", guided_json={text: {"$ref": f"#/{text}"}, "$ref": f"#/{text}/x"}),
        make_line("j", seed=text),
        make_line("k").replace(b"/v1/chat/completions", json.dumps(text).encode()[1:-1]),
        make_line("l").replace(b'"POST"', json.dumps(text).encode()),
    ]
    bench.submit(b"\n".join(lines))
    batch = bench.plan()
    assert batch.status is BatchStatus.FAILED
    assert batches.get(bench.db, batch.id).errors == batch.errors
    assert {1, 2, 3, 4, 5, 11, 12} <= {problem.line for problem in batch.errors}
    for problem in batch.errors:
        assert (problem.message + (problem.param or "")).isprintable()


def test_row_37_odd_ids_come_back_as_they_were(bench: Bench) -> None:
    ids = [*ODD, "../../x", "\r\n", "null", "0"]
    batch = bench.submit_planned(b"\n".join(make_line(one) for one in ids))
    assert batch.request_counts.total == len(ids)


def test_row_21_messages_are_json_and_what_they_say_is_not_looked_at() -> None:
    settings = transport_settings(BrokerConfig(url="redis://127.0.0.1:1/0"))
    assert settings["accept_content"] == ["json"]
    assert settings["task_serializer"] == settings["result_serializer"] == "json"
    assert not settings.get("result_backend")
    tree = ast.parse((REPOSITORY / "jobs/worker/tasks.py").read_text(encoding="utf-8"))
    tasks = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(tasks) == 4
    for task in tasks:
        assert task.args.vararg is not None
        assert task.args.kwarg is not None
        assert {task.args.vararg.arg, task.args.kwarg.arg} == {"_", "__"}
        assert not {"_", "__"} & {n.id for n in ast.walk(task) if isinstance(n, ast.Name)}
