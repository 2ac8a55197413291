"""How often a server may be asked: token buckets, shared over Redis by all who ask one server."""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import xxhash

from engine.config import RemoteConfig
from jobs.telemetry import log

if TYPE_CHECKING:
    import redis.asyncio as redis_asyncio

_BURST_SECONDS = 5.0
"""A bucket holds what its rate brings in so many seconds: how much more than the limit a minute
may see."""
_REDIS_SECONDS = 1.0
_REDIS_AWAY_SECONDS = 5.0
_KEEP_SECONDS = 600

# One script, so that no two workers take the same token; the clock is the server's. It returns the
# milliseconds to wait, 0 when the request may be sent. A bucket may go below zero: a request that
# is larger than a full bucket is sent from a full one, and what a request really used is known
# only after it.
_SCRIPT = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + tonumber(clock[2]) / 1000
local pause = redis.call('PTTL', KEYS[3])
if pause > 0 then return pause end
local wait, levels = 0, {}
for i = 1, 2 do
  local rate, capacity = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  if rate > 0 then
    local kept = redis.call('HMGET', KEYS[i], 'level', 'at')
    local level, at = tonumber(kept[1]) or capacity, tonumber(kept[2]) or now
    level = math.min(capacity, level + math.max(0, now - at) * rate)
    local missing = math.min(tonumber(ARGV[4 + i]), capacity) - level
    if missing > 0 then wait = math.max(wait, math.ceil(missing / rate)) end
    levels[i] = level
  end
end
if wait > 0 then return wait end
for i = 1, 2 do
  if levels[i] then
    redis.call('HSET', KEYS[i], 'level', tostring(levels[i] - tonumber(ARGV[4 + i])),
               'at', tostring(now))
    redis.call('EXPIRE', KEYS[i], tonumber(ARGV[7]))
  end
end
return 0
"""
_SETTLE = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HINCRBYFLOAT', KEYS[1], 'level', ARGV[1])
end
return 0
"""


