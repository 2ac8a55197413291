"""Batches of responses: a file that `batchctl run` answers with the bundled model."""

import json
from pathlib import Path
from typing import Any

from openai.types.responses import Response

from engine.demo import model_path
from jobs.domain.responses import RESPONSES
from tests.integration.runs import Folder

SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["good", "bad"]}},
    "required": ["label"],
    "additionalProperties": False,
}


def lines_of(*bodies: dict[str, Any]) -> bytes:
    return b"".join(
        json.dumps(
            {"custom_id": f"r{n}", "method": "POST", "url": RESPONSES, "body": body}
        ).encode()
        + b"\n"
        for n, body in enumerate(bodies)
    )


def test_responses_are_answered_as_the_chats_of_their_meaning(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    form = {"format": {"type": "json_schema", "name": "label", "schema": SCHEMA}}
    common = {"temperature": 0, "max_output_tokens": 12}
    content = lines_of(
        {"instructions": "Be short.", "input": "Say hello", **common},
        {"input": [{"role": "user", "content": "Judge: fine"}], "text": form, **common},
        {"input": "Say hello", "include": ["message.output_text.logprobs"], **common},
        {"instructions": "Be short.", "input": "Say hello", "metadata": {"a": "b"}, **common},
    )
    model = ("--engine", "hf", "--model", str(model_path()), "--output", "out.jsonl")
    ended = folder.run(folder.write("in.jsonl", content), *model, seconds=240)
    assert ended.code == 0, ended.stderr
    bodies = [line["response"]["body"] for line in folder.lines("out.jsonl")]
    answers = [Response.model_validate(body, strict=True) for body in bodies]
    assert json.loads(answers[1].output_text)["label"] in {"good", "bad"}
    assert answers[3].output_text == answers[0].output_text
    assert bodies[3]["batchctl"]["same_as"] == "r0"
    message = answers[2].output[0]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs
    assert answers[0].usage is not None
    assert 0 < answers[0].usage.output_tokens <= 12
    assert len({answer.id for answer in answers}) == 4


def test_a_bad_response_is_reported_with_its_line(tmp_path: Path) -> None:
    content = lines_of({"input": "a"}, {"input": "a", "previous_response_id": "resp_1"})
    ended = Folder(tmp_path).run_file(content)
    ended.assert_problem(2, "unsupported_parameter")
    assert "nothing is stored between requests" in ended.stderr
