"""One file of chats, tools, images, texts, vectors and rankings, on five models, on one machine."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.client import Client, Upload
from jobs.domain.batch import TERMINAL_STATUSES
from jobs.domain.mixed import MIXED
from jobs.domain.pooling import EMBEDDINGS, RERANK, SCORE
from jobs.domain.request import CHAT, COMPLETIONS
from jobs.domain.responses import RESPONSES
from tests.integration.runs import Folder
from tests.integration.test_endpoints import CALLING_TEMPLATE, TOOL
from tests.seeing import IMAGE_TOKENS, image_part, make_image, make_llava, text_part
from tests.unit.engine.conftest import make_tiny_model
from tests.unit.engine.test_pooling import make_encoder

TEXTS = ["alpha beta", "gamma", "delta json text"]
NUM_ROUNDS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The catalogue: two models that make words up, one to call, one that sees, and an encoder."""
    encoder, caller = (tmp_path_factory.mktemp(name) for name in ("encoder", "caller"))
    make_encoder(encoder)
    make_tiny_model(caller, hidden_size=64)
    (caller / "chat_template.jinja").write_text(CALLING_TEMPLATE)
    options = {"step_seconds": 0.001, "reply_tokens": 4}
    return {
        "simulated": {"engine": "simulated", "options": options},
        "second": {"engine": "simulated", "options": options},
        "caller": {"engine": "hf", "source": str(caller)},
        "encoder": {"engine": "hf", "source": str(encoder)},
        "sees": {"engine": "hf", "source": str(make_llava(tmp_path_factory.mktemp("llava")))},
    }


@pytest.fixture
def folder(tmp_path: Path, models: dict[str, Any]) -> Folder:
    return Folder(tmp_path, settings={"BATCHCTL_MODELS": json.dumps(models)})


def line(custom_id: str, url: str, model: str, **body: Any) -> bytes:  # noqa: ANN401
    asked = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **body}}
    return json.dumps(asked).encode() + b"\n"


def make_all() -> bytes:
    """Return a file in which the kinds and the models take turns."""
    question = {"messages": [{"role": "user", "content": "Bern?"}]}
    forced = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    made = []
    for n in range(NUM_ROUNDS):
        said = {"messages": [{"role": "user", "content": f"[[reply=answer {n}]]"}]}
        parts = [text_part("What is this? "), image_part(make_image(n))]
        shown = {"messages": [{"role": "user", "content": parts}]}
        made += [
            line(f"chat-{n}", CHAT, "simulated", **said),
            line(f"vector-{n}", EMBEDDINGS, "encoder", input=TEXTS),
            line(f"tool-{n}", CHAT, "caller", **question, **forced, temperature=0, max_tokens=200),
            line(f"text-{n}", COMPLETIONS, "second", prompt=f"[[reply=text {n}]]"),
            line(f"rank-{n}", RERANK, "encoder", query="gamma", documents=TEXTS),
            line(f"second-{n}", CHAT, "second", **said),
            line(f"image-{n}", CHAT, "sees", **shown, temperature=0, max_tokens=4),
            line(f"response-{n}", RESPONSES, "second", input=f"[[reply=answer {n}]]"),
            line(f"score-{n}", SCORE, "encoder", text_1="gamma", text_2=TEXTS),
        ]
    return b"".join(made)


