"""HTTP client of the part of a batchctl server that tasks need, blocking and asynchronous.

Connection errors, 429 and 5xx are tried again while patience lasts. Calls that make something
carry an idempotency key, so that a repeated one changes nothing.
"""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx2

from batchctl_provider.exceptions import RequestRefused, ServerUnavailable

_PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.2, 10.0
_MAX_ASKED_DELAY_SECONDS = 120.0
_CONNECT_SECONDS = 10.0
_REPLAYED = "idempotent-replayed"

Batch = dict[str, Any]
"""A batch as the server describes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a server is, and how to talk to it.

    Attributes:
        url: with or without `/v1`.
        api_key: what the server wants to be told, if it wants anything.
        timeout_seconds: how long one call waits for the server to send something.
        patience_seconds: how long a call is repeated while the server is away.
        ca_file: certificates to trust in place of the usual ones.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 120.0
    patience_seconds: float = 60.0
    ca_file: str | None = None

    @property
    def base_url(self) -> str:
        """The address without `/v1`."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    def http_options(self) -> dict[str, Any]:
        """Return what an HTTP client is made with.

        Raises:
            ValueError: the address is no URL, or the key is none.
        """
        parts = urlsplit(self.base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(
                f"'{self.url}' is not a URL; the connection's host is one, such as "
                "http://batch.example:8000."
            )
        headers = {"Accept": "application/json", "User-Agent": "airflow-provider-batchctl"}
        if self.api_key:
            if not self.api_key.isascii() or not self.api_key.isprintable():
                raise ValueError("The API key holds characters that no key has.")
            headers["Authorization"] = f"Bearer {self.api_key}"
        options: dict[str, Any] = {
            "base_url": f"{self.base_url}/v1/",
            "headers": headers,
            "timeout": httpx2.Timeout(self.timeout_seconds, connect=_CONNECT_SECONDS),
            "follow_redirects": True,
            # A proxy of the environment does not reach this machine's own loopback.
            "trust_env": parts.hostname not in {"localhost", "127.0.0.1", "::1"},
        }
        if self.ca_file:
            options["verify"] = httpx2.create_ssl_context(verify=self.ca_file)
        return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What to upload: a name, a size, and a function that gives the bytes from their beginning."""

    filename: str
    num_bytes: int
    open: Callable[[], Iterable[bytes]]


class _Passing(Exception):
    """An answer that may be another one soon."""

    def __init__(self, message: str, *, delay_seconds: float | None) -> None:
        super().__init__(message)
        self.delay_seconds = delay_seconds


class _Backoff:
    """How long to wait before a failed call is repeated; every success starts it over."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.start_over()

    def start_over(self) -> None:
        self._until = time.monotonic() + self._server.patience_seconds
        self._delay_seconds = _FIRST_DELAY_SECONDS

    def delay_after(self, error: Exception) -> float:
        """Return how many seconds to wait before the next try.

        Raises:
            ServerUnavailable: there is no use in one.
        """
        delay = self._delay_seconds * random.uniform(0.8, 1.2)  # noqa: S311  spreads callers
        self._delay_seconds = min(2 * self._delay_seconds, _MAX_DELAY_SECONDS)
        if isinstance(error, _Passing):
            delay = max(delay, error.delay_seconds or 0.0)
        hopeless = isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError)
        if hopeless or time.monotonic() + delay > self._until:
            raise self.give_up(error) from error
        return delay

    def give_up(self, error: Exception) -> ServerUnavailable:
        reason = str(error).strip() or type(error).__name__
        return ServerUnavailable(f"The server at {self._server.base_url} is away: {reason}.")


_FAULTS = (httpx2.TransportError, _Passing)


