"""Serves the API on a port until it is told to stop."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from jobs.api.app import create_api
from jobs.app import App
from jobs.domain.errors import Conflict, InvalidInput

_BACKLOG = 2048
# Longer than clients keep idle connections (5 s in httpx), so that they close them, not we.
_KEEP_ALIVE_SECONDS = 30
_GRACE_SECONDS = 10
_HEADER_SECONDS = 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for what our own log says better: that an answer was cut off, and why."""
    return not str(record.msg).startswith("ASGI callable returned without completing")


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that has the port; 0 takes a free one.

    Raises:
        Conflict: another program has it.
        InvalidInput: there is no such host, or it is not this machine's, or the port is refused.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InvalidInput(
            f"The host {host!r} cannot be resolved; use an address of this machine, such as "
            "127.0.0.1.",
            param="host",
        ) from None
    # "localhost" is both; more clients try IPv4.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"Port {port} on {host} is in use; end what listens there, or choose another with "
                "--port.",
                param="port",
            ) from None
        reason = (error.strerror or "").lower()
        raise InvalidInput(
            f"Port {port} on {host} cannot be listened on: {reason}.",
            param="port" if error.errno == errno.EACCES else "host",
        ) from None
    return listener


class _Protocol(H11Protocol):
    """Ends a connection on which no whole request begins in time; uvicorn waits for ever.

    A connection costs a file, of which a process has few.
    """

    header_seconds = _HEADER_SECONDS
    _timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self._end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class ApiServer(uvicorn.Server):
    """Uvicorn on a socket that is open already; returns after a signal, where uvicorn dies of it.

    In another thread than the main one no signal is looked at: set `should_exit`.
    """

    def __init__(
        self,
        api: FastAPI,
        listener: socket.socket,
        *,
        on_ready: Callable[[str, int], None] | None = None,
        header_seconds: float = _HEADER_SECONDS,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                api,
                http=type("Protocol", (_Protocol,), {"header_seconds": header_seconds}),
                log_config=None,
                log_level=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        self._stopping: threading.Event = api.state.context.stopping
        self._listener = listener
        self._on_ready = on_ready

    @property
    def address(self) -> tuple[str, int]:
        """The host and the real port."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    @override
    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        super().run(sockets=[self._listener, *(sockets or ())])

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        host, port = self.address
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready(host, port)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    @override
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _frame: FrameType | None) -> None:
            self.force_exit = self.should_exit and number == signal.SIGINT
            self.should_exit = True

        before = {one: signal.signal(one, stop) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def serve(
    app: App,
    host: str,
    port: int,
    *,
    api_key: str | None = None,
    on_ready: Callable[[str, int], None] | None = None,
    on_work: Callable[[], None] | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Serve the API until SIGTERM or SIGINT, then finish the answers that are under way.

    Opens no workers: the caller runs it inside `Embedded`, or alone for an API without workers.

    Args:
        on_ready: called with the host and the real port once requests are taken.
        on_work: see `create_api`.
        listener: from `open_listener`, for a caller that takes the port before anything else.

    Raises:
        Conflict: another program has the port.
        InvalidInput: there is no such host.
    """
    with listener or open_listener(host, port) as taken:
        api = create_api(app, api_key=api_key, on_work=on_work, host_names=(host,))
        ApiServer(api, taken, on_ready=on_ready).run()