def check_all(lines: list[dict[str, Any]]) -> None:
    """Check that every line is there once, in the order of the file, as its kind wants it."""
    asked = [json.loads(one) for one in make_all().splitlines()]
    assert [one["custom_id"] for one in lines] == [one["custom_id"] for one in asked]
    for one, source in zip(lines, asked, strict=True):
        kind, number = one["custom_id"].split("-")
        body = one["response"]["body"]
        assert body["model"] == source["body"]["model"]
        if kind in {"chat", "second"}:
            assert body["choices"][0]["message"]["content"] == f"answer {number}"
        elif kind == "response":
            assert body["output"][0]["content"][0]["text"] == f"answer {number}"
        elif kind == "image":
            assert body["usage"]["prompt_tokens"] > IMAGE_TOKENS
            assert body["choices"][0]["finish_reason"] in {"stop", "length"}
        elif kind == "text":
            assert body["choices"][0]["text"] == f"text {number}"
        elif kind == "tool":
            (call,) = body["choices"][0]["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"])["city"] in {"Bern", "Oslo"}
        elif kind == "vector":
            assert [len(vector["embedding"]) for vector in body["data"]] == [32, 32, 32]
        elif kind == "rank":
            assert body["results"][0]["document"]["text"] == "gamma"
        else:
            assert len(body["data"]) == len(TEXTS)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_file_of_all_kinds_on_five_models_finishes_in_one_run(folder: Folder) -> None:
    ended = folder.run(
        folder.write("in.jsonl", make_all()),
        *("--endpoint", MIXED, "--output", "out.jsonl", "--json"),
        seconds=360,
    )
    assert ended.code == 0, ended.stderr
    check_all(folder.lines("out.jsonl"))
    summed = json.loads(ended.stdout)
    assert (summed["completed"], summed["failed"]) == (9 * NUM_ROUNDS, 0)
    assert summed["models"] == ["simulated", "encoder", "caller", "second", "sees"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_finishes_a_file_of_all_kinds_on_five_models(folder: Folder) -> None:
    path = folder.path / folder.write("in.jsonl", make_all())
    command = [*folder.command()[:-1], "serve", "--port", "0", "--json"]
    with (
        (folder.path / "stderr").open("wb") as stderr,
        subprocess.Popen(
            command,
            cwd=folder.path,
            env=folder.environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            with Client(json.loads(process.stdout.readline())["url"]) as client:
                file = client.upload(Upload.from_path(path))
                batch = client.create_batch(input_file_id=file.id, endpoint=MIXED)
                deadline = time.monotonic() + 300
                while batch.status not in TERMINAL_STATUSES:
                    assert time.monotonic() < deadline, batch
                    time.sleep(0.2)
                    batch = client.get_batch(batch.id)
                assert batch.status == "completed", batch.errors
                assert batch.model is None
                assert batch.models == ("simulated", "encoder", "caller", "second", "sees")
                assert batch.output_file_id is not None
                content = b"".join(client.download(batch.output_file_id))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    check_all([json.loads(one) for one in content.splitlines()])


def test_what_a_mixed_file_may_not_hold_is_said_at_its_line(folder: Folder) -> None:
    content = make_all() + line("wrong", EMBEDDINGS, "simulated", input="x")
    ended = folder.run(folder.write("in.jsonl", content), "--endpoint", MIXED)
    ended.assert_problem(9 * NUM_ROUNDS + 1, "unsupported_endpoint")


def test_a_file_of_several_kinds_says_how_it_runs(folder: Folder) -> None:
    ended = folder.run(folder.write("in.jsonl", make_all()))
    ended.assert_problem(2, "invalid_url")
    assert 'use the endpoint "mixed"' in ended.stderr


@pytest.mark.slow
def test_a_run_loads_each_model_once_however_long_it_takes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet's worker would change its model whenever another one has waited for a moment."""
    settings = {"WORKER__MODEL_STAY_SECONDS": "0.001", "SHARDS__MAX_LINES": "2"}
    for name, value in (folder.environment() | settings).items():
        if name.startswith("BATCHCTL_") or name in settings:
            monkeypatch.setenv(f"BATCHCTL_{name.removeprefix('BATCHCTL_')}", value)
    names = ("simulated", "second")
    content = b"".join(
        line(f"r{n}", COMPLETIONS, names[n % 2], prompt=f"[[tokens=40]] {n}") for n in range(12)
    )
    before = [_num_starts(name) for name in names]
    output = folder / "out.jsonl"
    path = folder.path / folder.write("in.jsonl", content)
    ended = CliRunner().invoke(app, ["run", str(path), "--output", str(output)])
    assert ended.exit_code == 0, ended.output
    assert folder.ids() == [f"r{n}" for n in range(12)]
    assert [_num_starts(name) - one for name, one in zip(names, before, strict=True)] == [1, 1]


def _num_starts(model: str) -> float:
    name, labels = "batchctl_engine_starts_total", {"model": model}
    return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0