class _Bucket:
    """The same as the script does, for one process."""

    def __init__(self, per_minute: int | None) -> None:
        self.rate = (per_minute or 0) / 60_000
        self.capacity = max(1.0, self.rate * 1000 * _BURST_SECONDS)
        self.level = self.capacity
        self._at = time.monotonic()

    def wait_for(self, amount: float) -> float:
        """Return the seconds until so much may be taken; takes nothing."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        self.level = min(self.capacity, self.level + (now - self._at) * 1000 * self.rate)
        self._at = now
        return max(0.0, min(amount, self.capacity) - self.level) / self.rate / 1000


class RateLimiter:
    """Says when the next request may be sent; one for each engine, many on one Redis.

    Without Redis, or while it is away, each engine keeps the limits for itself.
    """

    def __init__(self, config: RemoteConfig) -> None:
        """Prepare; Redis is called with the first request."""
        self._requests = _Bucket(config.requests_per_minute)
        self._tokens = _Bucket(config.tokens_per_minute)
        self._pause_until = 0.0
        self._config = config
        self._redis: redis_asyncio.Redis | None = None
        self._redis_away_until = 0.0
        self._is_away = False
        # Who shares a key at a server shares its limits; neither can be read from the hash.
        whose = xxhash.xxh3_128_hexdigest(f"{config.url}\0{config.api_key or ''}".encode())
        root = f"{config.limiter_prefix}:limit:{{{whose}}}"
        self._keys = [f"{root}:requests", f"{root}:tokens", f"{root}:pause"]

    @property
    def is_needed(self) -> bool:
        """Whether there is any limit, or anybody to share pauses with."""
        config = self._config
        return bool(config.requests_per_minute or config.tokens_per_minute or config.limiter_url)

    async def acquire(self, num_tokens: int) -> float:
        """Return 0 where a request of so many tokens may be sent now, else seconds to wait."""
        if (redis := self._shared()) is not None:
            arguments = [
                *(self._requests.rate, self._requests.capacity),
                *(self._tokens.rate, self._tokens.capacity),
                *(1, num_tokens, _KEEP_SECONDS),
            ]
            try:
                wait = await redis.eval(_SCRIPT, 3, *self._keys, *map(str, arguments))
                self._note_there()
                return float(wait) / 1000
            except self._redis_errors() as error:
                self._note_away(error)
        return self._acquire_here(num_tokens)

    async def settle(self, *, estimated: int, used: int) -> None:
        """Put right what `acquire` took, once it is known how many tokens a request used."""
        back = float(estimated - used)
        if not back or not self._tokens.rate:
            return
        if (redis := self._shared()) is not None:
            try:
                await redis.eval(_SETTLE, 1, self._keys[1], str(back))
            except self._redis_errors() as error:
                self._note_away(error)
        self._tokens.level = min(self._tokens.capacity, self._tokens.level + back)

    async def pause(self, seconds: float) -> None:
        """Let nobody who shares these limits send anything for so long."""
        self._pause_until = max(self._pause_until, time.monotonic() + seconds)
        milliseconds = int(seconds * 1000)
        if milliseconds > 0 and (redis := self._shared()) is not None:
            try:
                if await redis.pttl(self._keys[2]) < milliseconds:
                    await redis.set(self._keys[2], "1", px=milliseconds)
            except self._redis_errors() as error:
                self._note_away(error)

    async def close(self) -> None:
        """Close the connections to Redis."""
        redis, self._redis = self._redis, None
        if redis is not None:
            with contextlib.suppress(*self._redis_errors()):
                await redis.aclose()

    def _acquire_here(self, num_tokens: int) -> float:
        wait = max(
            self._pause_until - time.monotonic(),
            self._requests.wait_for(1),
            self._tokens.wait_for(num_tokens),
        )
        if wait > 0:
            return wait
        self._requests.level -= 1
        self._tokens.level -= num_tokens
        return 0.0

    def _shared(self) -> "redis_asyncio.Redis | None":
        url = self._config.limiter_url
        if url is None or time.monotonic() < self._redis_away_until:
            return None
        if self._redis is None:
            try:
                self._redis = _open(url, self._config.limiter_master)
            except (ImportError, ValueError) as error:
                self._note_away(error)
        return self._redis

    @staticmethod
    def _redis_errors() -> tuple[type[Exception], ...]:
        from redis.exceptions import RedisError  # noqa: PLC0415 - an extra that may be missing

        return RedisError, OSError, asyncio.TimeoutError

    def _note_there(self) -> None:
        if self._is_away:
            self._is_away = False
            log.info("rate_limiter_back")

    def _note_away(self, error: Exception) -> None:
        self._redis_away_until = time.monotonic() + _REDIS_AWAY_SECONDS
        if not self._is_away:
            self._is_away = True
            log.warning("rate_limiter_away", error=type(error).__name__, limits="each for itself")


def _open(url: str, master: str) -> "redis_asyncio.Redis":
    """Return a client that has not connected yet.

    Raises:
        ImportError: there is no client library.
        ValueError: the URL is none of Redis.
    """
    import redis.asyncio as redis_asyncio  # noqa: PLC0415 - an extra that may be missing
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.asyncio.sentinel import Sentinel  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    times: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 1),  # an idle connection may have been closed
        "socket_timeout": _REDIS_SECONDS,
        "socket_connect_timeout": _REDIS_SECONDS,
    }
    if not url.startswith("sentinel://"):
        return redis_asyncio.Redis.from_url(url, **times)
    parts = [urlsplit(one if "://" in one else f"sentinel://{one}") for one in url.split(";")]
    sentinel = Sentinel(
        [(one.hostname or "127.0.0.1", one.port or 26379) for one in parts], **times
    )
    first = parts[0]
    client: redis_asyncio.Redis = sentinel.master_for(
        master,
        username=unquote(first.username) if first.username else None,
        password=unquote(first.password) if first.password else None,
        db=int(first.path.strip("/") or 0),
        **times,
    )
    return client
