"""Servers of the API on free ports, with and without workers, and what tests send to them."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
from fastapi import FastAPI

from jobs.api.app import create_api
from jobs.api.context import Context
from jobs.api.server import ApiServer, open_listener
from jobs.app import App, open_app
from jobs.embedded import Embedded
from jobs.settings import Settings

_T = TypeVar("_T")
FAST = {"timing_profile": "fast"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that takes requests."""

    url: str
    app: App
    server: ApiServer

    @property
    def port(self) -> int:
        return self.server.address[1]

    @property
    def context(self) -> Context:
        api = self.server.config.app
        assert isinstance(api, FastAPI)
        assert isinstance(api.state.context, Context)
        return api.state.context

    def client(self, **changes: object) -> openai.OpenAI:
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0} | changes
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def http(self, **changes: object) -> httpx2.Client:
        options: dict[str, Any] = {"timeout": 30, **changes}
        return httpx2.Client(base_url=self.url, **options)

    def stop(self) -> None:
        self.server.should_exit = True


Serve = Callable[..., AbstractContextManager[Running]]


@contextmanager
def run_api(
    folder: Path,
    *,
    workers: bool = False,
    api_key: str | None = None,
    on_work: Callable[[], None] | None = None,
    stall_seconds: float = 60,
    header_seconds: float = 30,
    **settings: object,
) -> Iterator[Running]:
    given: dict[str, Any] = {"engine": "simulated", "leases": FAST, **settings}
    chosen = Settings(**given)
    with ExitStack() as stack:
        app = stack.enter_context(open_app(chosen, folder=folder))
        listener = stack.enter_context(open_listener("127.0.0.1", 0))
        if workers:
            stack.enter_context(Embedded(app))
        ready = threading.Event()
        server = ApiServer(
            create_api(app, api_key=api_key, on_work=on_work, stall_seconds=stall_seconds),
            listener,
            on_ready=lambda _host, _port: ready.set(),
            header_seconds=header_seconds,
        )
        thread = threading.Thread(daemon=True, target=server.run)
        thread.start()
        try:
            assert ready.wait(10)
            host, port = server.address
            yield Running(url=f"http://{host}:{port}", app=app, server=server)
        finally:
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()


def lines(num: int, **body: object) -> bytes:
    """Return an input file of chats."""
    asked: dict[str, object] = {
        "model": "simulated",
        "messages": [{"role": "user", "content": "hello"}],
    } | body
    return b"".join(
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": asked,
            }
        ).encode()
        + b"\n"
        for number in range(num)
    )


def wait_for(condition: Callable[[], _T], *, seconds: float = 60) -> _T:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found
