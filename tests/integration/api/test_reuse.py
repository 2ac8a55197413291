"""Answers of earlier batches, over HTTP."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from jobs.domain.request import CHAT
from tests.builders import make_line
from tests.integration.api.servers import Running, Serve, wait_for

TERMINAL = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture
def reusing(serve_api: Serve) -> Iterator[Running]:
    with serve_api(workers=True, reuse={"expire_days": 1}) as running:
        yield running


def lines_of(numbers: range) -> bytes:
    return b"".join(make_line(f"r{n}", f"hello {n}", temperature=0) + b"\n" for n in numbers)


def run(running: Running, numbers: range, **body: object) -> dict[str, Any]:
    with running.client() as client:
        file = client.files.create(file=("in.jsonl", lines_of(numbers)), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_body={"reuse": True, **body},
        )
        wait_for(lambda: client.batches.retrieve(made.id).status in TERMINAL)
        found: dict[str, Any] = client.batches.retrieve(made.id).to_dict()
        assert found["status"] == "completed"
        return found


def test_batches_say_how_many_answers_were_there(reusing: Running, tmp_path: Path) -> None:
    first = run(reusing, range(6))
    assert (first["reuse"], first["num_reused"]) == (True, 0)
    assert first["usage"]["output_tokens"] > 0
    second = run(reusing, range(6))
    assert (second["num_reused"], second["request_counts"]["completed"]) == (6, 6)
    assert second["usage"]["total_tokens"] == 0
    assert run(reusing, range(6), reuse=False)["num_reused"] == 0
    with reusing.http() as http:
        told = http.get(f"/v1/batches/{second['id']}/results").text
        assert told.count(f'"reused_from":"{first["id"]}"') == 6
        metrics = http.get("/metrics").text
        assert 'batchctl_reused_requests_total{model="simulated"}' in metrics
    (tmp_path / "in.jsonl").write_bytes(lines_of(range(3, 9)))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", "submit", "in.jsonl", "--reuse", "--wait"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "BATCHCTL_BASE_URL": reusing.url},  # noqa: PTH109
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fields = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert fields["reused"].strip() == "3 of 6 answers"


def test_to_delete_a_file_of_a_batch_takes_its_answers_at_once(reusing: Running) -> None:
    for name in ("input_file_id", "output_file_id"):
        batch = run(reusing, range(3))
        assert batch["num_reused"] == 0
        assert list(reusing.app.blobs.list_keys("reuse/"))
        with reusing.client() as client:
            client.files.delete(batch[name])
        assert list(reusing.app.blobs.list_keys("reuse/")) == []


def test_a_server_that_keeps_no_answers_says_so(http: httpx2.Client, api: Running) -> None:
    with api.client() as client:
        file = client.files.create(file=("in.jsonl", lines_of(range(1))), purpose="batch")
        body: dict[str, Any] = {
            "input_file_id": file.id,
            "endpoint": CHAT,
            "completion_window": "24h",
        }
        with pytest.raises(openai.BadRequestError, match=r"reuse\.expire_days") as raised:
            client.batches.create(**body, extra_body={"reuse": True})
    assert raised.value.param == "reuse"
    assert http.post("/v1/batches", json={**body, "reuse": "yes"}).status_code == 400
    assert http.post("/v1/batches", json={**body, "reuse": False}).status_code == 200


def test_one_key_with_and_without_reuse_is_two_calls(reusing: Running) -> None:
    with reusing.client() as client, reusing.http() as http:
        file = client.files.create(file=("in.jsonl", lines_of(range(1))), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        key = {"idempotency-key": "k"}
        assert http.post("/v1/batches", json={**body, "reuse": True}, headers=key).is_success
        again = http.post("/v1/batches", json={**body, "reuse": True}, headers=key)
        assert again.headers["idempotent-replayed"] == "true"
        assert http.post("/v1/batches", json=body, headers=key).status_code == 409
