import json
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import httpx2
import openai
import pytest

from jobs.client import Client
from jobs.domain.ids import WorkerId
from jobs.domain.request import Capabilities
from storage import models, workers
from storage.models import Model
from storage.workers import Worker
from tests.conftest import PostgresServer
from tests.integration.api.servers import Running, Serve


def beat(running: Running, name: str, *, seconds_ago: float = 0, **changes: Any) -> Worker:  # noqa: ANN401
    at = running.app.db.now() - timedelta(seconds=seconds_ago)
    worker = Worker(
        id=WorkerId(name), boot_id="b", started_at=at, heartbeat_at=at, host="box", **changes
    )
    workers.heartbeat(running.app.db, worker)
    return worker


def test_workers_are_listed_as_their_last_heartbeats_said(
    api: Running, http: httpx2.Client
) -> None:
    assert http.get("/v1/workers").json() == {"object": "list", "data": []}
    beat(
        api,
        "worker_a",
        pid=7,
        gpu="cuda:0 NVIDIA H100 (GPU-1a2b3c4d)",
        models=("demo", "other"),
        model_key="demo",
        state="working",
        num_shards=2,
        tokens_per_second=12.5,
    )
    beat(api, "worker_b", role="control", gpu="cpu", state="idle", draining=True)
    first, second = http.get("/v1/workers").json()["data"]
    age = first.pop("heartbeat_age_seconds")
    assert 0 <= age < 10
    assert first["heartbeat_at"] == first.pop("started_at")
    del first["heartbeat_at"]
    assert first == {
        "id": "worker_a",
        "object": "worker",
        "host": "box",
        "pid": 7,
        "role": "engine",
        "device": "cuda:0 NVIDIA H100 (GPU-1a2b3c4d)",
        "models": ["demo", "other"],
        "model": "demo",
        "state": "working",
        "num_shards": 2,
        "tokens_per_second": 12.5,
        "recent_deaths": 0,
        "reason": None,
    }
    assert (second["role"], second["state"]) == ("control", "draining")


def test_worker_that_rests_says_why(api: Running, http: httpx2.Client) -> None:
    beat(api, "worker_a", state="working", recent_deaths=3)
    beat(api, "worker_a", state="quarantined", recent_deaths=4)
    (shown,) = http.get("/v1/workers").json()["data"]
    assert (shown["state"], shown["recent_deaths"]) == ("quarantined", 4)
    assert "died 4 times" in shown["reason"]
    assert 'batchctl_workers{state="quarantined"} 1.0' in http.get("/metrics").text
    listed = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", "workers"],
        env={**os.environ, "BATCHCTL_BASE_URL": api.url},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "quarantined" in listed.stdout
    assert "worker_a: Its engine died 4 times" in listed.stderr


def test_a_silent_worker_is_lost_and_then_forgotten(api: Running, http: httpx2.Client) -> None:
    for age in (14, 16, 500, 700):
        beat(api, f"worker_{age}", seconds_ago=age, state="working")
    shown = {one["id"]: one["state"] for one in http.get("/v1/workers").json()["data"]}
    assert shown == {"worker_14": "working", "worker_16": "lost", "worker_500": "lost"}


def test_workers_are_shown_to_who_has_the_key(serve_api: Serve) -> None:
    with serve_api(api_key="sesame") as running, running.http() as http:
        assert http.get("/v1/workers").status_code == 401
        with Client(running.url, api_key="sesame") as client:
            assert client.list_workers() == []


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_lists_workers(api: Running, *, as_json: bool) -> None:
    beat(api, "worker_a", gpu="cpu", models=("demo", "other"), tokens_per_second=99.6)
    shown = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", "workers", *(["--json"] if as_json else [])],
        env={**os.environ, "BATCHCTL_BASE_URL": api.url},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if as_json:
        [one] = json.loads(shown)
        assert (one["id"], one["models"], one["host"]) == (
            "worker_a",
            ["demo", "other"],
            "box",
        )
        return
    header, row = (line.split("\t") for line in shown.splitlines())
    found = dict(zip(header, row, strict=True))
    assert found["HOST"] == "box"
    assert found["MODEL"] == "demo, other"
    assert found["TOKENS/S"] == "100"
    assert found["STATE"] == "starting"


def test_models_that_workers_published_are_listed_behind_those_of_the_catalogue(
    serve_api: Serve, postgres_server: PostgresServer
) -> None:
    url = postgres_server.create_database()
    try:
        here = {"engine": "auto", "database": {"url": url}}  # simulated would know any model
        with serve_api(**here) as running, running.client() as client:
            for name in ("afar", "demo"):
                models.upsert(
                    running.app.db,
                    Model(
                        name=name,
                        fingerprint="f",
                        capabilities={"model": name, "engine": "hf"},
                        published_at=running.app.db.now(),
                    ),
                )
            assert [model.id for model in client.models.list()] == ["demo", "simulated", "afar"]
            assert client.models.retrieve("afar").id == "afar"
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("nowhere")
            given = client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
            batch = client.batches.create(
                input_file_id=given.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_body={"model": "afar"},
            )
            assert batch.model == "afar"
            with pytest.raises(openai.NotFoundError):
                client.batches.create(
                    input_file_id=given.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    extra_body={"model": "nowhere"},
                )
            assert running.app.describe("afar") == Capabilities(model="afar", engine="hf")
    finally:
        postgres_server.drop_database(url)
