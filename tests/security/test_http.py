"""The API as callers attack it: rows 4, 9, 33, 34, 37 and 40 of the security table."""

import hmac
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

import jobs.api.edge
from jobs.api.uploads import clean_filename
from tests.integration.api.servers import Running, Serve, lines, wait_for

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def upload(http: httpx2.Client, content: bytes = b"x", name: str = "a.jsonl") -> str:
    response = http.post("/v1/files", data={"purpose": "batch"}, files={"file": (name, content)})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(60)
    found = b""
    while piece := connection.recv(65_536):
        found += piece
    return found


# --- row 4: keys ---


def test_row_4_every_key_costs_a_digest_and_a_comparison_that_does_not_stop_early() -> None:
    source = Path(jobs.api.edge.__file__).read_text(encoding="utf-8")
    assert "hmac.compare_digest(given, expected)" in source
    assert hmac.compare_digest(jobs.api.edge._digest(b"a"), jobs.api.edge._digest(b"a"))  # noqa: SLF001
    lengths = {len(jobs.api.edge._digest(key)) for key in (b"", b"a", b"x" * 10_000)}  # noqa: SLF001
    assert lengths == {32}, "the length of a key does not show either"


# --- row 33: bodies ---


def test_row_33_nobody_without_the_key_sends_a_body(serve_api: Serve) -> None:
    with serve_api(api_key="sk-right") as api:
        for path in ("/v1/files", "/v1/batches"):
            head = (
                f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-wrong\r\n"
                "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", api.port)) as connection:
                connection.sendall(head.encode())  # and none of the body
                connection.settimeout(60)
                assert connection.recv(65_536).startswith(b"HTTP/1.1 401")
        assert list(api.app.blobs.list_keys()) == []


def test_row_33_an_upload_that_only_drips_is_ended_like_one_that_stalls(serve_api: Serve) -> None:
    def drops() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        for _ in range(40):
            time.sleep(0.05)
            yield b"x"

    with serve_api(stall_seconds=0.5) as api, api.http() as http:
        kind = {"content-type": "multipart/form-data; boundary=x"}
        response = http.post("/v1/files", content=drops(), headers=kind)
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "request_timeout"
        assert list(api.app.blobs.list_keys()) == []


def test_row_33_a_small_body_that_only_drips_is_ended_too(serve_api: Serve) -> None:
    def drops() -> Iterator[bytes]:
        for _ in range(40):
            yield b" "
            time.sleep(0.05)

    with serve_api(stall_seconds=0.5) as api, api.http() as http:
        response = http.post("/v1/batches", content=drops(), headers=JSON)
        assert response.status_code == 408


@pytest.mark.parametrize("said", [b"", b"GET /v1/files HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_row_33_a_connection_without_a_whole_request_is_closed(
    serve_api: Serve, said: bytes
) -> None:
    with (
        serve_api(header_seconds=0.5) as api,
        socket.create_connection(("127.0.0.1", api.port)) as connection,
    ):
        connection.sendall(said)
        assert read_all(connection) == b""


def test_row_33_a_connection_that_is_kept_is_closed_in_the_middle_of_its_second_request(
    serve_api: Serve,
) -> None:
    with (
        serve_api(header_seconds=1) as api,
        socket.create_connection(("127.0.0.1", api.port)) as connection,
    ):
        connection.settimeout(60)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HT")
        assert read_all(connection).count(b"HTTP/1.1") == 0


def test_row_33_a_long_answer_is_not_taken_for_a_late_request(serve_api: Serve) -> None:
    slow = {"engine": "simulated", "options": {"step_seconds": 0.1}}
    limits = {"header_seconds": 0.2, "stall_seconds": 0.2}
    with serve_api(workers=True, models={"slow": slow}, **limits) as api, api.http() as http:
        file_id = upload(http, lines(1, model="slow"))
        asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        batch_id = http.post("/v1/batches", json=asked).json()["id"]
        began = time.monotonic()
        with http.stream("GET", f"/v1/batches/{batch_id}/results?follow=true") as answer:
            found = [json.loads(line)["custom_id"] for line in answer.iter_lines() if line]
        assert found == ["line-0"]
        assert time.monotonic() - began > 0.4, "longer than anything else may take"


def test_row_33_hundreds_of_hanging_connections_keep_nobody_out(api: Running) -> None:
    hanging = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(300)]
    try:
        for connection in hanging:
            connection.sendall(b"POST /v1/batches HTTP/1.1\r\n")
        with api.http() as http:
            assert http.get("/v1/files").status_code == 200
    finally:
        for connection in hanging:
            connection.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "br"])
