"""Batches with images, end to end, on a tiny random vision model and a real engine process."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders import make_line
from tests.integration.api.servers import run_api, wait_for
from tests.integration.runs import Folder
from tests.seeing import IMAGE_TOKENS, image_part, make_bomb, make_image, make_llava, text_part

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = {"slots": 4, "batch_tokens": 64, "num_blocks": 96, "page_tokens": 16, "device": "cpu"}
TERMINAL = {"completed", "failed", "expired", "cancelled"}


def models_of(folder: Path) -> dict[str, Any]:
    return {"sees": {"source": str(folder), "engine": "hf", "options": OPTIONS}}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def folder(tmp_path: Path, llava: Path) -> Folder:
    return Folder(tmp_path, settings={"BATCHCTL_MODELS": json.dumps(models_of(llava))})


def line_of(custom_id: str, *parts: dict[str, Any]) -> bytes:
    return (
        make_line(
            custom_id,
            model="sees",
            messages=[{"role": "user", "content": list(parts)}],
            temperature=0,
            max_tokens=8,
        )
        + b"\n"
    )


def answer_of(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def test_a_file_of_texts_and_images_is_answered_but_for_a_damaged_image(folder: Folder) -> None:
    cut = make_image(9)
    content = b"".join(
        [
            line_of("text", text_part("What is this? ")),
            line_of("red", text_part("What is this? "), image_part(make_image(1))),
            line_of("cut", text_part("What is this? "), image_part(cut[: len(cut) // 2])),
            line_of(
                "blue", text_part("What is this? "), image_part(make_image(2, kind="jpeg"), "jpeg")
            ),
            line_of("red again", text_part("What is this? "), image_part(make_image(1))),
        ]
    )
    name = folder.write("in.jsonl", content)
    ended = folder.run(name, "-m", "sees", "-o", "out.jsonl", seconds=300)
    assert ended.code == 4, ended.stderr
    lines = {line["custom_id"]: line for line in folder.lines("out.jsonl")}
    assert list(lines) == ["text", "red", "blue", "red again"]
    assert answer_of(lines["red"]) == answer_of(lines["red again"])
    assert len({answer_of(line) for line in lines.values()}) == 3
    tokens = {n: line["response"]["body"]["usage"]["prompt_tokens"] for n, line in lines.items()}
    assert tokens["red"] == tokens["blue"] == tokens["text"] + IMAGE_TOKENS
    (failed,) = folder.lines("out.errors.jsonl")
    assert failed["custom_id"] == "cut"
    assert failed["response"]["body"]["error"]["code"] == "invalid_image"


def test_a_bomb_is_refused_at_its_line_before_anything_runs(folder: Folder) -> None:
    lines = [line_of("a", text_part("x")), line_of("bomb", image_part(make_bomb()))]
    name = folder.write("in.jsonl", b"".join(lines))
    ended = folder.run(name, "-m", "sees", "-o", "out.jsonl", seconds=300)
    ended.assert_problem(2, "image_too_large")


def test_images_in_uploaded_files_are_shown_to_the_model(tmp_path: Path, llava: Path) -> None:
    with (
        run_api(tmp_path, workers=True, models=models_of(llava)) as running,
        running.client() as client,
    ):
        image = client.files.create(file=("cat.png", make_image(1)), purpose="vision")
        other = client.files.create(
            file=("dog.webp", make_image(2, kind="webp")), purpose="user_data"
        )
        content = b"".join(
            [
                line_of("inside", text_part("So? "), image_part(make_image(1))),
                line_of("file", text_part("So? "), {"type": "input_image", "file_id": image.id}),
                line_of(
                    "other",
                    text_part("So? "),
                    {"type": "image_url", "image_url": {"url": other.id}},
                ),
            ]
        )
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        wait_for(lambda: client.batches.retrieve(batch.id).status in TERMINAL, seconds=300)
        ended = client.batches.retrieve(batch.id)
        assert ended.status == "completed", ended.errors
        assert ended.error_file_id is None
        assert ended.output_file_id is not None
        output = client.files.content(ended.output_file_id).text
        answers = {
            line["custom_id"]: answer_of(line) for line in map(json.loads, output.splitlines())
        }
        assert answers["inside"] == answers["file"] != answers["other"]
