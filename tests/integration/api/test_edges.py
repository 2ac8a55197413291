"""What a hostile or careless caller sends, without a client in between."""

import json
import shutil
import socket
import time
from collections.abc import Iterator

import httpx2
import pytest

from jobs.domain.errors import DatabaseUnavailable
from tests.integration.api.servers import Running, Serve, lines, wait_for

KEYS = {"message", "type", "param", "code"}
CHAT = "/v1/chat/completions"


def check_error(response: httpx2.Response, status: int, code: str | None = None) -> str:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == KEYS
    if code is not None:
        assert error["code"] == code
    return str(error["message"])


def upload(http: httpx2.Client, content: bytes = b"", name: str | None = "a.jsonl") -> str:
    response = http.post("/v1/files", data={"purpose": "batch"}, files={"file": (name, content)})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


# --- every answer ---


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/nope", 404),
        ("GET", "/v1/files/", 404),
        ("PUT", "/v1/files", 405),
        ("DELETE", "/v1/batches", 405),
        ("GET", "/v1/files/file-none", 404),
        ("GET", "/v1/files/file-none/content", 404),
        ("DELETE", "/v1/files/file-none", 404),
        ("GET", "/v1/files/%00", 404),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd/content", 404),
        ("GET", "/v1/files/'%20OR%201=1", 404),
        ("GET", f"/v1/files/{'x' * 5000}", 404),
        ("GET", "/v1/batches/batch_none", 404),
        ("GET", "/v1/batches/batch_none/results", 404),
        ("POST", "/v1/batches/batch_none/cancel", 404),
        ("GET", "/v1/models/none/at/all", 404),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/files?limit=10001", 400),
        ("GET", "/v1/files?limit=many", 400),
        ("GET", "/v1/files?order=random", 400),
        ("GET", "/v1/files?after=file-none", 404),
        ("GET", "/v1/files?after=%00", 404),
        ("GET", "/v1/batches?limit=101", 400),
        ("GET", "/v1/batches?after=batch_none", 404),
    ],
)
def test_what_is_wrong_is_said_in_the_envelope(
    http: httpx2.Client, method: str, path: str, status: int
) -> None:
    check_error(http.request(method, path), status)


def test_request_ids_are_ours_and_differ(http: httpx2.Client) -> None:
    headers = {"x-request-id": "theirs"}
    ids = [http.get(path, headers=headers).headers["x-request-id"] for path in ("/", "/", "/no")]
    assert len(set(ids)) == 3
    assert all(one.startswith("req_") for one in ids)


@pytest.mark.parametrize(
    "error", [DatabaseUnavailable("postgresql://db.internal"), RuntimeError("a prompt")]
)
def test_failure_of_ours_says_nothing_of_the_inside(serve_api: Serve, error: Exception) -> None:
    def fail() -> None:
        raise error

    with serve_api(on_work=fail) as api, api.http() as http:
        response = create(http)
    message = check_error(response, 503 if isinstance(error, DatabaseUnavailable) else 500)
    assert str(error) not in message
    assert "Traceback" not in response.text


# --- batches ---


def create(http: httpx2.Client, **changes: object) -> httpx2.Response:
    body = {
        "input_file_id": upload(http, lines(1)),
        "endpoint": CHAT,
        "completion_window": "24h",
        **changes,
    }
    return http.post("/v1/batches", json={key: part for key, part in body.items() if part != ...})


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"input_file_id": ...}, "input_file_id", "missing_required_parameter"),
        ({"endpoint": ...}, "endpoint", "missing_required_parameter"),
        ({"endpoint": 7}, "endpoint", "invalid_type"),
        ({"endpoint": "/v1/videos\ud800"}, "endpoint", None),
        ({"endpoint": "/v1/moderations"}, "endpoint", "invalid_value"),
        ({"completion_window": "25 hours"}, "completion_window", "invalid_value"),
        ({"completion_window": 24}, "completion_window", "invalid_type"),
        ({"metadata": []}, "metadata", "invalid_type"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"metadata": {"a": None}}, "metadata.a", "invalid_type"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "invalid_value"),
        ({"metadata": {"a" * 65: "x"}}, f"metadata.{'a' * 65}", "invalid_value"),
        ({"metadata": {"a": "x\0"}}, "metadata", "invalid_value"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, None, "invalid_value"),
        ({"output_expires_after": {"seconds": 3600}}, None, "missing_required_parameter"),
        ({"priority": "high"}, "priority", "invalid_type"),
        ({"priority": 10**30}, "priority", None),
        ({"on_unsupported_schema": "hope"}, "on_unsupported_schema", "invalid_value"),
        ({"prioritee": 1}, "prioritee", "unknown_parameter"),
    ],
)
def test_wrong_parameter_of_a_batch_is_named(
    http: httpx2.Client, changes: dict[str, object], param: str | None, code: str | None
) -> None:
    body = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h", **changes}
    content = json.dumps({key: part for key, part in body.items() if part != ...})
    response = http.post(
        "/v1/batches", content=content, headers={"content-type": "application/json"}
    )
    check_error(response, 400, code)
    if param is not None:
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": None},
        {"metadata": {"k" * 64: "v" * 512}},
        {"metadata": {str(n): "" for n in range(16)}},
        {"completion_window": "90s"},
        {"completion_window": "7d"},
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600}},
        {"output_expires_after": None, "model": None},
        {"endpoint": "/v1/completions"},
        {"priority": -5},
    ],
)
def test_right_parameters_make_a_batch(http: httpx2.Client, changes: dict[str, object]) -> None:
    response = create(http, **changes)
    assert response.status_code == 200, response.text
    for name, value in changes.items():
        if value is not None and name in response.json():
            assert response.json()[name] == value


