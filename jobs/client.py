"""Typed HTTP client of the REST API: files, batches, results, models and workers.

Every POST carries an idempotency key, so that a repeated one changes nothing; connection errors,
429 and 5xx are tried again while that may help.
"""

import os
import re
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import msgspec
import stamina
import xxhash

from engine.openai_api import shown_url
from jobs.client_types import Batch, File, Model, Worker
from jobs.domain.errors import BatchctlError, Conflict, InvalidInput, NotFound
from jobs.places import is_special

_CHUNK_BYTES = 256 << 10
# While no answer was ever had, the likely reason is that no server runs: say so soon.
_FIRST_PATIENCE_SECONDS = 1.5
_PATIENCE_SECONDS = 60.0
_MAX_DELAY_SECONDS = 120.0
_READ_SECONDS = 120.0
_STREAM_PAUSE_SECONDS = 0.5
_PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})

_T = TypeVar("_T")


class ServerUnavailable(BatchctlError):
    """The server does not answer, or not as ours does."""

    code: ClassVar[str] = "server_unavailable"
    retryable: ClassVar[bool] = True


class AccessDenied(BatchctlError):
    """The server wants another API key."""

    code: ClassVar[str] = "access_denied"


class _Page(msgspec.Struct, frozen=True):
    data: list[msgspec.Raw] = []
    has_more: bool = False


class _Identified(msgspec.Struct, frozen=True):
    id: str


class _Detail(msgspec.Struct, frozen=True):
    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _Envelope(msgspec.Struct, frozen=True):
    error: _Detail | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What to upload: a name, and a function that gives the bytes from their beginning.

    Attributes:
        num_bytes: None where the size is not known before.
        repeatable: whether `open` may be called again; a pipe can be read only once.
    """

    filename: str
    open: Callable[[], Iterable[bytes]]
    num_bytes: int | None = None
    repeatable: bool = True

    @classmethod
    def from_path(cls, path: Path) -> Self:
        """Return the upload of a local file, read in chunks."""
        return cls(
            filename=path.name,
            open=lambda: _read_chunks(path),
            num_bytes=path.stat().st_size if path.is_file() else None,
            repeatable=path.is_file(),
        )


class _Refused(Exception):
    """An answer with an error status; `delay_seconds` is the wait that the server asks for."""

    def __init__(self, error: BatchctlError, *, passing: bool, delay_seconds: float | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.passing = passing
        self.delay_seconds = delay_seconds


class _Patience:
    """How long a stream may bring nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        self._until = time.monotonic() + self._seconds

    def is_over(self) -> bool:
        return time.monotonic() > self._until


