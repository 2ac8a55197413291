"""What stands between a program and its servers, and does to their talk what networks do.

TcpProxy     passes bytes on, cuts connections, or keeps them open and silent; knows a COMMIT
S3Proxy      passes HTTP requests on, or answers, hangs up, dawdles or hangs in their place
"""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from typing_extensions import override

Address = tuple[str, int] | Path
Where = Literal["before", "after"]
"""Whether the server has a COMMIT when its connection is cut."""
_TICK_SECONDS = 0.05
_COMMIT = b"COMMIT\0"


class TcpProxy:
    """Listens on 127.0.0.1 for a server behind an address or a Unix socket."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_TICK_SECONDS)
        self.port: int = self._listener.getsockname()[1]
        self.num_connections = 0
        self.num_cut_commits = 0
        self._links: set[_Link] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._silent = threading.Event()
        self.is_refusing = False
        self._choose_cut: Callable[[], Where | None] = lambda: None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self.cut()
        self._listener.close()

    # --- what a test does ---

    def cut(self) -> int:
        """End every connection, both ends at once; return how many there were."""
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            link.close()
        return len(links)

    def go_away(self) -> None:
        """End every connection and refuse new ones, until `come_back`."""
        self.is_refusing = True
        self.cut()

    def come_back(self) -> None:
        self.is_refusing = False

    def go_silent(self) -> None:
        """Keep every connection, accept new ones, and pass nothing on, in either direction."""
        self._silent.set()

    def speak(self, *, old_too: bool = True) -> None:
        """Pass on again: what waits on old connections too, or nothing on these ever."""
        if not old_too:
            with self._lock:
                for link in self._links:
                    link.dead.set()
        self._silent.clear()

    def cut_commits(self, choose: Callable[[], Where | None]) -> None:
        """Ask `choose` at each COMMIT of Postgres whether its connection is cut, and where."""
        self._choose_cut = choose

    # --- how it does it ---

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if self.is_refusing:
                client.close()
                continue
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            self.num_connections += 1
            link = _Link(client, server)
            with self._lock:
                self._links.add(link)
            for copy in (self._upwards, self._downwards):
                threading.Thread(target=self._run, args=(copy, link), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, Path):
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._target))
            return server
        return socket.create_connection(self._target, timeout=5)

    def _run(self, copy: "Callable[[_Link], None]", link: "_Link") -> None:
        with suppress(OSError):
            copy(link)
        link.close()
        with self._lock:
            self._links.discard(link)

    def _upwards(self, link: "_Link") -> None:
        while content := link.client.recv(1 << 16):
            self._wait_to_speak(link)
            where = self._choose_cut() if _COMMIT in content else None
            if where is None:
                link.server.sendall(content)
                continue
            self.num_cut_commits += 1
            if where == "after":
                link.deaf.set()
                link.server.sendall(content)
                # Its answer shows that it is done; nobody gets to see it.
                link.answered.wait(10)
            return

    def _downwards(self, link: "_Link") -> None:
        while content := link.server.recv(1 << 16):
            if link.deaf.is_set():
                link.answered.set()
                return
            self._wait_to_speak(link)
            link.client.sendall(content)

    def _wait_to_speak(self, link: "_Link") -> None:
        while (self._silent.is_set() or link.dead.is_set()) and not self._closed.is_set():
            time.sleep(_TICK_SECONDS)


class _Link:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        client.settimeout(None)
        server.settimeout(None)
        self.dead = threading.Event()
        self.deaf = threading.Event()
        self.answered = threading.Event()

    def close(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def tcp_proxy(target: Address) -> Iterator[TcpProxy]:
    proxy = TcpProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


Fault = Literal["busy", "error", "hang", "drop", "slow"]
"""503 SlowDown, 500, no answer, half an answer, or an answer in drops."""


@dataclass
class S3Faults:
    """How often which fault; the rest of the requests is passed on as it is."""

    shares: dict[Fault, float]
    hang_seconds: float = 3.0
    seed: int = 0


class S3Proxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server, or does something else instead."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _S3Handler)
        self.target = urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.done: Counter[str] = Counter()
        self.away_for: str | None = None
        """Whoever asks for a key with this in it finds nobody there; empty: whoever asks."""
        self.hold_for: str | None = None
        """Whoever asks for a key with this in it waits until it is another or None."""
        self._faults = S3Faults({})
        self._rng = random.Random(0)
        self._lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def hang_seconds(self) -> float:
        return self._faults.hang_seconds

    def fail(self, faults: S3Faults) -> None:
        with self._lock:
            self._faults, self._rng = faults, random.Random(faults.seed)

    def choose(self) -> Fault | None:
        with self._lock:
            point = self._rng.random()
            for fault, share in self._faults.shares.items():
                point -= share
                if point < 0:
                    self.done[fault] += 1
                    return fault
            self.done["passed"] += 1
            return None

    @override
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what these tests are about."""


class _S3Handler(BaseHTTPRequestHandler):
    server: S3Proxy
    protocol_version = "HTTP/1.1"

    @override
    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(1 << 16)
        if not self.raw_requestline:
            self.close_connection = True
        elif self.parse_request():
            self._answer()
            self.wfile.flush()

    def _answer(self) -> None:
        server = self.server
        if server.away_for is not None and server.away_for in self.path:
            server.done["away"] += 1
            self.close_connection = True
            return
        body = self._read_body()
        if server.hold_for is not None and server.hold_for in self.path:
            server.done["held"] += 1
            while server.hold_for is not None and server.hold_for in self.path:
                if server.closing.wait(_TICK_SECONDS):
                    return
        fault = server.choose()
        if fault == "hang":
            server.closing.wait(server.hang_seconds)
            self.close_connection = True
        elif fault in {"busy", "error"}:
            self._refuse(503 if fault == "busy" else 500)
        else:
            self._pass_on(body, fault)

    def _read_body(self) -> bytes:
        length = int(self.headers.get("content-length") or 0)
        return self.rfile.read(length) if length else b""

    def _refuse(self, status: int) -> None:
        code = "SlowDown" if status == 503 else "InternalError"
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("content-type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        inner = http.client.HTTPConnection(self.server.target, timeout=30)
        try:
            headers = {n: v for n, v in self.headers.items() if n.lower() != "expect"}
            inner.request(self.command, self.path, body=body, headers=headers)
            answer = inner.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "connection", "date", "server"}:
                    self.send_header(name, value)
            if answer.getheader("content-length") is None:
                self.send_header("content-length", str(len(content)))
            self.end_headers()
        finally:
            inner.close()
        if fault == "drop":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault == "slow":
            for start in range(0, len(content), max(1, len(content) // 10)):
                self.wfile.write(content[start : start + max(1, len(content) // 10)])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(content)

    @override
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""


@contextmanager
def s3_proxy(target: str) -> Iterator[S3Proxy]:
    proxy = S3Proxy(target)
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        proxy.shutdown()
        proxy.server_close()
