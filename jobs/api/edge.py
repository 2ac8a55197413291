"""What every request passes: an id, the key, the size of its body, and errors of any kind."""

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from ipaddress import ip_address

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.api.problems import Problem, ServerStopping, log_failure, render_problem, to_problem
from jobs.domain.ids import mint

MAX_BODY_BYTES = 1 << 20
"""Of every body but that of an upload."""
UPLOAD_PATH = "/v1/files"
_GUARDED = ("/v1/", "/metrics")


class Edge:
    """The outermost middleware.

    Answers carry an `x-request-id` of ours, never the caller's. Without a key only this machine
    is served, and only to programs: a web page that was rebound to our address, or that posts
    across sites, is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        host_names: Collection[str],
        body_seconds: float,
    ) -> None:
        """Guard `app`.

        Args:
            api_key: what callers have to know; None: nothing.
            host_names: DNS names under which the server may be asked for without a key.
            body_seconds: within which a body that is no upload has to arrive.
        """
        self._app = app
        self._body_seconds = body_seconds
        self._key_digest = None if api_key is None else _digest(api_key.encode())
        self._host_names = frozenset(name.lower() for name in host_names) | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = mint("req_")
        scope["batchctl.request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = [
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, _limited(scope, receive, self._body_seconds), send_with_id)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  the last place where it can become an answer
            if not started:
                problem = to_problem(error)
                if problem.is_ours:
                    log_failure(error, scope)
                await render_problem(problem)(scope, receive, send_with_id)
                return
            # The server cuts the connection now, so that the answer is seen to be incomplete.
            # Starlette raises a RuntimeError from an error that came in the middle.
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
            if not isinstance(error, ServerStopping):
                log_failure(error, scope)

    def _check(self, scope: Scope) -> None:
        """Return when the request may pass.

        Raises:
            Problem: it may not.
        """
        headers = dict(scope["headers"])
        if self._key_digest is None:
            self._check_origin(scope["method"], headers)
        elif scope["path"].startswith(_GUARDED):
            self._check_key(headers.get(b"authorization", b""), self._key_digest)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES and not _is_upload(scope):
            raise _too_large()

    def _check_key(self, authorization: bytes, expected: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        if scheme.lower() == b"bearer" and hmac.compare_digest(given, expected):
            return
        said = "is not the right one" if authorization else "is missing"
        raise Problem(
            401,
            f"The API key {said}; send it as Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _check_origin(self, method: str, headers: dict[bytes, bytes]) -> None:
        name = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if name and name not in self._host_names and not _is_address(name):
            raise Problem(
                403,
                "Without an api_key this server is asked for by address or as localhost only.",
                code="host_not_allowed",
                kind="permission_error",
            )
        site = headers.get(b"sec-fetch-site", b"none")
        if method not in {"GET", "HEAD"} and site in {b"cross-site", b"same-site"}:
            raise Problem(
                403,
                "Another site's page may not post here; set an api_key for that.",
                code="cross_site",
                kind="permission_error",
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_name(host: str) -> str:
    """Return the name or address in a Host header."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_upload(scope: Scope) -> bool:
    return (scope["method"], scope["path"]) == ("POST", UPLOAD_PATH)


def _too_large() -> Problem:
    return Problem(413, f"The body has more than {MAX_BODY_BYTES} bytes.", code="request_too_large")


def _limited(scope: Scope, receive: Receive, seconds: float) -> Receive:
    """Return `receive` for a body that may not be large or late, whatever its headers say."""
    if _is_upload(scope):
        return receive
    received = 0
    deadline: float | None = None
    is_whole = False

    async def count() -> Message:
        nonlocal received, deadline, is_whole
        if is_whole:  # what comes now is the end of the connection, whenever that is
            return await receive()
        deadline = deadline or asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise Problem(
                408, f"The body did not arrive in {seconds:g} seconds.", code="request_timeout"
            ) from None
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise _too_large()
        is_whole = not message.get("more_body", False)
        return message

    return count
