"""`batchctl run --engine remote` against a real `vllm serve`."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builders import await_true
from tests.integration.runs import REPOSITORY, Folder
from tests.mixed import TOTALS, check_mixed, write_mixed
from tests.remote.conftest import START_SECONDS, VllmServer

NUM_LINES = 500
PEOPLE = REPOSITORY / "examples" / "people.jsonl"


@pytest.fixture
def folder(tmp_path: Path, vllm_server: VllmServer) -> Folder:
    settings = {
        "LLM_BACKEND": "vllm_remote",
        "VLLM_REMOTE_URL": vllm_server.url,
        "VLLM_REMOTE_TIMEOUT": "120",
    }
    return Folder(tmp_path, settings=settings)


def _custom_ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text("utf-8").splitlines()]


def test_mixed_batch_has_only_valid_answers(folder: Folder) -> None:
    write_mixed(folder / "in.jsonl", NUM_LINES)
    ended = folder.run("in.jsonl", "-o", "out.jsonl", "--errors", "err.jsonl", seconds=400)
    assert ended.code == 0, ended.stderr
    totals = check_mixed(folder / "out.jsonl", folder / "err.jsonl", NUM_LINES)
    assert totals == TOTALS
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    kept = {line["response"]["body"].get("batchctl", {}).get("constraint") for line in lines}
    assert kept == {"enforced", None}
    bodies = [line["response"]["body"] for line in lines]
    ran = [body for body in bodies if "same_as" not in body.get("batchctl", {})]
    assert all(body["usage"]["completion_tokens"] > 0 for body in ran)


def test_server_that_is_killed_and_comes_back_costs_no_line(
    folder: Folder, vllm_server: VllmServer
) -> None:
    write_mixed(folder / "in.jsonl", NUM_LINES)
    arguments = folder.command("in.jsonl", "-o", "out.jsonl", "--errors", "err.jsonl")
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            arguments,
            cwd=folder.path,
            env=folder.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as running,
    ):
        try:
            data = folder / "data"
            await_true(lambda: len(list(data.glob("**/segments/**/*-*-*"))) >= 2, 120)
            vllm_server.kill()
            assert running.poll() is None, "it was over too soon"
            vllm_server.start()
            vllm_server.await_ready()
            assert running.wait(START_SECONDS) == 0, (folder / "log").read_text()
        finally:
            running.kill()
            if not vllm_server.answers():
                vllm_server.start()
                vllm_server.await_ready()
    assert sorted(_custom_ids(folder / "out.jsonl")) == sorted(_custom_ids(folder / "in.jsonl"))
    check_mixed(folder / "out.jsonl", folder / "err.jsonl", NUM_LINES)


def test_example_runs_with_nothing_but_a_url(tmp_path: Path, vllm_server: VllmServer) -> None:
    folder = Folder(tmp_path, settings={"REMOTE_OPENAI_URL": f"{vllm_server.url}/v1"})
    shutil.copyfile(PEOPLE, folder / "people.jsonl")
    ended = folder.run("people.jsonl", "--engine", "remote", "-o", "out.jsonl", seconds=120)
    assert ended.code == 0, ended.stderr
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    assert [line["custom_id"] for line in lines] == _custom_ids(PEOPLE)
    for line in lines:
        body = line["response"]["body"]
        assert body["batchctl"]["constraint"] == "validated"
        answer = json.loads(body["choices"][0]["message"]["content"])
        assert set(answer) == {"name", "age", "city", "job"}


def test_name_of_the_servers_model_is_a_setting(tmp_path: Path, vllm_server: VllmServer) -> None:
    settings = {"REMOTE_OPENAI_URL": vllm_server.url, "LLM_BACKEND": "remote_openai"}
    folder = Folder(tmp_path, settings=settings)
    lines = PEOPLE.read_text("utf-8").replace('"model": "demo"', '"model": "our-name"')
    folder.write("in.jsonl", lines.encode())
    ended = folder.run("in.jsonl", "-o", "out.jsonl", seconds=120)
    assert ended.code not in {0, 1}, ended.stderr
    assert "has no model 'our-name'; it has: demo." in ended.stderr
    assert "Traceback" not in ended.stderr
    folder.settings["REMOTE_OPENAI_MODEL"] = "demo"
    ended = folder.run("in.jsonl", "-o", "out.jsonl", seconds=120)
    assert ended.code == 0, ended.stderr
    answered = (folder / "out.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["response"]["body"]["model"] for line in answered} == {"our-name"}
