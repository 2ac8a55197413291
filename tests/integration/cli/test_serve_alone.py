"""`batchctl serve` without workers, and what its logs and metrics may never hold."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from jobs.cli import exits
from jobs.client import Client, Upload
from tests.conftest import PostgresServer, s3_settings
from tests.integration.api.servers import wait_for

MAIN = (sys.executable, "-m", "jobs.cli.main")
CHAT = "/v1/chat/completions"


def environment(folder: Path, **more: str) -> dict[str, str]:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("BATCHCTL_")}
    return {
        **clean,
        "BATCHCTL_DATA": str(folder / "data"),
        "BATCHCTL_LEASES__TIMING_PROFILE": "fast",
        **more,
    }


def serve(*args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAIN, "serve", "--port", "0", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def serving(*args: str, env: dict[str, str], log: Path) -> Iterator[str]:
    """Yield the URL of a server, ended with SIGTERM."""
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [*MAIN, "serve", "--port", "0", "--json", *args],
            env=env,
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready, log.read_text()
            yield json.loads(ready)["url"]
        finally:
            process.terminate()
            try:
                assert process.wait(30) == 0, log.read_text()
            finally:
                process.kill()


def test_an_api_without_workers_needs_a_database_that_others_reach(tmp_path: Path) -> None:
    ended = serve("--no-workers", env=environment(tmp_path))
    assert ended.returncode != 0
    assert ended.stderr.count("\n") == 1
    assert "Postgres" in ended.stderr
    assert "--no-workers" in ended.stderr


def test_tables_that_are_not_there_are_one_line_and_made_when_asked(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    url = postgres_server.create_database(migrated=False)
    env = environment(tmp_path, BATCHCTL_DATABASE__URL=url)
    try:
        ended = serve("--no-workers", env=env)
        assert ended.returncode == exits.UNREACHABLE
        assert ended.stderr.count("\n") == 1
        assert "batchctl db upgrade" in ended.stderr
        with serving("--no-workers", "--upgrade", env=env, log=tmp_path / "log") as api:
            assert httpx2.get(f"{api}/ready").json()["status"] == "ready"
    finally:
        postgres_server.drop_database(url)


def test_several_apis_share_their_batches_and_start_no_engine(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    url = postgres_server.create_database()
    env = environment(
        tmp_path, BATCHCTL_DATABASE__URL=url, BATCHCTL_BLOBS__FOLDER=str(tmp_path / "blobs")
    )
    path = tmp_path / "in.jsonl"
    path.write_text(request_line("r0", "hello") + "\n")
    try:
        with (
            serving("--no-workers", env=env, log=tmp_path / "log-1") as first,
            serving("--no-workers", env=env, log=tmp_path / "log-2") as second,
        ):
            with Client(first) as client:
                file = client.upload(Upload.from_path(path))
                batch = client.create_batch(input_file_id=file.id, endpoint=CHAT)
            with Client(second) as client:
                assert client.get_batch(batch.id).status == "validating"
                assert b"".join(client.download(file.id)) == path.read_bytes()
            assert [child.cmdline() for one in servers() for child in one.children()] == []
    finally:
        postgres_server.drop_database(url)


def servers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "serve" in one.cmdline()]


def request_line(custom_id: str, text: str, **body: object) -> str:
    return json.dumps(
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": CHAT,
            "body": {
                "model": "simulated",
                "messages": [{"role": "user", "content": text}],
                **body,
            },
        }
    )


@pytest.mark.slow
def test_prompts_and_answers_are_in_no_log_and_no_metric(
    tmp_path: Path, postgres_server: PostgresServer, rclone_url: str
) -> None:
    """At level debug, over Postgres and S3, with answers that fail and an engine that dies."""
    prompt, answer = "CANARY-prompt-7d1f", "CANARY-answer-92ab"
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": prompt, "schema": schema}}
    faults = ("invalid", "error", "nan", "crash")
    lines = [
        *(request_line(f"ok-{n}", f"{prompt} [[reply={answer}]]") for n in range(20)),
        *(request_line(f, f"{prompt} [[fault={f}]]", response_format=form) for f in faults),
        request_line("long", prompt * 20000),
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    database = postgres_server.create_database()
    blobs = s3_settings(rclone_url)
    assert blobs.access_key is not None
    assert blobs.secret_key is not None
    env = environment(
        tmp_path,
        BATCHCTL_DATABASE__URL=database,
        BATCHCTL_BLOBS__KIND="s3",
        BATCHCTL_BLOBS__BUCKET=str(blobs.bucket),
        BATCHCTL_BLOBS__ENDPOINT_URL=rclone_url,
        BATCHCTL_BLOBS__ACCESS_KEY=blobs.access_key.get_secret_value(),
        BATCHCTL_BLOBS__SECRET_KEY=blobs.secret_key.get_secret_value(),
        BATCHCTL_LOG__LEVEL="debug",
    )
    log = tmp_path / "log"
    try:
        with serving(env=env, log=log) as url, Client(url) as client:
            file = client.upload(Upload.from_path(path))
            batch_id = client.create_batch(input_file_id=file.id, endpoint=CHAT).id
            wait_for(lambda: client.get_batch(batch_id).is_terminal, seconds=120)
            batch = client.get_batch(batch_id)
            refused = httpx2.post(f"{url}/v1/batches", json={"input_file_id": prompt})
            assert refused.status_code in {400, 404}
            metrics = httpx2.get(f"{url}/metrics").text
            assert batch.request_counts.completed >= 20
            assert batch.request_counts.failed >= 3
            assert batch.output_file_id is not None
            assert answer in b"".join(client.download(batch.output_file_id)).decode()
        logged = log.read_text()
        engine_log = (tmp_path / "data" / "server" / "engine.log").read_text()
    finally:
        postgres_server.drop_database(database)
    assert "engine_died" in logged, "the engine was to die"
    assert 'batchctl_engine_deaths_total{model="simulated"}' in metrics
    assert 'outcome="schema_mismatch"' in metrics
    for text in (logged, metrics, engine_log):
        assert "CANARY" not in text
        assert "test-secret" not in text
