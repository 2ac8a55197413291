"""A mixed batch for the demo model, the same on every engine: free text, schemas and choices.

Every line is greedy, so engines that compute alike answer alike.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from engine.constraints import validate
from engine.demo.text import Example, examples_of
from jobs.domain.request import CHAT, parse_line

TOTALS = {"lines": 500, "schema": 250, "choice": 125, "free": 125}
"""Of the whole batch, on every engine."""
_SENTIMENTS = ["positive", "negative", "neutral"]
_STRING = {"type": "string", "maxLength": 80}
_FIELDS: dict[str, dict[str, Any]] = {
    "person": {
        "name": _STRING,
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "city": _STRING,
        "job": _STRING,
    },
    "order": {
        "item": _STRING,
        "quantity": {"type": "integer", "minimum": 0},
        "price": {"type": "number", "minimum": 0},
    },
    "event": {
        "event": _STRING,
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "place": _STRING,
    },
}
# In turn: the task, and how its answer is held.
_TURNS = (
    ("person", "schema"),
    ("sentiment", "choice"),
    ("about", "free"),
    ("order", "schema"),
    ("event", "schema"),
    ("person", "free"),
    ("sentiment", "choice"),
    ("event", "schema"),
)


def _lines(n: int, model: str) -> Iterator[dict[str, Any]]:
    texts: dict[str, Iterator[Example]] = {
        task: examples_of(task, 7, held_out=True) for task, _ in _TURNS
    }
    for number in range(n):
        task, held = _TURNS[number % len(_TURNS)]
        body: dict[str, Any] = {
            "model": model,
            "messages": list(next(texts[task]).messages),
            "temperature": 0,
            "max_tokens": 200,
        }
        if held == "choice":
            body["structured_outputs"] = {"choice": _SENTIMENTS}
        elif held == "schema":
            # A description makes 50 different schemas, and asks for nothing else.
            schema = {
                "type": "object",
                "description": f"form {number % 50}",
                "properties": _FIELDS[task],
                "required": list(_FIELDS[task]),
                "additionalProperties": False,
            }
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": task, "strict": True, "schema": schema},
            }
        yield {"custom_id": f"{held}-{number}", "method": "POST", "url": CHAT, "body": body}


def write_mixed(path: Path, n: int = 500, model: str = "demo") -> None:
    """Write the batch's first `n` lines."""
    with path.open("w", encoding="utf-8") as file:
        for line in _lines(n, model):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def answers_of(output: Path) -> dict[str, str]:
    """Return the answer to each custom_id."""
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in map(json.loads, output.read_text("utf-8").splitlines())
    }


def check_mixed(output: Path, errors: Path, n: int = 500) -> dict[str, int]:
    """Check that every line has one answer, and that it keeps what was asked of it.

    Returns the totals: lines, and among them those of each kind.
    """
    failed = errors.read_text("utf-8").splitlines() if errors.exists() else []
    assert not failed, f"{len(failed)} lines failed, the first: {failed[0][:600]}"
    written = output.read_text("utf-8").splitlines()
    answers = answers_of(output)
    assert len(written) == len(answers) == n
    totals = {"lines": 0, "schema": 0, "choice": 0, "free": 0}
    for line in islice(_lines(n, "demo"), n):
        custom_id = line["custom_id"]
        text = answers[custom_id]
        constraint = parse_line(json.dumps(line).encode(), endpoint=CHAT).constraint
        if constraint is None:
            assert text.strip(), f"{custom_id} has an empty answer"
        else:
            reason = validate(constraint, text)
            assert reason is None, f"{custom_id}: {reason}"
        totals["lines"] += 1
        totals[custom_id.partition("-")[0]] += 1
    return totals
