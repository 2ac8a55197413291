"""One HTTP exchange with a server of OpenAI's API: a body goes out, what it says comes back."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from engine import openai_answers, openai_api
from engine.config import RemoteConfig
from engine.openai_answers import Answer, Refusal, Trouble
from jobs.domain.errors import EngineError, EngineMisconfigured
from jobs.domain.request import Request
from jobs.domain.result import LineError

_CONNECT_SECONDS = 30.0
_KEEP_ALIVE_SECONDS = 4.0  # uvicorn's servers close what was idle for 5 s
_MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_BYTES = 1 << 20
_ERROR_BODY_SECONDS = 30.0
_MAX_SHOWN_MODELS = 10

TROUBLES: Mapping[type[httpx2.HTTPError], Trouble] = {
    httpx2.ConnectTimeout: Trouble(kind="away", code="connect_timeout", slows=True),
    httpx2.PoolTimeout: Trouble(kind="away", code="connect_timeout", slows=True),
    httpx2.ConnectError: Trouble(kind="away", code="connection_failed", slows=True),
    httpx2.ProxyError: Trouble(kind="away", code="proxy_failed", slows=True),
    httpx2.ReadTimeout: Trouble(kind="fault", code="timed_out", slows=True),
    httpx2.WriteTimeout: Trouble(kind="fault", code="timed_out", slows=True),
    httpx2.RemoteProtocolError: Trouble(kind="fault", code="connection_lost", slows=True),
    httpx2.ReadError: Trouble(kind="fault", code="connection_lost", slows=True),
    httpx2.WriteError: Trouble(kind="fault", code="connection_lost", slows=True),
    httpx2.CloseError: Trouble(kind="fault", code="connection_lost", slows=True),
    httpx2.DecodingError: Trouble(kind="fault", code="invalid_answer"),
    httpx2.SSEError: Trouble(kind="fault", code="invalid_answer"),
}
"""What each failure of the HTTP client means where trying again may help."""

MISCONFIGURED: frozenset[type[httpx2.HTTPError]] = frozenset(
    {
        httpx2.LocalProtocolError,
        httpx2.UnsupportedProtocol,
        httpx2.TooManyRedirects,
        httpx2.HTTPStatusError,
    }
)
"""Those that would come again each time: what the settings say cannot be called."""


class Exchange:
    """Speaks with one server; to be used in one event loop."""

    def __init__(self, config: RemoteConfig, *, model: str) -> None:
        """Prepare; nothing is called.

        Args:
            model: what the server calls it.
        """
        self._config = config
        self._model = model
        self._base = openai_api.base_url(config.url)
        self.shown = openai_api.shown_url(self._base)

    def open(self) -> None:
        """Make the client; it has not connected yet.

        Raises:
            EngineMisconfigured: the proxy or the certificates of the environment are unusable.
        """
        headers = {"Accept": "application/json, text/event-stream", "User-Agent": "batchctl"}
        if self._config.api_key:
            headers["Authorization"] = f"Bearer {self._config.api_key}"
        timeout = self._config.timeout_seconds
        try:
            self._client = httpx2.AsyncClient(
                headers=headers,
                # A read time-out counts from the last byte: an answer may take for ever, as long
                # as it goes on.
                timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
                limits=httpx2.Limits(
                    max_connections=self._config.slots + 4,
                    max_keepalive_connections=self._config.slots,
                    keepalive_expiry=_KEEP_ALIVE_SECONDS,
                ),
                follow_redirects=False,  # the prompts and the key are for this server
            )
        except (ValueError, OSError, ImportError, httpx2.InvalidURL) as error:
            raise EngineMisconfigured(
                f"No HTTP client can be made ({type(error).__name__}); look at HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR."
            ) from None

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def ask(
        self, endpoint: str, body: bytes, *, note_bytes: Callable[[], None]
    ) -> Answer | Trouble | Refusal | EngineError:
        """Send a body and return what came of it; cancelling closes the connection.

        Args:
            endpoint: what is put behind the base URL.
            note_bytes: is called with every piece of an answer that arrives.
        """
        headers = {"Content-Type": "application/json"}
        try:
            async with self._client.stream(
                "POST", self._base + endpoint, content=body, headers=headers
            ) as response:
                if response.is_success:
                    return await _receive(response, note_bytes)
                if response.has_redirect_location:
                    return Trouble(kind="fault", code="redirected", status=response.status_code)
                return await _receive_failure(response)
        except httpx2.HTTPError as error:
            return self._explain(error)
        except (httpx2.InvalidURL, UnicodeError):
            return EngineMisconfigured(f"{self.shown} is no URL that can be called.")

    async def explain_missing(self, status: int) -> EngineError:
        """Return why the first request was not found: the model, or the whole API."""
        names: list[str] = []
        try:
            response = await self._client.get(f"{self._base}/models", timeout=_CONNECT_SECONDS)
            names = [str(one["id"])[:100] for one in response.json()["data"]]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            pass
        if not names:
            return EngineMisconfigured(
                f"There is no API at {self.shown} (status {status}): `url` should be the base URL "
                "of a server with OpenAI's API, with or without /v1."
            )
        if self._model in names:
            return EngineMisconfigured(
                f"{self.shown} lists the model {self._model!r}, but does not serve it on the "
                f"batch's endpoint (status {status})."
            )
        more = ", ..." if len(names) > _MAX_SHOWN_MODELS else ""
        return EngineMisconfigured(
            f"{self.shown} has no model {self._model!r}; it has: "
            f"{', '.join(names[:_MAX_SHOWN_MODELS])}{more}. Name one of them, or set "
            "`served_model` (for all models `remote.model`) to what the server calls it."
        )

    async def count_tokens(self, request: Request) -> int | None:
        """Return what the server counts as the prompt's tokens, or None where it does not count.

        Source: vLLM's `/tokenize`, beside `/v1`.
        """
        body: dict[str, Any] = {"model": self._model}
        if request.messages is not None:
            body["messages"] = openai_api.messages_of(request.messages)
        elif isinstance(request.prompt, tuple):
            return len(request.prompt)
        else:
            body["prompt"] = request.prompt
        try:
            response = await self._client.post(
                f"{self._base.removesuffix('/v1')}/tokenize", json=body, timeout=_CONNECT_SECONDS
            )
            count = response.json().get("count") if response.is_success else None
        except (httpx2.HTTPError, ValueError, AttributeError):
            return None
        return count if isinstance(count, int) else None

    def _explain(self, error: httpx2.HTTPError) -> Trouble | EngineError:
        if _is_certificate_error(error):
            return EngineMisconfigured(
                f"The certificate of {self.shown} is not trusted here; name its authority with "
                "SSL_CERT_FILE."
            )
        for kind in type(error).__mro__:
            if kind in TROUBLES:
                return TROUBLES[kind]
        return EngineMisconfigured(
            f"{self.shown} cannot be called ({type(error).__name__}); look at `url` and `api_key`."
        )


async def _receive(
    response: httpx2.Response, note_bytes: Callable[[], None]
) -> Answer | Trouble | Refusal:
    content_type = response.headers.get("content-type", "")
    reader = openai_answers.StreamReader() if content_type.startswith("text/event-stream") else None
    num_bytes = 0
    whole = bytearray()
    async for piece in response.aiter_bytes():
        note_bytes()
        num_bytes += len(piece)
        if num_bytes > _MAX_ANSWER_BYTES:
            return _too_large()
        if reader is None:
            whole += piece
        else:
            reader.feed(piece)
    if reader is not None:
        return reader.result()
    return openai_answers.read_answer(bytes(whole), content_type=content_type)


async def _receive_failure(response: httpx2.Response) -> Trouble | Refusal:
    body = bytearray()
    try:
        async with asyncio.timeout(_ERROR_BODY_SECONDS):
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > _MAX_ERROR_BYTES:
                    break
    except TimeoutError:
        pass  # the status says enough
    return openai_answers.read_failure(response.status_code, response.headers, bytes(body))


def _too_large() -> Refusal:
    return Refusal(
        status=200,
        error=LineError(
            code="answer_too_large",
            message=f"The server's answer has more than {_MAX_ANSWER_BYTES >> 20} MiB.",
            status_code=502,
        ),
    )


def _is_certificate_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
