"""The engine's own process: loads one model and serves it over an inherited socket.

Run as `python -m engine.host FD`. It ends, with its whole process group, when the other end of
the socket closes, so that no engine outlives its worker.
"""

import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from engine import wire
from engine.config import EngineConfig
from engine.registry import open_engine
from jobs.domain.errors import BatchctlError
from jobs.domain.request import Request

if TYPE_CHECKING:
    from engine.base import Engine

PROGRESS_SECONDS = 1.0


class _Connection:
    """Sends frames from a thread of its own, so that many small messages share a frame."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._waiting: deque[wire.FromEngine] = deque()
        self._ready = threading.Condition()
        self._sending = False
        threading.Thread(target=self._run, name="engine-send", daemon=True).start()

    def send(self, message: wire.FromEngine) -> None:
        with self._ready:
            self._waiting.append(message)
            self._ready.notify_all()

    def flush(self, timeout_seconds: float = 10.0) -> None:
        """Wait until everything has been handed to the kernel."""
        with self._ready:
            self._ready.wait_for(lambda: not (self._waiting or self._sending), timeout_seconds)

    def _run(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: bool(self._waiting))
                messages = list(self._waiting)
                self._waiting.clear()
                self._sending = True
            try:
                self._socket.sendall(wire.encode_frame(_join_results(messages)))
            except OSError:
                _end_group()
            with self._ready:
                self._sending = False
                self._ready.notify_all()


def _join_results(messages: list[wire.FromEngine]) -> list[wire.FromEngine]:
    joined: list[wire.FromEngine] = []
    for message in messages:
        last = joined[-1] if joined else None
        if isinstance(message, wire.Results) and isinstance(last, wire.Results):
            last.results.extend(message.results)
        else:
            joined.append(message)
    return joined


def _end_group() -> None:
    """End this process and everything it started, at once."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


class _SocketSource:
    """The requests that arrived over the socket; asks for more before it runs dry."""

    def __init__(self, connection: _Connection, *, depth: int) -> None:
        self._connection = connection
        self._depth = depth
        self._lock = threading.Lock()
        self._requests: deque[Request] = deque()
        self._aborted: set[int] = set()
        self._credit = 0
        self._ended = False

    def open(self) -> None:
        with self._lock:
            self._ended = False
            self._aborted.clear()
            self._credit = 0  # what was asked for in an earlier session went with it
            self._ask()

    def submit(self, requests: list[Request]) -> None:
        with self._lock:
            self._requests.extend(requests)
            self._credit -= len(requests)

    def abort(self, request_ids: list[int]) -> None:
        with self._lock:
            self._aborted.update(request_ids)

    def end(self) -> None:
        with self._lock:
            self._ended = True

    def _ask(self) -> None:
        wanted = self._depth - len(self._requests) - self._credit
        if wanted > 0 and not self._ended:
            self._credit += wanted
            self._connection.send(wire.Credit(wanted))

    def take(self, n: int) -> Sequence[Request] | None:
        with self._lock:
            taken: list[Request] = []
            while self._requests and len(taken) < n:
                request = self._requests.popleft()
                if request.id not in self._aborted:
                    taken.append(request)
            if not taken and not self._requests and self._ended:
                return None
            self._ask()
        if taken:
            # The worker must know the suspects before the engine touches them.
            self._connection.send(wire.Started([request.id for request in taken]))
            self._connection.flush()
        return taken

    def is_aborted(self, request_id: int) -> bool:
        return request_id in self._aborted


class _Host:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._connection = _Connection(connection)
        self._engine: Engine | None = None
        self._source: _SocketSource | None = None
        self._session = threading.Event()
        self._begun = False

    def run(self) -> int:
        """Load the model, serve sessions until the socket closes; return the exit status."""
        opening = wire.read_frame(self._socket)
        if not opening or not isinstance(opening[0], wire.Open):
            return 1
        config: EngineConfig = TypeAdapter(EngineConfig).validate_json(opening[0].config)
        threading.Thread(target=self._report_progress, name="engine-progress", daemon=True).start()
        # Reads from the start: a worker that dies while the model loads ends the loading.
        threading.Thread(target=self._read, name="engine-read", daemon=True).start()
        try:
            engine = open_engine(config, model=opening[0].model)
        except BatchctlError as error:
            return self._give_up(error.code, error.message)
        except MemoryError:
            return self._give_up("engine_out_of_memory", "Not enough memory to load the model.")
        self._source = source = _SocketSource(self._connection, depth=2 * engine.num_slots)
        self._engine = engine
        self._connection.send(wire.Ready(engine.capabilities, engine.num_slots, engine.tuning))
        while True:
            self._session.wait()
            self._session.clear()
            try:
                for result in engine.generate(source):
                    self._connection.send(wire.Results([result]))
            except BatchctlError as error:
                return self._give_up(error.code, error.message)
            except MemoryError:
                return self._give_up("engine_out_of_memory", "The engine ran out of memory.")
            self._begun = False
            self._connection.send(wire.Progress(engine.progress(), engine.tuning))
            self._connection.send(wire.End())

    def _give_up(self, code: str, message: str) -> int:
        self._connection.send(wire.Fatal(code, message))
        self._connection.flush()
        return 1

    def _read(self) -> None:
        while messages := wire.read_frame(self._socket):
            source, engine = self._source, self._engine
            if source is None or engine is None:
                continue  # nothing is sent before Ready
            for message in messages:
                if isinstance(message, wire.Submit):
                    if not self._begun:
                        self._begun = True
                        source.open()
                        self._session.set()
                    source.submit(message.requests)
                elif isinstance(message, wire.Abort):
                    source.abort(message.request_ids)
                elif isinstance(message, wire.End):
                    source.end()
                elif isinstance(message, wire.Count) and message.request is not None:
                    count = engine.count_tokens(message.request)
                    self._connection.send(wire.Count(num_tokens=count))
        _end_group()

    def _report_progress(self) -> None:
        pause = threading.Event()
        while not pause.wait(PROGRESS_SECONDS):
            engine = self._engine
            self._connection.send(
                wire.Progress(engine.progress(), engine.tuning) if engine else wire.Progress(0)
            )


def main() -> int:
    """Serve the socket whose file descriptor is the only argument."""
    # Ctrl-C reaches the whole terminal group; only the worker decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        return _Host(connection).run()


if __name__ == "__main__":
    # No interpreter shutdown: library threads of a loaded model have been seen to hang in it.
    sys.stderr.flush()
    os._exit(main())
