"""Models that cannot run: one clear line from `batchctl run`, and errors for their batch alone."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.demo import model_path
from tests.builders import make_lines
from tests.integration.api.servers import lines, run_api, wait_for
from tests.integration.runs import Folder

WEIGHTS = "model.safetensors"
SLOW = pytest.mark.slow  # each costs a process, most of them torch
QUICK = ("cut off", "too large")

Damage = Callable[[Path], None]


def change_bytes(change: Callable[[bytes], bytes]) -> Damage:
    def damage(model: Path) -> None:
        path = model / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return damage


def change_config(**changes: object) -> Damage:
    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def lose(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()

    return damage


def lose_shard(model: Path) -> None:
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))


def write_no_json(model: Path) -> None:
    (model / "config.json").write_text("no JSON")


def enlarge(model: Path) -> None:
    """Give it weights of two thousand GB, of which the disk holds nothing."""
    change_config(hidden_size=8192, num_hidden_layers=8192, intermediate_size=16384)(model)
    num_bytes = 65536 * 2**24 * 2
    told = {"dtype": "BF16", "shape": [65536, 2**24], "data_offsets": [0, num_bytes]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": told}).encode()
    with (model / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)


BAD = {
    "cut off": (change_bytes(lambda content: content[:-1000]), 9, ["is damaged", "cut off"]),
    "zeros": (change_bytes(lambda content: bytes(len(content))), 9, ["is damaged"]),
    "empty": (change_bytes(lambda _: b""), 9, ["is damaged", "empty"]),
    "flipped header": (
        change_bytes(lambda content: content[:40] + b"\xff" + content[41:]),
        9,
        ["is damaged", "header"],
    ),
    "missing shard": (lose_shard, 9, ["incomplete", "model-00002-of-00002"]),
    "too large": (enlarge, 9, ["GB", "smaller model"]),
    "config that is no JSON": (write_no_json, 9, ["config.json", "JSON"]),
    "unknown architecture": (change_config(model_type="nobody"), 9, ["'nobody'", "does not know"]),
    "no tokenizer": (lose("tokenizer.json"), 3, ["tokenizer.json"]),
    "no weights": (lose(WEIGHTS), 9, [WEIGHTS]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    shutil.copytree(model_path(), tmp_path / "model")
    (tmp_path / "in.jsonl").write_bytes(make_lines(3))
    return Folder(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="auto"),
        pytest.param(("--engine", "hf", "--quantization", "none"), id="hf", marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in BAD]
)
def test_bad_model_is_one_line_of_a_run(
    folder: Folder, name: str, arguments: tuple[str, ...]
) -> None:
    damage, code, said = BAD[name]
    damage(folder / "model")
    if arguments and name == "config that is no JSON":
        code = 3  # nothing had to be chosen by it, so planning is the first to read it
    ended = folder.run("in.jsonl", "--model", "./model", "--output", "out.jsonl", *arguments)
    ended.assert_refused(code, *said)
    assert not (folder / "out.jsonl").exists()


def test_chat_with_a_model_without_a_template_is_refused_by_line(folder: Folder) -> None:
    lose("chat_template.jinja")(folder / "model")
    ended = folder.run("in.jsonl", "--model", "./model", "--output", "out.jsonl")
    ended.assert_refused(3, "chat template")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut off", "engine_misconfigured"),
        ("too large", "engine_out_of_memory"),
        ("unknown architecture", "engine_misconfigured"),
        ("no tokenizer", "tokenizer.json"),
    ],
)
def test_bad_model_costs_a_server_its_own_batch_only(folder: Folder, name: str, said: str) -> None:
    BAD[name][0](folder / "model")
    models = {"broken": {"source": str(folder / "model"), "engine": "hf"}}
    with run_api(folder / "data", workers=True, models=models, engine="auto") as running:
        client = running.client()
        batches = []
        for model in ("broken", "simulated"):
            file = client.files.create(file=("in.jsonl", lines(3, model=model)), purpose="batch")
            batches.append(
                client.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                ).id
            )
        ended = wait_for(
            lambda: [
                batch
                for batch in map(client.batches.retrieve, batches)
                if batch.status in {"completed", "failed"}
            ][1:],
            seconds=120,
        )
        broken, good = map(client.batches.retrieve, batches)
        assert ended
        assert good.request_counts
        assert broken.request_counts
        assert (good.status, good.request_counts.completed) == ("completed", 3)
        if broken.status == "failed":
            assert broken.errors is not None
            text = json.dumps([one.model_dump() for one in broken.errors.data or ()])
        else:
            assert broken.request_counts.failed == 3
            assert broken.error_file_id is not None
            text = client.files.content(broken.error_file_id).text
        assert said in text