def test_row_10_no_body_is_decompressed(http: httpx2.Client, encoding: str) -> None:
    response = http.post(
        "/v1/batches", content=b"\x1f\x8b" * 100, headers=JSON | {"content-encoding": encoding}
    )
    assert response.status_code == 400
    content = b"\x1f\x8b" + b"\0" * 100
    file_id = upload(http, content, "bomb.jsonl.gz")
    assert http.get(f"/v1/files/{file_id}").json()["bytes"] == len(content)
    assert http.get(f"/v1/files/{file_id}/content").content == content


# --- rows 9 and 34: names and downloads ---

NAMES = [
    "../../../../etc/passwd",
    "..\\..\\windows\\system32",
    "/etc/shadow",
    "a\0b.jsonl",
    "日" * 1365,
    "CON",
    "NUL.txt",
    "...",
    'x"; filename="y.html',
    "a\r\nSet-Cookie: x=1",
    "<script>alert(1)</script>.html",
    "\x1b]0;owned\x07.jsonl",
    "\u202egpj.exe",
    "%2e%2e%2f",
    "-rf",
    "~root",
    "$(reboot)",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_row_9_a_name_is_kept_as_a_name_and_sent_so_that_no_browser_shows_it(
    api: Running, name: str
) -> None:
    kept = clean_filename(name)
    assert not re.search(r"[/\\\x00-\x1f\x7f\u202e]", kept)
    assert kept not in {"", ".", ".."}
    assert len(kept.encode()) <= 255
    with api.http() as http:
        file_id = upload(http, b"<script>", name)
        content = http.get(f"/v1/files/{file_id}/content")
    sent = content.headers["content-disposition"]
    assert re.fullmatch(
        r"attachment; filename=\"[A-Za-z0-9 ._()+=@-]*\"; filename\*=UTF-8''[A-Za-z0-9._~%-]*", sent
    )
    assert content.headers["x-content-type-options"] == "nosniff"
    assert content.headers["content-type"] in {"application/jsonl", "application/octet-stream"}
    assert "set-cookie" not in content.headers
    assert list(api.app.blobs.list_keys()) == [f"files/{file_id}"]


def test_row_34_no_answer_is_of_a_type_that_a_browser_runs(http: httpx2.Client) -> None:
    file_id = upload(http, b"<html><script>alert(1)</script>", "page.html")
    for path in (
        *("/v1/files", f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"),
        *("/v1/batches", "/v1/models", "/v1/workers", "/metrics", "/health", "/nope", "/"),
    ):
        answer = http.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not answer.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=" + "9" * 5_000 + "-",
        "bytes=0-" + "9" * 5_000,
        "bytes=-" + "9" * 5_000,
        "bytes=" + "0-1," * 2_000 + "0-1",
        "bytes=" + "-" * 3_000,
        "bytes=²-³",
        "lines=1-2",
        "bytes=5-2",
    ],
    ids=lambda asked: asked[:16],
)
def test_row_33_an_odd_range_is_ignored(http: httpx2.Client, asked: str) -> None:
    file_id = upload(http, b"0123456789")
    answer = http.get(f"/v1/files/{file_id}/content", headers={b"range": asked.encode("latin-1")})
    assert (answer.status_code, answer.content) == (200, b"0123456789")


# --- rows 37 and 40: what is asked for in words ---

INJECTIONS = ["' OR '1'='1", "1; DROP TABLE files;--", "%27%20UNION", "\x00", "{$ne: 1}", "\\", "%"]


@pytest.mark.parametrize("text", INJECTIONS)
def test_row_37_what_is_asked_for_is_a_value_and_never_a_piece_of_sql(
    http: httpx2.Client, text: str
) -> None:
    upload(http)
    for path, parameters in (
        ("/v1/files", {"purpose": text}),
        ("/v1/files", {"after": text}),
        ("/v1/files", {"order": text}),
        ("/v1/batches", {"after": text}),
        ("/v1/batches", {"limit": text}),
    ):
        answer = http.get(path, params=parameters)
        assert answer.status_code in {200, 400, 404}, answer.text
        assert answer.status_code != 200 or answer.json()["data"] == []
    assert len(http.get("/v1/files").json()["data"]) == 1


def test_row_40_metadata_is_bounded_and_harmless(http: httpx2.Client) -> None:
    file_id = upload(http, lines(1))
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for metadata, status in (
        ({f"k{n}": "v" for n in range(16)}, 200),
        ({f"k{n}": "v" for n in range(17)}, 400),
        ({"k" * 65: "v"}, 400),
        ({"k": "v" * 513}, 400),
        ({"k\0": "v"}, 400),
        ({"k": "\ud800"}, 400),
        ({"'; DROP TABLE batches;--": "\u202e\x1b[2J"}, 200),
        ({"k": {"nested": "x"}}, 400),
    ):
        content = json.dumps(asked | {"metadata": metadata})
        answer = http.post("/v1/batches", content=content, headers=JSON)
        assert answer.status_code == status, (metadata, answer.text)
    assert wait_for(lambda: len(http.get("/v1/batches").json()["data"]) == 2)
