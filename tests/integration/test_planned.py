"""A batch that is planned, and the same one as it arrives: the same answers, byte for byte.

The engine computes in float32, whose sums do not depend on who shares a step.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.demo import model_path
from engine.demo.text import examples_of
from jobs.domain.request import CHAT
from tests.integration.runs import Folder
from tests.normalised import normalised

UNPLANNED = {
    "BATCHCTL_PLANNING__FOLD": "none",
    "BATCHCTL_PLANNING__BY_PREFIX": "false",
    "BATCHCTL_PLANNING__BY_LENGTH": "false",
}
NUM_LINES = 120
NUM_GROUPS, NUM_EXAMPLES = 4, 3
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "city": {"type": "string", "maxLength": 40},
        "job": {"type": "string", "maxLength": 40},
    },
    "required": ["name", "age", "city", "job"],
    "additionalProperties": False,
}


def make_batch(num_lines: int) -> bytes:
    """Return lines of which a third repeats others, and many begin alike: all greedy.

    Four kinds in turn: a question behind a few answered ones, which those of its group share; a
    schema; a choice; free text of very different lengths, some of them cut off.
    """
    people = examples_of("person", 11, held_out=True)
    moods = examples_of("sentiment", 11, held_out=True)
    shown = [
        [one for _ in range(NUM_EXAMPLES) for one in _shown(next(people))]
        for _ in range(NUM_GROUPS)
    ]
    bodies: list[dict[str, Any]] = []
    for number in range(num_lines * 2 // 3):
        kind = number % 4
        asked = list(next(moods if kind == 2 else people).messages)
        body: dict[str, Any] = {"messages": asked, "max_tokens": 60}
        if kind == 0:
            body["messages"] = [*shown[number % NUM_GROUPS], *asked]
        elif kind == 1:
            form = {"name": "person", "strict": True, "schema": SCHEMA}
            body |= {
                "response_format": {"type": "json_schema", "json_schema": form},
                "max_tokens": 200 if number % 3 else 20,  # some are cut off, which is an error
            }
        elif kind == 2:
            body["structured_outputs"] = {"choice": ["positive", "negative", "neutral"]}
        else:
            body["max_tokens"] = (4, 30, 120)[number // 4 % 3]
        bodies.append(body)
    rng = random.Random(5)
    bodies += [rng.choice(bodies) for _ in range(num_lines - len(bodies))]
    rng.shuffle(bodies)
    lines = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": CHAT,
            "body": {"model": "demo", "temperature": 0, **body},
        }
        for number, body in enumerate(bodies)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _shown(example: Any) -> list[dict[str, str]]:  # noqa: ANN401  an example of the demo
    return [*example.messages, {"role": "assistant", "content": example.answer}]


def run(path: Path, content: bytes, *, settings: dict[str, str]) -> Folder:
    path.mkdir()
    folder = Folder(
        path,
        settings={
            "BATCHCTL_SHARDS__MAX_LINES": "25",
            "OMP_NUM_THREADS": "1",
            # Room for fewer beginnings than there are, so that their order is worth something.
            "BATCHCTL_MODELS": json.dumps(
                {
                    "demo": {
                        "engine": "hf",
                        "source": str(model_path()),
                        "options": {"compute_dtype": "float32", "slots": 8, "num_blocks": 64},
                    }
                }
            ),
            **settings,
        },
    )
    name = folder.write("in.jsonl", content)
    ended = folder.run(name, "-o", "out.jsonl", "--errors", "err.jsonl", seconds=240)
    assert ended.code == 4, ended.stderr
    return folder


def run_order_of(folder: Folder) -> list[int]:
    """Return the lines of the input that ran, in the order in which they did; none: as it is."""
    blobs = (folder / "data").glob("runs/*/**/plans/*/*.jsonl")
    return [
        json.loads(line.partition(b"\t")[0])[0]
        for blob in blobs
        for line in blob.read_bytes().splitlines()
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_are_the_same_bytes_planned_and_as_they_arrive(tmp_path: Path) -> None:
    content = make_batch(NUM_LINES)
    planned = run(tmp_path / "planned", content, settings={})
    plain = run(tmp_path / "plain", content, settings=UNPLANNED)
    ran = run_order_of(planned)
    bodies = [line["response"]["body"] for line in planned.lines("out.jsonl")]
    followed = sum("same_as" in body.get("batchctl", {}) for body in bodies)
    assert 0 < followed <= NUM_LINES - len(ran), "equal lines were folded"
    assert ran != sorted(ran), "and the others ran in another order"
    assert run_order_of(plain) == []
    for name in ("out.jsonl", "err.jsonl"):
        found, wanted = ((folder / name).read_bytes().splitlines() for folder in (planned, plain))
        assert found != wanted
        assert normalised(found) == normalised(wanted)


def test_a_repeated_line_is_told_what_it_would_have_used_by_itself() -> None:
    def line(custom_id: str, tokens: int, **told: object) -> bytes:
        usage = {"completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": tokens}}
        body = {"id": f"c{tokens}", "created": tokens, "usage": usage, "text": "yes", **told}
        response = {"status_code": 200, "request_id": f"req{tokens}", "body": body}
        whole = {"id": f"b{tokens}", "custom_id": custom_id, "response": response, "error": None}
        return json.dumps(whole).encode()

    same = {"batchctl": {"constraint": None, "attempts": 1, "same_as": "b"}}
    folded = [line("a", 0, **same), line("b", 5)]
    assert normalised(folded) == normalised([line("a", 5), line("b", 5)])
    assert normalised(folded) != normalised([line("a", 4), line("b", 5)])
    twice = {"batchctl": {"constraint": None, "attempts": 2}}
    assert normalised([line("a", 5, **twice)]) != normalised([line("a", 5)])