def test_window_sets_the_deadline(http: httpx2.Client) -> None:
    batch = create(http, completion_window="2h").json()
    assert batch["expires_at"] - batch["created_at"] == 7200


def test_unknown_model_is_said_at_once(serve_api: Serve) -> None:
    with serve_api(engine="auto") as api, api.http() as http:
        response = create(http, model="none")
    check_error(response, 404, "model_not_found")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'{"endpoint": ', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 200_000, "application/json"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "application/json"),
        (b"{}", "text/plain"),
        (b"a=b", "application/x-www-form-urlencoded"),
    ],
)
def test_body_that_is_no_json_object_is_a_400(
    http: httpx2.Client, content: bytes, kind: str
) -> None:
    response = http.post("/v1/batches", content=content, headers={"content-type": kind})
    check_error(response, 400)


def test_large_body_is_refused_with_and_without_a_length(http: httpx2.Client) -> None:
    large = b'{"x": "' + b"x" * (2 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    for content in (large, iter([large[: 1 << 19]] * 4)):
        response = http.post("/v1/batches", content=content, headers=headers)
        check_error(response, 413, "request_too_large")


def test_cancel_takes_an_empty_body_that_says_it_is_json(http: httpx2.Client) -> None:
    batch = create(http).json()
    headers = {"content-type": "application/json", "content-length": "0"}
    response = http.post(f"/v1/batches/{batch['id']}/cancel", headers=headers)
    assert response.json()["status"] == "cancelling"


# --- uploads ---


@pytest.mark.parametrize("name", ["../../../tmp/x", "a\0b", "日" * 4000, "CON", "..", "\\\\x\\y"])
def test_any_name_is_only_a_name(api: Running, name: str) -> None:
    with api.http() as http:
        file_id = upload(http, b"content", name)
        described = http.get(f"/v1/files/{file_id}").json()
        content = http.get(f"/v1/files/{file_id}/content")
    assert "/" not in described["filename"]
    assert len(described["filename"].encode()) <= 255
    assert content.content == b"content"
    assert content.headers["content-disposition"].startswith("attachment; filename=")
    assert content.headers["content-type"] == "application/jsonl"
    assert list(api.app.blobs.list_keys()) == [f"files/{file_id}"]


def no_leftovers(api: Running) -> bool:
    return not [path for path in (api.app.folder / "blobs").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "multipart/form-data; boundary=x", 400),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400),
        (b"--y\r\n", "multipart/form-data; boundary=x", 400),
        (b"{}", "application/json", 400),
        (b"x", "multipart/form-data", 400),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"z" * 3_000_000,
            "multipart/form-data; boundary=x",
            400,
        ),
    ],
)
def test_broken_form_is_a_400_and_leaves_nothing(
    api: Running, content: bytes, kind: str, status: int
) -> None:
    with api.http() as http:
        response = http.post("/v1/files", content=content, headers={"content-type": kind})
        check_error(response, status)
        assert http.get("/v1/files").json()["data"] == []
    assert no_leftovers(api)


def test_file_over_the_limit_is_a_413_and_leaves_nothing(serve_api: Serve) -> None:
    with serve_api(limits={"max_file_bytes": 1000}) as api, api.http() as http:
        assert http.get(f"/v1/files/{upload(http, b'x' * 1000)}").json()["bytes"] == 1000
        for size in (1001, 500_000, 5_000_000):
            response = http.post(
                "/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"x" * size)}
            )
            check_error(response, 413, "file_too_large")
        assert len(http.get("/v1/files").json()["data"]) == 1


@pytest.fixture
def half_upload(api: Running) -> Iterator[socket.socket]:
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(head + b"x" * 3_000_000)
        wait_for(lambda: not no_leftovers(api))
        yield connection


