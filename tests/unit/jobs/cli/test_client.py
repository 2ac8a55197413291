import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from typing_extensions import override

from jobs.client import AccessDenied, Client, ServerUnavailable, Upload, write_atomically
from jobs.domain.errors import BatchctlError, Conflict, InvalidInput, NotFound

Answer = httpx2.Response | Exception
BATCH = {"id": "batch_1", "status": "in_progress", "request_counts": {"total": 2}}


class Server(httpx2.BaseTransport):
    """Answers one request after the other with what it was given, and keeps what it was asked."""

    def __init__(self, *answers: Answer | Callable[[httpx2.Request], Answer]) -> None:
        self._answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.bodies: list[bytes] = []

    @override
    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        self.bodies.append(request.read())
        answer = self._answers.pop(0)
        if callable(answer) and not isinstance(answer, httpx2.Response):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Pieces(httpx2.SyncByteStream):
    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces

    @override
    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


def client_of(server: Server, **options: object) -> Client:
    return Client("http://test/v1", transport=server, **options)  # type: ignore[arg-type]


def problem(status: int, message: str = "no", **headers: str) -> httpx2.Response:
    error = {"message": message, "type": "t", "param": "p", "code": "c"}
    return httpx2.Response(status, json={"error": error}, headers=headers)


def ok(value: object = BATCH) -> httpx2.Response:
    return httpx2.Response(200, json=value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidInput),
        (401, AccessDenied),
        (403, AccessDenied),
        (404, NotFound),
        (409, Conflict),
        (413, InvalidInput),
    ],
)
def test_answer_with_an_error_raises_ours_at_once(status: int, kind: type[BatchctlError]) -> None:
    server = Server(problem(status, "what is wrong"))
    with client_of(server) as client, pytest.raises(kind, match="what is wrong") as caught:
        client.get_batch("batch_1")
    assert caught.value.param == "p"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(200, content=b"<html>"),
        httpx2.Response(200, content=b'{"id": 3}'),
        httpx2.Response(200, content=b"\xff"),
    ],
)
def test_answer_of_another_kind_of_server_says_so(answer: httpx2.Response) -> None:
    with (
        client_of(Server(answer)) as client,
        pytest.raises(ServerUnavailable, match="not as batchctl does"),
    ):
        client.get_batch("batch_1")


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.ReadError("gone"),
        httpx2.RemoteProtocolError("gone"),
        problem(503, **{"retry-after-ms": "1"}),
        problem(429, **{"retry-after": "0.001"}),
        httpx2.Response(500, content=b"not json"),
    ],
)
def test_passing_failure_is_tried_again_with_the_same_key(failure: Answer) -> None:
    server = Server(failure, ok())
    with client_of(server) as client:
        batch = client.create_batch(input_file_id="file-1", endpoint="/v1/completions")
    assert batch.request_counts.total == 2
    keys = [request.headers["idempotency-key"] for request in server.requests]
    assert keys[0] == keys[1]


def test_permanent_server_error_is_not_tried_again() -> None:
    server = Server(problem(500, **{"x-should-retry": "false"}))
    with client_of(server) as client, pytest.raises(ServerUnavailable):
        client.get_batch("batch_1")
    assert len(server.requests) == 1


def test_server_that_never_answered_is_given_up_soon_and_quietly() -> None:
    told: list[str] = []
    server = Server(*[httpx2.ConnectError("[Errno 111] Connection refused")] * 50)
    with (
        client_of(server, on_retry=told.append) as client,
        pytest.raises(ServerUnavailable) as caught,
    ):
        client.get_batch("batch_1")
    assert caught.value.message == (
        "The server cannot be reached (Connection refused). "
        "Is `batchctl serve` running at http://test?"
    )
    assert told == []
    assert 1 < len(server.requests) < 10


def test_server_that_was_there_is_waited_for() -> None:
    told: list[str] = []
    server = Server(ok(), httpx2.ConnectError("refused"), ok())
    with client_of(server, on_retry=told.append) as client:
        client.get_batch("batch_1")
        client.get_batch("batch_1")
    assert told == ["refused"]


def test_patience_ends() -> None:
    server = Server(ok(), *[problem(503)] * 50)
    with client_of(server, patience_seconds=0.3) as client:
        client.get_batch("batch_1")
        with pytest.raises(ServerUnavailable, match="503"):
            client.get_batch("batch_1")


