"""HTTP servers on loopback that misbehave as they are told, and remember who called."""

# ruff: noqa: ANN401 - what a test changes is whatever field there is

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

from engine.base import Engine
from engine.config import RemoteConfig
from engine.remote import RemoteEngine
from jobs.domain.request import Constraint, Message, Request, SamplingParams
from jobs.domain.result import Result
from tests.sources import ListSource

SECRET = "sk-very-secret-key"  # noqa: S105 - it opens nothing
PROMPT = "my private prompt"


@dataclass
class Call:
    """One request that came in, and the ways to answer it."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    keeps: bool = True

    @property
    def text(self) -> str:
        messages = self.body.get("messages")
        return str(messages[-1]["content"] if messages else self.body.get("prompt"))

    async def respond(
        self,
        status: int,
        content: object,
        *,
        headers: Mapping[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        await self.raw(
            status,
            headers={"content-length": str(len(body)), **(headers or {})} | {"content-type": kind},
        )
        await self.send(body)

    async def raw(self, status: int, *, headers: Mapping[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {text}" for name, text in headers.items())]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def send(self, piece: bytes) -> None:
        self.writer.write(piece)
        await self.writer.drain()

    async def answer(self, text: str = "fine", **changes: Any) -> None:
        await self.respond(200, answer(text, **changes))

    async def begin_stream(self) -> None:
        self.keeps = False
        await self.raw(200, headers={"content-type": "text/event-stream", "connection": "close"})

    async def event(self, **delta: Any) -> None:
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        await self.send(f"data: {json.dumps(chunk)}\n\n".encode())

    async def hang(self) -> None:
        """Say nothing until the caller closes the connection."""
        self.keeps = False
        await self.reader.read()

    def close(self) -> None:
        self.keeps = False
        self.writer.close()


def answer(text: str = "fine", **changes: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        **changes,
    }


def error(message: str = "No.", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": None, "param": None, "code": None, **fields}}


Behaviour = Callable[[Call], Awaitable[None]]


@dataclass
class Server:
    """Serves a behaviour from a thread of its own; use as a context manager."""

    behaviour: Behaviour
    calls: list[Call] = field(default_factory=list)
    port: int = 0
    most_at_once: int = 0
    num_closed_early: int = 0
    tls: ssl.SSLContext | None = None
    _now: int = 0

    @property
    def num_open(self) -> int:
        """How many calls are being answered now."""
        return self._now

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(
            daemon=True, target=lambda: asyncio.run(self._serve(started))
        )
        self._thread.start()
        started.result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self, started: "Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            server = await asyncio.start_server(
                self._connected, "127.0.0.1", self.port, ssl=self.tls
            )
        except OSError as problem:
            started.set_exception(problem)
            return
        self.port = server.sockets[0].getsockname()[1]
        started.set_result(None)
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in range(3):  # until the transports have noticed
            await asyncio.sleep(0)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {
                    name.lower(): text.strip()
                    for name, _, text in (line.partition(":") for line in head[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                call = Call(
                    number=len(self.calls),
                    path=head[0].split(" ")[1],
                    headers=headers,
                    body=json.loads(body) if body else {},
                    at=time.monotonic(),
                    reader=reader,
                    writer=writer,
                )
                self.calls.append(call)
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
                try:
                    await self.behaviour(call)
                finally:
                    self._now -= 1
                if not call.keeps:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_closed_early += 1
        finally:
            if self.tls is None:
                writer.close()
            else:  # nobody waits for the end of a conversation in TLS
                writer.transport.abort()


class OpenRemote:
    """Opens engines on servers, without the asking around them, and closes them."""

    def __init__(self) -> None:
        self._opened: list[Engine] = []

    def __call__(self, server: Server | str, **changes: Any) -> Engine:
        url = server if isinstance(server, str) else server.url
        config = RemoteConfig.model_validate(
            {"url": url, "api_key": SECRET, "patience_seconds": 1, **changes}
        )
        self._opened.append(RemoteEngine(config, model="a-model"))
        return self._opened[-1]

    def close(self) -> None:
        for engine in self._opened:
            engine.close()
            engine.close()


def ask(
    request_id: int = 1,
    text: str = "hello",
    *,
    constraint: Constraint | None = None,
    **sampling: Any,
) -> Request:
    return Request(
        id=request_id,
        messages=(Message("user", text),),
        sampling=SamplingParams(**{"max_tokens": 20, **sampling}),
        constraint=constraint,
    )


def collect(engine: Engine, *requests: Request) -> dict[int, Result]:
    found: dict[int, Result] = {}
    for result in engine.generate(ListSource(requests)):
        assert result.id not in found, "two results for one request"
        found[result.id] = result
    return found
