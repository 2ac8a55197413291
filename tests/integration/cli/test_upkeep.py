"""`batchctl audit` and `batchctl collect`, beside a real `batchctl serve` and without one."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import exits
from storage.blobs import open_blobs
from storage.config import BlobSettings
from storage.database import open_database
from tests.builders import Bench, Clock, ScriptedEngine, Worker, make_lines
from tests.integration.cli.test_server import (
    _MAIN,
    Server,
    _environment,
    request_line,
    serving,
    write_input,
)

CHECKS = [
    *("input", "shards", "segments", "files", "complete", "unique", "order", "counts", "leases"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--config", "slow.toml") as (url, _):
        yield Server(url, folder, "")


def call(folder: Path, *args: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*_MAIN, *args],
        capture_output=True,
        check=False,
        text=True,
        cwd=folder,
        timeout=120,
        env=_environment(**variables),
    )


def read_json(done: "subprocess.CompletedProcess[str]", code: int = exits.OK) -> Any:  # noqa: ANN401
    assert done.returncode == code, done
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def run_batch(server: Server, name: str) -> dict[str, Any]:
    write_input(server, name, (request_line(f"r{n}") for n in range(300)))
    made: dict[str, Any] = server.json("submit", name, "--wait")
    assert made["status"] == "completed"
    return made


def blobs_of(server: Server) -> Path:
    return server.folder / "data" / "server" / "blobs"


def test_a_finished_batch_passes_its_audit(server: Server) -> None:
    batch = run_batch(server, "good.jsonl")
    found = read_json(call(server.folder, "audit", batch["id"], "--data", "data", "--json"))
    assert (found["batch"], found["status"], found["lines"]) == (batch["id"], "completed", 300)
    assert found["ok"] is True
    assert [one["name"] for one in found["checks"]] == CHECKS
    for one in found["checks"]:
        assert (one["ok"], one["problems"], one["told"], one["skipped"]) == (True, 0, [], None)
        assert one["checked"] > 0
    done = call(server.folder, "audit", batch["id"], "--data", "data")
    assert done.returncode == exits.OK
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[1:]] == [[name, "ok"] for name in CHECKS]
    assert "is as it should be" in done.stderr


@pytest.mark.slow
def test_a_batch_that_runs_passes_its_audit(server: Server) -> None:
    lines = (request_line(f"s{n}", model="slow", text="hello " * 20) for n in range(3000))
    write_input(server, "slow.jsonl", lines)
    batch_id = server.json("submit", "slow.jsonl")["id"]
    until = time.monotonic() + 60
    while not server.json("status", batch_id)["request_counts"]["completed"]:
        assert time.monotonic() < until
    found = read_json(call(server.folder, "audit", batch_id, "--data", "data", "--json"))
    assert found["ok"] is True, found
    assert server.run("cancel", batch_id).returncode == exits.OK


@pytest.mark.slow
def test_a_damaged_file_fails_the_audit_in_one_line(server: Server) -> None:
    batch = run_batch(server, "bad.jsonl")
    [output] = (blobs_of(server) / "outputs" / batch["id"]).glob("*-output.jsonl")
    content = output.read_bytes()
    output.write_bytes(content[: content.index(b"\n") + 1] + content)
    done = call(server.folder, "audit", batch["id"], "--data", "data")
    assert done.returncode == exits.VIOLATED
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.endswith("fails: files.")
    [row] = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("files")]
    assert row[1:4] == ["failed", "1", "1"]


def test_a_batch_nobody_knows_is_one_line(server: Server) -> None:
    done = call(server.folder, "audit", "batch_none", "--data", "data")
    assert done.returncode == exits.NOT_FOUND
    assert done.stderr == "error: No such Batch object: batch_none\n"


@pytest.mark.parametrize("command", [("audit", "batch_none"), ("collect",)])
def test_where_there_is_no_database_none_is_made(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = call(tmp_path, *command, "--data", "nowhere")
    assert done.returncode == exits.NOT_FOUND
    assert done.stderr.startswith("error: There is no database ")
    assert "nowhere/server/" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("arguments", [(), ("batch_a", "--run", "somewhere")])
def test_audit_wants_either_a_batch_or_a_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert call(tmp_path, "audit", *arguments).returncode == exits.USAGE


@pytest.mark.slow
def test_a_local_run_is_audited_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(make_lines(300))
    made = read_json(
        call(tmp_path, "run", "in.jsonl", "--output", "out.jsonl", "--data", "data", "--json")
    )
    found = read_json(call(tmp_path, "audit", "--run", made["folder"], "--data", "data", "--json"))
    assert (found["ok"], found["batch"], found["lines"]) == (True, made["batch"], 300)
    assert [one["name"] for one in found["checks"] if one["skipped"]] == ["segments"]
    done = call(tmp_path, "audit", "--run", "data")
    assert done.returncode == exits.NOT_FOUND
    assert "There is no run in data" in done.stderr


@pytest.mark.slow
def test_collect_removes_what_is_old_and_needed_by_nobody(server: Server) -> None:
    new, orphan = (blobs_of(server) / "files" / f"file-{name}" for name in ("new", "nobody"))
    new.write_bytes(b"x")
    orphan.write_bytes(b"x" * 1000)
    os.utime(orphan, (0, 0))
    would = read_json(call(server.folder, "collect", "--dry-run", "--data", "data", "--json"))
    assert (would["dry_run"], would["orphans"], would["bytes"]) == (True, 1, 1000)
    assert orphan.exists()
    done = call(server.folder, "collect", "--data", "data")
    assert done.returncode == exits.OK
    assert dict(line.rsplit(None, 1) for line in done.stdout.splitlines())["bytes"] == "1,000"
    assert (new.exists(), orphan.exists()) == (True, False)


@pytest.mark.slow
def test_a_batch_in_postgres_is_audited_and_collected(postgres_url: str, tmp_path: Path) -> None:
    settings = {"BATCHCTL_DATABASE__URL": postgres_url, "BATCHCTL_DATA": str(tmp_path)}
    with (
        open_database(postgres_url) as db,
        open_blobs(BlobSettings(), tmp_path / "server") as blobs,
    ):
        bench = Bench(db=db, blobs=blobs, clock=Clock())
        with bench.stack:
            bench.submit_planned(make_lines(20), shard_lines=5)
            with Worker(bench, ScriptedEngine()) as worker:
                worker.result()
            batch = bench.finalize()
    found = read_json(call(tmp_path, "audit", batch.id, "--json", **settings))
    assert (found["ok"], found["lines"]) == (True, 20)
    settings["BATCHCTL_COLLECT__SEGMENT_SECONDS"] = "0"
    assert read_json(call(tmp_path, "collect", "--json", **settings))["old_segments"] == 4
    found = read_json(call(tmp_path, "audit", batch.id, "--json", **settings))
    assert found["ok"] is True
    assert [one["name"] for one in found["checks"] if one["skipped"]] == ["segments"]