def test_upload_is_a_form_with_its_length_and_is_sent_again_whole(tmp_path: Path) -> None:
    path = tmp_path / 'na"me\n.jsonl'
    path.write_bytes(b"x" * 1_000_000)
    progress: list[int] = []
    server = Server(problem(503), ok({"id": "file-1", "bytes": 1_000_000}))
    with client_of(server) as client:
        file = client.upload(Upload.from_path(path), on_progress=progress.append)
    assert file.bytes == 1_000_000
    first, second = server.bodies
    assert first == second
    assert b'filename="na%22me%0A.jsonl"' in first
    assert b'name="purpose"\r\n\r\nbatch\r\n' in first
    assert int(server.requests[0].headers["content-length"]) == len(first)
    assert progress[-1] == 1_000_000
    assert len(progress) > 4


def test_upload_from_a_pipe_is_tried_once() -> None:
    server = Server(problem(503))
    source = Upload(filename="stdin", open=lambda: [b"a", b"b"], repeatable=False)
    with client_of(server) as client, pytest.raises(ServerUnavailable):
        client.upload(source)
    assert server.requests[0].headers["transfer-encoding"] == "chunked"


def test_listing_goes_from_page_to_page() -> None:
    def page(*ids: str, more: bool) -> httpx2.Response:
        return ok({"data": [{**BATCH, "id": one} for one in ids], "has_more": more})

    server = Server(page("a", "b", more=True), page("c", more=False))
    with client_of(server) as client:
        assert [batch.id for batch in client.list_batches()] == ["a", "b", "c"]
    assert server.requests[1].url.params["after"] == "b"


@pytest.mark.parametrize("understands_ranges", [True, False])
def test_broken_download_goes_on_where_it_broke(understands_ranges: bool) -> None:  # noqa: FBT001
    def rest(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["range"] == "bytes=4-"
        if understands_ranges:
            return httpx2.Response(206, stream=Pieces(b"efg", b"h"))
        return httpx2.Response(200, stream=Pieces(b"abc", b"def", b"gh"))

    broken = httpx2.Response(200, stream=Pieces(b"ab", b"cd", httpx2.ReadError("gone")))
    with client_of(Server(broken, rest)) as client:
        assert b"".join(client.download("file-1")) == b"abcdefgh"


def test_followed_results_come_once_although_the_connection_broke() -> None:
    first = httpx2.Response(200, stream=Pieces(b"1\n2", b"2\n\n3", httpx2.ReadError("gone")))
    second = httpx2.Response(200, stream=Pieces(b"3\n22\n", b"1\n4"))
    with client_of(Server(first, second)) as client:
        assert list(client.results("batch_1", follow=True)) == [b"1", b"22", b"3", b"4"]


def test_results_that_break_are_an_error_when_not_followed() -> None:
    first = httpx2.Response(200, stream=Pieces(b"1\n", httpx2.ReadError("gone")))
    with client_of(Server(first)) as client, pytest.raises(ServerUnavailable, match="lost"):
        list(client.results("batch_1"))


def test_ids_are_escaped_in_addresses() -> None:
    server = Server(problem(404))
    with client_of(server) as client, pytest.raises(NotFound):
        client.get_batch("../files?x=#")
    assert server.requests[0].url.raw_path == b"/v1/batches/..%2Ffiles%3Fx%3D%23"


@pytest.mark.parametrize("key", ["sch\u00fcssel", "a\nb"])
def test_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match="API key"):
        Client("http://test", api_key=key)


def test_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before")

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ServerUnavailable("gone")

    with pytest.raises(ServerUnavailable):
        write_atomically(path, broken())
    assert path.read_bytes() == b"before"
    assert write_atomically(path, [b"af", b"ter"]) == 5
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InvalidInput, match="cannot be written"):
        write_atomically(tmp_path / "no" / "out", [b""])


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        assert write_atomically(pipe, [b"af", b"ter"]) == 5
        assert read.result(timeout=30) == b"after"
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
    assert write_atomically(Path(os.devnull), [b"x"]) == 1
    assert Path(os.devnull).is_char_device()


def test_no_message_shows_the_password_of_an_address() -> None:
    server = Server(problem(500))
    with (
        Client(
            "http://me:secret@test", patience_seconds=0, transport=server, on_retry=lambda _: None
        ) as client,
        pytest.raises(ServerUnavailable) as caught,
    ):
        client.get_batch("b")
    assert "http://test" in caught.value.message
    assert "secret" not in caught.value.message
