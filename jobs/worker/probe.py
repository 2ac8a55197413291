"""A worker's own metrics and health, on a port of its own: GET /metrics and GET /health.

Each Celery child is a process with its own counts, so each has its own endpoint: `metrics_port`
plus its number on this machine. It answers whoever reaches it, tells no more than names of models
and counts, and listens on loopback unless `metrics_host` says otherwise.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from typing_extensions import override

from jobs import metrics
from jobs.domain.errors import Conflict
from jobs.setting_groups import WorkerSettings
from jobs.telemetry import log

HEALTHY_SECONDS = 60.0
"""How long a loop may go without a turn, or a turn without progress of its engine."""
_SOCKET_SECONDS = 5.0


class Pulse:
    """Whether the loops of a process are alive: each turn of theirs is noted here.

    A loop that is in a turn is alive as long as `progress` changes; so a shard may take hours, and
    an engine that hangs is still seen.
    """

    def __init__(
        self,
        *,
        progress: Callable[[], object] = lambda: None,
        limit_seconds: float = HEALTHY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with no loop at all.

        Args:
            progress: something that changes while the engine works or loads.
        """
        self._progress = progress
        self._limit_seconds = limit_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._turned_at: dict[str, float] = {}
        self._failures: dict[str, str] = {}
        self._last: tuple[float, object] = (clock(), None)

    def note(self, loop: str, *, failure: str | None = None) -> None:
        """Note that a loop begins or ends a turn.

        Args:
            failure: the code of what ended a turn; until one succeeds the loop is not well.
        """
        with self._lock:
            self._turned_at[loop] = self._clock()
            if failure is None:
                self._failures.pop(loop, None)
            else:
                self._failures[loop] = failure

    def problem(self) -> str | None:
        """Return why this process is not well, in a few words, or None when it is."""
        with self._lock:
            now = self._clock()
            progress = self._progress()
            if progress != self._last[1]:
                self._last = (now, progress)
            if self._failures:
                loop, code = next(iter(self._failures.items()))
                return f"The {loop} loop failed with {code}."
            for loop, turned_at in self._turned_at.items():
                silent = now - max(turned_at, self._last[0])
                if silent > self._limit_seconds:
                    return f"The {loop} loop has done nothing for {silent:.0f} s."
            return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], problem: Callable[[], str | None]) -> None:
        self.problem = problem
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SOCKET_SECONDS
    server_version = "batchctl"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one scrape or probe."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, metrics.CONTENT_TYPE, metrics.render())
        elif path == "/health":
            problem = self.server.problem()
            body = {"status": "ok"} if problem is None else {"status": "failing", "reason": problem}
            self._answer(
                200 if problem is None else 503, "application/json", json.dumps(body).encode()
            )
        else:
            self._answer(404, "text/plain", b"There is /metrics and /health.\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-content-type-options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each scrape."""


@contextmanager
def open_probe(
    settings: WorkerSettings, problem: Callable[[], str | None], *, ordinal: int = 0
) -> Iterator[int | None]:
    """Serve metrics and health within the block; yield the port, or None where none is wanted.

    Args:
        problem: returns why the process is not well, or None; asked by each GET /health.
        ordinal: number of this worker on its machine, added to a port that was set.

    Raises:
        Conflict: another program has the port.
    """
    if settings.metrics_port is None:
        yield None
        return
    wanted = settings.metrics_port + ordinal if settings.metrics_port else 0
    try:
        server = _Server((settings.metrics_host, wanted), problem)
    except OSError as error:
        raise Conflict(
            f"Metrics cannot be served on {settings.metrics_host} port {wanted}: "
            f"{(error.strerror or str(error)).lower()}. Choose another with worker.metrics_port, "
            "or 0 for a free one.",
            param="worker.metrics_port",
        ) from None
    port = int(server.server_address[1])
    log.info("probe_ready", host=settings.metrics_host, port=port)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="probe", daemon=True
    )
    thread.start()
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=_SOCKET_SECONDS)