def test_upload_that_breaks_off_leaves_nothing(api: Running, half_upload: socket.socket) -> None:
    half_upload.close()
    wait_for(lambda: no_leftovers(api))
    with api.http() as http:
        assert http.get("/v1/files").json()["data"] == []


def test_others_are_served_while_an_upload_hangs(api: Running, half_upload: socket.socket) -> None:
    with api.http() as http:
        began = time.monotonic()
        assert http.get("/v1/files").status_code == 200
        assert time.monotonic() - began < 1
    assert half_upload.fileno() > 0


def test_upload_that_stalls_is_ended(serve_api: Serve) -> None:
    def form() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nsome'
        time.sleep(1)
        yield b"thing"

    with serve_api(stall_seconds=0.3) as api, api.http() as http:
        kind = {"content-type": "multipart/form-data; boundary=x"}
        check_error(http.post("/v1/files", content=form(), headers=kind), 408, "request_timeout")
        assert no_leftovers(api)


def test_too_many_uploads_at_once_are_asked_to_wait(api: Running) -> None:
    slots = api.context.uploads
    while slots.acquire(blocking=False):
        pass
    with api.http() as http:
        response = http.post("/v1/files", files={"file": ("a", b"x")})
        check_error(response, 429, "too_many_uploads")
        assert response.headers["retry-after"] == "1"
        slots.release()
        assert upload(http)
        assert upload(http)


def test_expiry_is_kept(http: httpx2.Client) -> None:
    form = {
        "purpose": "user_data",
        "expires_after[anchor]": "created_at",
        "expires_after[seconds]": "7200",
    }
    file = http.post("/v1/files", data=form, files={"file": ("a", b"x")}).json()
    assert file["expires_at"] - file["created_at"] == 7200


# --- downloads ---


def test_ranges_are_served(http: httpx2.Client) -> None:
    file_id = upload(http, bytes(range(100)))
    path = f"/v1/files/{file_id}/content"
    whole = http.get(path)
    assert whole.headers["accept-ranges"] == "bytes"
    part = http.get(path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert part.headers["content-range"] == "bytes 10-19/100"
    for tag, status in ((whole.headers["etag"], 206), ('"other"', 200)):
        headers = {"Range": "bytes=50-", "If-Range": tag}
        assert http.get(path, headers=headers).status_code == status
    check_error(http.get(path, headers={"Range": "bytes=100-"}), 416)
    assert http.get(f"/v1/files/{upload(http, b'')}/content").content == b""


# --- keys and origins ---


def test_with_a_key_only_health_is_open(serve_api: Serve) -> None:
    with serve_api(api_key="sk-1") as api, api.http() as http:
        for path in ("/health", "/ready", "/", "/openapi.json"):
            assert http.get(path).status_code == 200
        for path in ("/v1/files", "/v1/nope", "/v1/files/x/content", "/v1/batches", "/v1/models/x"):
            check_error(http.get(path), 401, "invalid_api_key")
        for header in ("sk-1", "Basic sk-1", "Bearer", "Bearer sk-1x", "Bearer s\xe9"):
            response = http.get("/v1/files", headers={b"authorization": header.encode("latin-1")})
            check_error(response, 401, "invalid_api_key")
        assert http.get("/v1/files", headers={"authorization": "bearer sk-1"}).status_code == 200


def test_without_a_key_a_rebound_name_and_a_foreign_page_are_refused(http: httpx2.Client) -> None:
    check_error(http.get("/v1/files", headers={"host": "evil.example:80"}), 403)
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "10.0.0.7"):
        assert http.get("/v1/files", headers={"host": host}).status_code == 200
    page = {"sec-fetch-site": "cross-site"}
    check_error(http.post("/v1/files", headers=page), 403)
    assert http.get("/v1/files", headers=page).status_code == 200


# --- health ---


def test_ready_says_what_does_not_answer(api: Running) -> None:
    with api.http() as http:
        assert http.get("/ready").json() == {"status": "ready", "database": "ok", "blobs": "ok"}
        assert no_leftovers(api)
        shutil.rmtree(api.app.folder / "blobs")
        response = http.get("/ready")
        assert http.get("/health").status_code == 200
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"
    assert response.json()["blobs"] == "blob_missing"


def test_openapi_names_every_operation_and_no_422(http: httpx2.Client) -> None:
    document = http.get("/openapi.json").json()
    operations = [one for path in document["paths"].values() for one in path.values()]
    ids = [one["operationId"] for one in operations]
    assert len(ids) == len(set(ids))
    assert {"createFile", "createBatch", "streamResults", "downloadFile"} <= set(ids)
    assert all("422" not in one["responses"] for one in operations)
    assert all(one["summary"] and one["description"] for one in operations)
    assert "HTTPValidationError" not in document["components"]["schemas"]
