"""Result lines while a batch runs, and after."""

import json
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest

from jobs.client import Client
from storage import files
from tests.integration.api.servers import Running, Serve, lines, run_api, wait_for

SLOW = {"engine": "simulated", "options": {"step_seconds": 0.01, "slots": 8}}
TERMINAL = {"completed", "failed", "expired", "cancelled"}


def submit(http: httpx2.Client, content: bytes) -> str:
    file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", content)}).json()
    body = {
        "input_file_id": file["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    return str(http.post("/v1/batches", json=body).json()["id"])


def look(http: httpx2.Client, batch_id: str) -> dict[str, object]:
    found: dict[str, object] = http.get(f"/v1/batches/{batch_id}").json()
    return found


def ids(content: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in content.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("slow")
    with run_api(folder, workers=True, models={"slow": SLOW}) as running:
        yield running


@pytest.fixture
def http(slow: Running) -> Iterator[httpx2.Client]:
    with slow.http() as client:
        yield client


def test_following_gives_every_line_once_while_it_runs(http: httpx2.Client) -> None:
    batch_id = submit(http, lines(200, model="slow"))
    arrived: list[tuple[str, bytes]] = []
    with http.stream("GET", f"/v1/batches/{batch_id}/results?follow=true") as response:
        assert response.headers["content-type"] == "application/jsonl"
        arrived += ((str(look(http, batch_id)["status"]), piece) for piece in response.iter_bytes())
    assert look(http, batch_id)["status"] == "completed"
    assert sorted(ids(b"".join(piece for _, piece in arrived))) == sorted(
        f"line-{number}" for number in range(200)
    )
    assert "in_progress" in [status for status, _ in arrived]


def test_lines_are_those_of_the_files(http: httpx2.Client) -> None:
    batch_id = submit(http, lines(20, model="slow"))
    followed = http.get(f"/v1/batches/{batch_id}/results?follow=true&kind=output").content
    batch = look(http, batch_id)
    output = http.get(f"/v1/files/{batch['output_file_id']}/content").content
    assert sorted(followed.splitlines()) == sorted(output.splitlines())
    assert http.get(f"/v1/batches/{batch_id}/results").content == output
    assert http.get(f"/v1/batches/{batch_id}/results?kind=errors").content == b""


def test_cancelled_batch_gives_the_lines_that_never_ran_too(http: httpx2.Client) -> None:
    batch_id = submit(http, lines(400, model="slow"))
    got: dict[str, bytes] = {}

    def follow(kind: str) -> None:
        path = f"/v1/batches/{batch_id}/results?follow=true&kind={kind}"
        got[kind] = http.get(path).content

    threads = [
        threading.Thread(daemon=True, target=follow, args=(kind,)) for kind in ("all", "errors")
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: look(http, batch_id)["request_counts"]["completed"])  # type: ignore[index]
    time.sleep(0.6)  # one poll: some lines come out of segments
    http.post(f"/v1/batches/{batch_id}/cancel")
    for thread in threads:
        thread.join(60)
    assert look(http, batch_id)["status"] == "cancelled"
    everything = sorted(f"line-{number}" for number in range(400))
    assert sorted(ids(got["all"])) == everything
    output = ids(http.get(f"/v1/batches/{batch_id}/results?kind=output").content)
    assert 0 < len(output) < 400
    assert sorted([*output, *ids(got["errors"])]) == everything
    assert b"batch_cancelled" in got["errors"]


def test_without_following_only_what_is_there_comes(serve_api: Serve) -> None:
    with serve_api() as api, api.http() as http:  # nobody works
        batch_id = submit(http, lines(3))
        assert http.get(f"/v1/batches/{batch_id}/results").content == b""


def test_refused_batch_has_no_lines(http: httpx2.Client) -> None:
    batch_id = submit(http, b"no json")
    wait_for(lambda: look(http, batch_id)["status"] == "failed")
    assert http.get(f"/v1/batches/{batch_id}/results?follow=true").content == b""


def test_our_own_client_follows(slow: Running, http: httpx2.Client) -> None:
    batch_id = submit(http, lines(50, model="slow"))
    with Client(slow.url) as client:
        followed = list(client.results(batch_id, follow=True))
    assert sorted(ids(b"\n".join(followed))) == sorted(f"line-{number}" for number in range(50))


def test_deleted_output_is_said_before_anything_is_sent(slow: Running, http: httpx2.Client) -> None:
    batch_id = submit(http, lines(1, model="slow"))
    wait_for(lambda: look(http, batch_id)["status"] in TERMINAL)
    file_id = look(http, batch_id)["output_file_id"]
    files.mark_deleted(slow.app.db, file_id)  # type: ignore[arg-type]
    assert http.get(f"/v1/batches/{batch_id}/results").status_code == 404


def test_unknown_kind_is_refused(http: httpx2.Client) -> None:
    assert http.get("/v1/batches/batch_x/results?kind=some").status_code == 400


def test_many_who_follow_hold_nobody_up_and_a_stop_cuts_them_off(serve_api: Serve) -> None:
    with serve_api() as api, api.http() as http:
        batch_id = submit(http, lines(3))
        ended: list[str] = []

        def follow() -> None:
            try:
                with api.http() as own:
                    own.get(f"/v1/batches/{batch_id}/results?follow=true")
            except httpx2.RemoteProtocolError:
                ended.append("cut")

        threads = [threading.Thread(daemon=True, target=follow) for _ in range(60)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        began = time.monotonic()
        assert http.get("/v1/batches").status_code == 200
        assert time.monotonic() - began < 1
        began = time.monotonic()
        api.stop()
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - began < 5
        assert ended == ["cut"] * 60