class Client:
    """Blocking calls; use as a context manager."""

    def __init__(self, server: Server) -> None:
        """Prepare to talk to `server`.

        Raises:
            ValueError: its address is no URL.
        """
        self.server = server
        self._http = httpx2.Client(**server.http_options())

    def __enter__(self) -> Self:
        """Keep connections open for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self.close()

    def close(self) -> None:
        """End all connections."""
        self._http.close()

    def list_models(self) -> list[str]:
        """Return the names of the models that the server can run."""
        page = self._json("GET", "models")
        return [str(model["id"]) for model in page.get("data", ())]

    def upload(self, upload: Upload, *, idempotency_key: str | None = None) -> str:
        """Return the id of a new file; it is never whole in memory."""
        boundary = uuid.uuid4().hex
        name = upload.filename.translate({10: "%0A", 13: "%0D", 34: "%22"})
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode("utf-8", "replace")
        tail = f"\r\n--{boundary}--\r\n".encode()

        def body() -> Iterator[bytes]:
            yield head
            yield from upload.open()
            yield tail

        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head) + upload.num_bytes + len(tail)),
        }
        file = self._json(
            "POST", "files", idempotency_key=idempotency_key, headers=headers, body=body
        )
        return str(file["id"])

    def create_batch(
        self, fields: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> tuple[Batch, bool]:
        """Return a batch, and whether an earlier call with the idempotency key made it."""
        response = self._answer(
            "POST", "batches", idempotency_key=idempotency_key, json=dict(fields)
        )
        return _decode(response, self.server), response.headers.get(_REPLAYED) == "true"

    def get_batch(self, batch_id: str) -> Batch:
        """Return a batch as it is now."""
        return self._json("GET", _batch_path(batch_id))

    def cancel_batch(self, batch_id: str) -> Batch:
        """Return the batch after asking for its end; repeating that changes nothing."""
        return self._json("POST", f"{_batch_path(batch_id)}/cancel")

    def download(self, file_id: str) -> Iterator[bytes]:
        """Yield the bytes of a file; a lost connection is taken up where it broke.

        Raises:
            ServerUnavailable: no byte came for too long.
        """
        path = f"files/{quote(file_id, safe='')}/content"
        backoff = _Backoff(self.server)
        done = 0
        while True:
            headers = {"Range": f"bytes={done}-"} if done else {}
            try:
                with self._open("GET", path, headers=headers) as response:
                    if response.is_error:
                        response.read()
                    _check(response)
                    partial = response.status_code == HTTPStatus.PARTIAL_CONTENT
                    at = done if partial else 0
                    for piece in response.iter_bytes():
                        backoff.start_over()
                        new = piece[max(0, done - at) :]
                        at += len(piece)
                        done = max(done, at)
                        if new:
                            yield new
            except _FAULTS as error:
                time.sleep(backoff.delay_after(error))
            else:
                return

    @contextmanager
    def _open(self, method: str, path: str, **options: Any) -> Iterator[httpx2.Response]:
        response = self._http.send(self._http.build_request(method, path, **options), stream=True)
        try:
            yield response
        finally:
            response.close()

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        return _decode(self._answer(method, path, **options), self.server)

    def _answer(
        self,
        method: str,
        path: str,
        *,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Iterator[bytes]] | None = None,
        **options: Any,
    ) -> httpx2.Response:
        sent = _headers(method, idempotency_key) | dict(headers or {})
        backoff = _Backoff(self.server)
        while True:
            if body is not None:
                options["content"] = body()
            try:
                response = self._http.request(method, path, headers=sent, **options)
                _check(response)
            except _FAULTS as error:
                time.sleep(backoff.delay_after(error))
            else:
                return response


class AsyncClient:
    """What a trigger needs, for its event loop; use as an asynchronous context manager."""

    def __init__(self, server: Server) -> None:
        """Prepare to talk to `server`.

        Raises:
            ValueError: its address is no URL.
        """
        self.server = server
        self._http = httpx2.AsyncClient(**server.http_options())

    async def __aenter__(self) -> Self:
        """Keep connections open for the block."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        await self._http.aclose()

    async def get_batch(self, batch_id: str) -> Batch:
        """Return a batch as it is now."""
        return await self._json("GET", _batch_path(batch_id))

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Return the batch after asking for its end; repeating that changes nothing."""
        return await self._json("POST", f"{_batch_path(batch_id)}/cancel")

    async def _json(self, method: str, path: str) -> dict[str, Any]:
        headers = _headers(method, None)
        backoff = _Backoff(self.server)
        while True:
            try:
                response = await self._http.request(method, path, headers=headers)
                _check(response)
            except _FAULTS as error:
                await asyncio.sleep(backoff.delay_after(error))
            else:
                return _decode(response, self.server)


def _batch_path(batch_id: str) -> str:
    return f"batches/{quote(batch_id, safe='')}"


def _headers(method: str, idempotency_key: str | None) -> dict[str, str]:
    if method != "POST":
        return {}
    return {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}


def _check(response: httpx2.Response) -> None:
    """Return if the answer, which has been read, is a success.

    Raises:
        _Passing: it may be one soon.
        RequestRefused: it will not.
    """
    if response.is_success:
        return
    status = response.status_code
    error = _error_of(response)
    said = error.get("message")
    message = str(said) if said else f"The server answered {status} {response.reason_phrase}."
    may_pass = status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if may_pass and response.headers.get("x-should-retry") != "false":
        raise _Passing(f"{status}: {message}", delay_seconds=_asked_delay(response))
    code, param = error.get("code"), error.get("param")
    raise RequestRefused(
        message,
        status=status,
        code=None if code is None else str(code),
        param=None if param is None else str(param),
    )


def _error_of(response: httpx2.Response) -> dict[str, Any]:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {"message": error}


def _asked_delay(response: httpx2.Response) -> float | None:
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 < seconds <= _MAX_ASKED_DELAY_SECONDS else None


def _decode(response: httpx2.Response, server: Server) -> dict[str, Any]:
    try:
        content = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise ServerUnavailable(
            f"{server.base_url} answers, but not as a batchctl server does; check the URL."
        )
    return content
