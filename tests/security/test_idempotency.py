"""`Idempotency-Key`: one call, however often it is made and whatever dies in between."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jobs.domain.ids import TenantId
from storage import batches, files
from tests.builders import Bench, make_lines
from tests.conftest import free_port
from tests.integration.api.servers import Running, Serve, lines, wait_for

CHAT = "/v1/chat/completions"
NUM_CALLS = 20


@pytest.fixture(params=["sqlite", "postgres"])
def served(request: pytest.FixtureRequest, serve_api: Serve) -> Iterator[Running]:
    changes: dict[str, Any] = {}
    if request.param == "postgres":
        changes = {"database": {"url": request.getfixturevalue("postgres_url")}}
    with serve_api(**changes) as running:
        yield running


def upload(http: httpx2.Client, content: bytes = b"", **headers: str) -> httpx2.Response:
    return http.post(
        "/v1/files",
        data={"purpose": "batch"},
        files={"file": ("a.jsonl", content or lines(1))},
        headers=headers,
    )


def create(http: httpx2.Client, file_id: str, key: str, **changes: object) -> httpx2.Response:
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **changes}
    return http.post("/v1/batches", json=asked, headers={"Idempotency-Key": key})


def at_once(call: Callable[[int], httpx2.Response]) -> list[httpx2.Response]:
    """Make the call from many threads that all start together."""
    barrier = threading.Barrier(NUM_CALLS)

    def run(number: int) -> httpx2.Response:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(NUM_CALLS) as pool:
        return list(pool.map(run, range(NUM_CALLS)))


def test_twenty_equal_calls_at_once_make_one_batch(served: Running) -> None:
    with served.http(timeout=120) as http:
        file_id = upload(http).json()["id"]
        answers = at_once(lambda _: create(http, file_id, "same", metadata={"a": "b"}))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 1
        fresh = [one for one in answers if "idempotent-replayed" not in one.headers]
        assert len(fresh) == 1
        assert len(http.get("/v1/batches").json()["data"]) == 1


def test_twenty_equal_uploads_at_once_make_one_file(served: Running) -> None:
    with served.http(timeout=120) as http:
        key = {"Idempotency-Key": "same"}
        answers = at_once(lambda _: upload(http, lines(50), **key))
        assert {answer.status_code for answer in answers} == {200}
        (file_id,) = {answer.json()["id"] for answer in answers}
        assert list(served.app.blobs.list_keys("files/")) == [f"files/{file_id}"]
        assert http.get(f"/v1/files/{file_id}/content").content == lines(50)


def test_of_unequal_calls_at_once_one_wins_and_the_others_are_told(served: Running) -> None:
    with served.http(timeout=120) as http:
        file_id = upload(http).json()["id"]
        answers = at_once(lambda number: create(http, file_id, "same", priority=number))
        assert sorted(one.status_code for one in answers) == [200] + [409] * (NUM_CALLS - 1)
        assert len(http.get("/v1/batches").json()["data"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"completion_window": "2h"},
        {"endpoint": "/v1/completions"},
        {"metadata": {"a": "b"}},
        {"priority": 1},
        {"model": "simulated"},
        {"on_unsupported_schema": "refuse"},
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_with_another_body_is_a_conflict_that_no_client_retries(
    http: httpx2.Client, change: dict[str, object]
) -> None:
    file_id = upload(http).json()["id"]
    assert create(http, file_id, "k").status_code == 200
    other = create(http, file_id, "k", **change)
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    again = upload(http).json()["id"]
    assert create(http, again, "k").status_code == 409, "an equal file is another file"
    assert create(http, file_id, "k").headers["idempotent-replayed"] == "true"


def test_an_upload_with_the_key_of_other_bytes_is_a_conflict_also_when_those_are_deleted(
    api: Running, http: httpx2.Client
) -> None:
    key = {"Idempotency-Key": "k"}
    first = upload(http, lines(1), **key).json()["id"]
    assert upload(http, lines(2), **key).status_code == 409
    assert http.delete(f"/v1/files/{first}").status_code == 200
    assert upload(http, lines(2), **key).status_code == 409
    # As it was answered then: whoever retries learns at the next call that the file is gone.
    assert upload(http, lines(1), **key).json()["id"] == first
    assert list(api.app.blobs.list_keys()) == []


@pytest.mark.parametrize(
    "key", ["", "x" * 256, "x" * 8_000, "schlüssel", "a\tb", "\x7f", "\xa0", "日本".encode()]
)
def test_an_overlong_or_odd_key_is_refused_and_makes_nothing(
    http: httpx2.Client, key: str | bytes
) -> None:
    file_id = upload(http).json()["id"]
    raw = key if isinstance(key, bytes) else key.encode("latin-1")
    headers = {b"idempotency-key": raw}
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for answer in (
        http.post("/v1/batches", json=asked, headers=headers),
        http.post("/v1/files", files={"file": ("a", b"x")}, headers=headers),
    ):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "Idempotency-Key"
    assert http.get("/v1/batches").json()["data"] == []
    assert len(http.get("/v1/files").json()["data"]) == 1


@pytest.mark.parametrize("key", ["x", "x" * 255, "a b/c:d;e=f", "'; DROP TABLE batches;--", "%00"])
def test_any_printable_key_is_one(http: httpx2.Client, key: str) -> None:
    file_id = upload(http).json()["id"]
    ids = {create(http, file_id, key).json()["id"] for _ in range(2)}
    assert len(ids) == 1


def test_a_key_is_its_tenants_own(bench: Bench) -> None:
    made = {}
    for tenant in (TenantId("one"), TenantId("two")):
        bench.submit(make_lines(1))
        (recorded,), _ = files.list_page(bench.db, tenant_id=TenantId("default"), limit=1)
        mine = replace(
            recorded,
            id=type(recorded.id)(f"file-{tenant}"),
            tenant_id=tenant,
            blob_key=f"files/file-{tenant}",
            idempotency_key="k",
        )
        assert files.insert(bench.db, mine) == mine
        batch = replace(
            bench.submit(make_lines(1)),
            id=type(bench.submit(make_lines(1)).id)(f"batch_{tenant}"),
            tenant_id=tenant,
            input_file_id=mine.id,
            idempotency_key="k",
        )
        made[tenant] = batches.insert(bench.db, batch).id
    assert len(set(made.values())) == 2


# --- the server dies between the insert and the answer ---


class Dying:
    """`batchctl serve` with a proxy before it that takes requests along and answers to nobody."""

    def __init__(self, data: Path) -> None:
        self.port = free_port()
        self._data = data
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BATCHCTL_")}
        command = [sys.executable, "-m", "jobs.cli.main", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=environment | {"BATCHCTL_DATA": str(self._data), "BATCHCTL_ENGINE": "simulated"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with self.http() as http:
            wait_for(lambda: self._is_up(http), seconds=120)

    def _is_up(self, http: httpx2.Client) -> bool:
        with suppress(httpx2.HTTPError):
            return http.get("/health").status_code == 200
        return False

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def send(self, path: str, body: bytes, kind: str, key: str) -> socket.socket:
        """Send a whole request and return the connection, its answer unread."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
            f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        return connection


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_retry_after_the_server_died_before_its_answer_gets_the_same_batch(
    tmp_path: Path,
) -> None:
    server = Dying(tmp_path / "data")
    try:
        server.start()
        for number in range(3):
            with server.http() as http:
                file_id = upload(http).json()["id"]
                asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
                before = len(http.get("/v1/batches").json()["data"])
                body = json.dumps(asked).encode()
                with server.send("/v1/batches", body, "application/json", f"k{number}"):
                    # Killed once the row is there, whether or not the answer was written by then:
                    # its reader never learns of it. The third time at once, row or no row.
                    if number < 2:
                        wait_for(lambda: len(http.get("/v1/batches").json()["data"]) > before)  # noqa: B023
                    else:
                        time.sleep(0.002)
                    server.kill()
            server.start()
            with server.http() as http:
                ids = {create(http, file_id, f"k{number}").json()["id"] for _ in range(2)}
                assert len(ids) == 1
                assert len(http.get("/v1/batches").json()["data"]) == before + 1
                (batch_id,) = ids
                done = wait_for(
                    lambda: (
                        (batch := http.get(f"/v1/batches/{batch_id}").json())  # noqa: B023
                        and batch["status"] == "completed"
                        and batch
                    )
                )
                assert done["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    finally:
        server.kill()


def test_a_foreign_key_does_not_show_what_it_stands_for(http: httpx2.Client) -> None:
    file_id = upload(http).json()["id"]
    batch_id = create(http, file_id, "k").json()["id"]
    told = create(http, file_id, "k", priority=9).text
    assert batch_id not in told