class Client:
    """A connection to a batchctl server; use as a context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        patience_seconds: float = _PATIENCE_SECONDS,
        on_retry: Callable[[str], None] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Prepare to talk to the server at `base_url`, with or without `/v1`.

        Args:
            patience_seconds: how long a server that answered before may be away.
            on_retry: called with the reason before a call is repeated.

        Raises:
            InvalidInput: `base_url` is not a URL.
        """
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._patience_seconds = patience_seconds
        self._on_retry = on_retry
        self._answered = False
        headers = {"Accept": "application/json", "User-Agent": "batchctl"}
        if api_key:
            if not api_key.isascii() or not api_key.isprintable():
                raise InvalidInput(
                    "The API key holds characters that no key has; was it copied whole?",
                    param="api_key",
                )
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            host = urlsplit(self.base_url).hostname
            self._shown_url = shown_url(self.base_url)
            self._http = httpx2.Client(
                base_url=f"{self.base_url}/v1/",
                headers=headers,
                timeout=httpx2.Timeout(_READ_SECONDS, connect=10.0),
                follow_redirects=True,
                transport=transport,
                # A proxy of the environment does not reach this machine's own loopback.
                trust_env=host not in {"localhost", "127.0.0.1", "::1"},
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise InvalidInput(f"{base_url} is not a URL: {error}", param="base_url") from None

    def __enter__(self) -> Self:
        """Keep connections open for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self.close()

    def close(self) -> None:
        """End all connections."""
        self._http.close()

    # --- files ---

    def upload(
        self,
        source: Upload,
        *,
        purpose: str = "batch",
        idempotency_key: str | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> File:
        """Return the file after sending it; it is never whole in memory.

        Args:
            on_progress: called with the number of bytes sent so far.
        """
        boundary = uuid.uuid4().hex
        filename = source.filename.translate({10: "%0A", 13: "%0D", 34: "%22"})
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{filename}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode("utf-8", "replace")
        tail = f"\r\n--{boundary}--\r\n".encode()

        def body() -> Iterator[bytes]:
            yield head
            sent = 0
            for piece in source.open():
                yield piece
                sent += len(piece)
                if on_progress is not None:
                    on_progress(sent)
            yield tail

        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        if source.num_bytes is not None:
            headers["Content-Length"] = str(len(head) + source.num_bytes + len(tail))
        answer = self._call(
            "POST",
            "files",
            body=body,
            headers=headers,
            idempotency_key=idempotency_key,
            repeatable=source.repeatable,
        )
        return self._decode(answer, File)

    def get_file(self, file_id: str) -> File:
        """Return what is known of a file."""
        return self._decode(self._call("GET", f"files/{quote(file_id, safe='')}"), File)

    def list_files(self, *, purpose: str | None = None) -> Iterator[File]:
        """Yield all files, the newest first, page by page."""
        for raw in self._pages("files", {"purpose": purpose, "limit": 1000}):
            yield self._decode(raw, File)

    def delete_file(self, file_id: str) -> None:
        """Delete a file."""
        self._call("DELETE", f"files/{quote(file_id, safe='')}")

    def download(self, file_id: str) -> Iterator[bytes]:
        """Yield the bytes of a file; a lost connection is taken up where it broke.

        Raises:
            ServerUnavailable: no byte came for too long.
        """
        path = f"files/{quote(file_id, safe='')}/content"
        done = 0
        patience = _Patience(self._patience_seconds)
        while True:
            headers = {"Range": f"bytes={done}-"} if done else {}
            try:
                with self._open("GET", path, headers=headers) as response:
                    partial = response.status_code == HTTPStatus.PARTIAL_CONTENT
                    at = done if partial else 0
                    for piece in self._pieces(response):
                        patience.renew()
                        new = piece[max(0, done - at) :]
                        at += len(piece)
                        done = max(done, at)
                        if new:
                            yield new
            except ServerUnavailable as error:
                self._wait_after(error, patience)
            else:
                return

    # --- batches ---

    def create_batch(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        **more: object,
    ) -> Batch:
        """Return a new batch; with an idempotency key that was used before, that batch.

        Args:
            more: further fields of the server's, such as `model` and `priority`.
        """
        return self._decode(
            self._call(
                "POST",
                "batches",
                json={
                    "input_file_id": input_file_id,
                    "endpoint": endpoint,
                    "completion_window": completion_window,
                    "metadata": dict(metadata) if metadata else None,
                    **{name: value for name, value in more.items() if value is not None},
                },
                idempotency_key=idempotency_key,
            ),
            Batch,
        )

    def get_batch(self, batch_id: str) -> Batch:
        """Return a batch as it is now."""
        return self._decode(self._call("GET", f"batches/{quote(batch_id, safe='')}"), Batch)

    def get_json_batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch as it is now, with every field the server gives."""
        raw = self._call("GET", f"batches/{quote(batch_id, safe='')}")
        return self._decode(raw, dict[str, Any])

    def list_batches(self) -> Iterator[Batch]:
        """Yield all batches, the newest first, page by page."""
        for raw in self._pages("batches", {"limit": 100}):
            yield self._decode(raw, Batch)

    def cancel_batch(self, batch_id: str) -> Batch:
        """Return the batch after asking for its end; repeating that changes nothing."""
        return self._decode(self._call("POST", f"batches/{quote(batch_id, safe='')}/cancel"), Batch)

    def results(self, batch_id: str, *, follow: bool = False) -> Iterator[bytes]:
        """Yield the result lines that a batch has, without their newlines, in any order.

        Args:
            follow: go on until the batch has ended; a lost connection is opened again, and no
                line comes twice.
        """
        path = f"batches/{quote(batch_id, safe='')}/results"
        params = {"follow": "true"} if follow else {}
        # Another connection gives the same lines in another order, so known lines are told apart.
        given = array("Q")
        known: set[int] = set()
        patience = _Patience(self._patience_seconds)
        while True:
            try:
                with self._open("GET", path, params=params) as response:
                    for line in _lines(self._pieces(response)):
                        patience.renew()
                        digest = xxhash.xxh3_64_intdigest(line)
                        if digest not in known:
                            given.append(digest)
                            yield line
            except ServerUnavailable as error:
                if not follow:
                    raise
                known.update(given)
                self._wait_after(error, patience)
            else:
                return

    # --- models ---

    def list_models(self) -> list[Model]:
        """Return the models that the server can run, its first choice first."""
        page = self._decode(self._call("GET", "models"), _Page)
        return [self._decode(raw, Model) for raw in page.data]

    # --- workers ---

    def list_workers(self) -> list[Worker]:
        """Return the workers that live or were lost lately, in the order they started."""
        page = self._decode(self._call("GET", "workers"), _Page)
        return [self._decode(raw, Worker) for raw in page.data]

    def list_json_workers(self) -> list[dict[str, Any]]:
        """Return the workers as the server describes them."""
        page = self._decode(self._call("GET", "workers"), _Page)
        return [self._decode(raw, dict[str, Any]) for raw in page.data]

    # --- one call ---

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[msgspec.Raw]:
        after: str | None = None
        while True:
            asked = {name: value for name, value in params.items() if value is not None}
            if after is not None:
                asked["after"] = after
            page = self._decode(self._call("GET", path, params=asked), _Page)
            yield from page.data
            if not page.has_more or not page.data:
                return
            after = self._decode(page.data[-1], _Identified).id

    def _call(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        params: Mapping[str, Any] | None = None,
        body: Callable[[], Iterator[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        repeatable: bool = True,
    ) -> bytes:
        """Return the body of the answer."""
        sent = dict(headers or {})
        if method == "POST":
            sent["Idempotency-Key"] = idempotency_key or uuid.uuid4().hex
        if json is not None:
            sent["Content-Type"] = "application/json"

        def once() -> bytes:
            content = body() if body is not None else None
            response = self._http.request(
                method,
                path,
                params=params,
                headers=sent,
                content=msgspec.json.encode(json) if json is not None else content,
            )
            self._check(response)
            return response.content

        return self._repeat(once, repeatable=repeatable)

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[httpx2.Response]:
        """Yield an answer whose body is still to be read; only the beginning is repeated."""

        def once() -> httpx2.Response:
            request = self._http.build_request(
                method, path, params=params, headers={"Accept": "*/*", **(headers or {})}
            )
            response = self._http.send(request, stream=True)
            try:
                if response.is_error:
                    response.read()
                self._check(response)
            except BaseException:
                response.close()
                raise
            return response

        response = self._repeat(once)
        try:
            yield response
        finally:
            response.close()

    def _wait_after(self, error: ServerUnavailable, patience: "_Patience") -> None:
        """Wait a little after a broken stream, or raise `error` when that took too long."""
        if patience.is_over():
            raise error
        if self._on_retry is not None:
            self._on_retry(error.message)
        time.sleep(_STREAM_PAUSE_SECONDS)

    def _pieces(self, response: httpx2.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_bytes()
        except httpx2.HTTPError as error:
            self._give_up(error)

    def _repeat(self, once: Callable[[], _T], *, repeatable: bool = True) -> _T:
        """Return what `once` returns; repeat it while its failure may pass and patience lasts."""
        started_at = time.monotonic()

        def goes_on(error: Exception) -> bool | float:
            delay = error.delay_seconds or 0.0 if isinstance(error, _Refused) else 0.0
            waited = time.monotonic() - started_at + delay
            if not repeatable or waited > self._patience_with(error):
                return False
            if self._on_retry is not None and self._answered:
                self._on_retry(_reason(error))
            return delay or True

        try:
            for attempt in stamina.retry_context(
                on=goes_on,
                attempts=None,
                timeout=None,
                wait_initial=0.2,
                wait_max=5.0,
                wait_jitter=0.3,
            ):
                with attempt:
                    value = once()
                    self._answered = True
                    return value
        except _Refused as refused:
            self._answered = True
            raise refused.error from None
        except httpx2.HTTPError as error:
            self._give_up(error)
        raise AssertionError  # stamina raises what the last attempt raised

    def _patience_with(self, error: Exception) -> float:
        """Return how long a call that fails like this may be repeated; below 0: not at all."""
        if isinstance(error, _Refused):
            return self._patience_seconds if error.passing else -1.0
        if not isinstance(error, httpx2.TransportError) or isinstance(
            error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError
        ):
            return -1.0
        return self._patience_seconds if self._answered else _FIRST_PATIENCE_SECONDS

    def _give_up(self, error: httpx2.HTTPError) -> NoReturn:
        detail = _reason(error)
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            message = (
                f"The server cannot be reached ({detail}). "
                f"Is `batchctl serve` running at {self._shown_url}?"
            )
        elif isinstance(error, httpx2.TimeoutException):
            message = f"The server at {self._shown_url} did not answer in time."
        else:
            message = f"The connection to {self._shown_url} was lost: {detail}."
        raise ServerUnavailable(message) from error

    def _check(self, response: httpx2.Response) -> None:
        if response.is_success:
            return
        status = response.status_code
        detail = _detail(response)
        error: BatchctlError
        message = detail.message or f"The server answered {status} {response.reason_phrase}."
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            error = AccessDenied(
                f"{message} The key comes from --api-key or BATCHCTL_API_KEY.", param=detail.param
            )
        elif status == HTTPStatus.NOT_FOUND:
            error = NotFound(
                message
                if detail.message
                else f"{self._shown_url} has no such address; is it a batchctl server?",
                param=detail.param,
            )
        elif status == HTTPStatus.CONFLICT:
            error = Conflict(message, param=detail.param)
        elif status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            error = ServerUnavailable(
                f"The server at {self._shown_url} failed ({status}): {message}"
            )
        else:
            error = InvalidInput(
                message,
                param=detail.param,
                error_code=str(detail.code) if detail.code is not None else None,
            )
        raise _Refused(
            error,
            passing=isinstance(error, ServerUnavailable)
            and response.headers.get("x-should-retry") != "false",
            delay_seconds=_delay_seconds(response),
        )

    def _decode(self, raw: bytes | msgspec.Raw, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(raw, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ServerUnavailable(
                f"{self._shown_url} answers, but not as batchctl does ({error}); check the URL."
            ) from None


def _reason(error: Exception) -> str:
    """Return what went wrong, without the number that the operating system gives it."""
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error).strip()) or type(error).__name__


def _detail(response: httpx2.Response) -> _Detail:
    try:
        envelope = msgspec.json.decode(response.content, type=_Envelope)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _Detail()
    error = envelope.error
    return _Detail(message=error) if isinstance(error, str) else error


def _delay_seconds(response: httpx2.Response) -> float | None:
    for name, factor in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers.get(name, "")) * factor
        except ValueError:
            continue
        if 0 < seconds <= _MAX_DELAY_SECONDS:
            return seconds
    return None


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    r"""Yield lines without their "\n", blank ones left out; memory is one line and one piece."""
    held: list[bytes] = []
    for piece in pieces:
        lines = piece.split(b"\n")
        held.append(lines[0])
        if len(lines) == 1:
            continue
        lines[0] = b"".join(held)
        held = [lines.pop()]
        yield from (line for line in lines if line.strip())
    if last := b"".join(held).strip():
        yield last


def write_atomically(path: Path, pieces: Iterable[bytes]) -> int:
    """Write `pieces` to `path` and return their number of bytes; nobody sees half a file.

    A pipe or a device is written to as the bytes come.

    Raises:
        InvalidInput: the place cannot be written.
    """
    in_place = is_special(path)
    scratch = path if in_place else path.with_name(f".{path.name}.{os.getpid()}.part")
    num_bytes = 0
    try:
        try:
            with scratch.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    num_bytes += len(piece)
            if not in_place:
                scratch.replace(path)
        finally:
            if not in_place:
                scratch.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be written: {error.strerror or error}.", param="output"
        ) from None
    return num_bytes
