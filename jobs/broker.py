"""Redis or Valkey between the processes of a fleet: Celery messages for work, hints for the rest.

    ring ──► thread ──► units.poke_due ──► Celery message: "this queue has work"
    hint ──► thread ──► PUBLISH <prefix>.hints {"stopping": batch id}
                        SUBSCRIBE, in another thread ──► Doorbell.hint_here

Nothing here is needed for an answer to be right or to come at all: who rings never waits for Redis
and never fails because of it, and messages carry ids only, which are looked up in the database.
"""

import json
import re
import ssl
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import kombu.exceptions
import redis
from celery import Celery
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from jobs.broker_url import check_url, tls_options, without_options
from jobs.domain.errors import StorageError
from jobs.domain.ids import BatchId
from jobs.domain.shard import UnitKind
from jobs.telemetry import log
from jobs.wakeups import BrokerConfig, Doorbell, Hint, control_queue, work_queue
from storage import units
from storage.database import Database

PLAN, WORK, FINALIZE, SWEEP = (f"batchctl.{name}" for name in ("plan", "work", "finalize", "sweep"))
"""Names of the tasks, which are all that publishers and workers have to agree on."""
_NAMES = {UnitKind.PLAN: PLAN, UnitKind.SHARD: WORK, UnitKind.FINALIZE: FINALIZE}

_MESSAGES = {UnitKind.SHARD: 8}
"""How many workers one ring may wake; a message too many costs its reader a millisecond."""
_MAX_QUEUED = 64
"""A queue that nobody reads does not grow beyond this."""
_SOCKET_SECONDS = 5.0
_HEALTH_SECONDS = 25
_LISTEN_SECONDS = 0.5
_MAX_UNANSWERED = 10
"""Pings of a listener in a row without an answer, some five seconds' worth."""
_RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
_MIN_PAUSE_SECONDS = 0.02
_BATCH_ID = re.compile(r"batch_[A-Za-z0-9_-]{1,64}")
_MAX_HINT_BYTES = 200
_ERRORS = (redis.RedisError, kombu.exceptions.KombuError, OSError)


def transport_settings(config: BrokerConfig) -> dict[str, Any]:
    """Return Celery's settings of the connection, the same for publishers and workers.

    Raises:
        InvalidInput: the URL is none that can be used.
    """
    url, tls = _split_tls(config.url)
    options: dict[str, Any] = {
        # With early acknowledgement this covers only what was fetched and not begun. It has to be
        # the same in every program on this Redis: the shortest one wins.
        "visibility_timeout": 3600,
        # Celery's own sweep for such messages runs every 100 s whatever the time-out.
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        # Without a time-out a publisher waits on a dead connection for ever; with health checks a
        # consumer behind a half-open connection comes back within a minute.
        "socket_timeout": 30,
        "socket_connect_timeout": _SOCKET_SECONDS,
        "socket_keepalive": True,
        "health_check_interval": _HEALTH_SECONDS,
        # What may have been done is not done again by the transport: the sweeper rings again.
        "retry_on_timeout": False,
    }
    if url.startswith("sentinel://"):
        options["master_name"] = config.sentinel_master
    return {
        "broker_url": url,
        # By the scheme alone kombu would speak TLS and check no certificate.
        "broker_use_ssl": tls,
        "broker_transport_options": options,
        "broker_connection_timeout": _SOCKET_SECONDS,
        # JSON only: with pickle, whoever can write to Redis can run code here.
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        # A caller does not hang on Redis: the sweeper rings again.
        "task_publish_retry": True,
        "task_publish_retry_policy": {
            "max_retries": 2,
            "interval_start": 0.2,
            "interval_step": 0.2,
            "interval_max": 0.2,
        },
        "task_default_queue": control_queue(config.prefix),
        # Two systems on one Redis do not answer each other's `celery inspect`.
        "control_exchange": f"{config.prefix}.pidbox",
        "event_exchange": f"{config.prefix}.events",
        # The database is the result: a second truth would only leak.
        "result_backend": None,
        "task_ignore_result": True,
    }


def connect(config: BrokerConfig) -> redis.Redis:
    """Return a client that has not connected yet; every wait of it is bounded.

    Raises:
        InvalidInput: the URL is none that can be used.
    """
    url, tls = _split_tls(config.url)
    options: dict[str, Any] = {
        # redis-py waits 5 s by default, since version 8; here it is said.
        "socket_timeout": _SOCKET_SECONDS,
        "socket_connect_timeout": _SOCKET_SECONDS,
        "socket_keepalive": True,
        "health_check_interval": _HEALTH_SECONDS,
        "retry": Retry(NoBackoff(), 1),  # an idle connection may have been closed
        **(tls or {}),
    }
    if not url.startswith("sentinel://"):
        client: redis.Redis = redis.Redis.from_url(url, **options)
        return client
    parts = [urlsplit(one if "://" in one else f"sentinel://{one}") for one in url.split(";")]
    first = parts[0]
    sentinel = Sentinel(
        [(one.hostname or "127.0.0.1", one.port or 26379) for one in parts],
        socket_timeout=_SOCKET_SECONDS,
        socket_connect_timeout=_SOCKET_SECONDS,
    )
    master: redis.Redis = sentinel.master_for(
        config.sentinel_master,
        username=unquote(first.username) if first.username else None,
        password=unquote(first.password) if first.password else None,
        db=int(first.path.strip("/") or 0),
        **options,
    )
    return master


def _split_tls(url: str) -> tuple[str, dict[str, Any] | None]:
    """Return the URL without its options, and those of TLS, or None where there is no TLS."""
    check_url(url)
    options = tls_options(url)
    if options is None:
        return url, None
    rule = ssl.VerifyMode[f"CERT_{str(options['ssl_cert_reqs']).upper()}"]
    return without_options(url), {**options, "ssl_cert_reqs": rule}


class Broker:
    """The other processes of a fleet; use as a context manager."""

    def __init__(
        self,
        config: BrokerConfig,
        *,
        doorbell: Doorbell,
        db: Database,
        poke_again_seconds: float = 30.0,
    ) -> None:
        """Prepare to ring others, and to pass on to `doorbell` what they tell.

        Args:
            poke_again_seconds: when a unit that nobody took is rung for again.

        Raises:
            InvalidInput: the URL is none that can be used.
        """
        self._config = config
        self._doorbell = doorbell
        self._db = db
        self._poke_again_seconds = poke_again_seconds
        self._poke_every_seconds: float | None = None
        self._channel = f"{config.prefix}.hints"
        self._redis = connect(config)
        self._celery = Celery("batchctl", set_as_current=False)
        self._celery.conf.update(transport_settings(config))
        self._lock = threading.Lock()
        self._rung = False
        self._hints: set[tuple[Hint, BatchId]] = set()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._away = threading.Event()
        self._is_listening = False
        self._sender: threading.Thread | None = None
        self._listener: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Let the doorbell ring others too; nothing is connected before it does."""
        self._doorbell.connect(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Send what is due, where that is quick, and disconnect."""
        self._stopping.set()
        self._wake.set()
        for thread in (self._sender, self._listener):
            if thread is not None:
                thread.join(timeout=2 * _SOCKET_SECONDS)
        self._celery.close()
        self._redis.close()

    # --- what callers use: returns at once, never fails ---

    def ring(self) -> None:
        """Wake a worker for each queue that has work nobody was woken for lately."""
        with self._lock:
            self._rung = True
        self._send_soon()

    def hint(self, hint: Hint, batch_id: BatchId) -> None:
        """Tell the other processes that a look at a batch may be worth it."""
        with self._lock:
            self._hints.add((hint, batch_id))
        self._send_soon()

    def listen(self) -> None:
        """Begin to hear what others tell."""
        with self._lock:
            if self._listener is None and not self._stopping.is_set():
                self._listener = self._start(self._listen, "broker-listen")

    def poke_every(self, seconds: float) -> None:
        """Look for forgotten work at intervals, for a process that sweeps."""
        self._poke_every_seconds = seconds
        self.ring()

    @property
    def is_listening(self) -> bool:
        """Whether Redis is there and what others tell is heard."""
        return self._is_listening

    # --- sending ---

    def _start(self, target: Any, name: str) -> threading.Thread:  # noqa: ANN401
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def _send_soon(self) -> None:
        with self._lock:
            if self._sender is None and not self._stopping.is_set():
                self._sender = self._start(self._send, "broker-send")
        self._wake.set()

    def _send(self) -> None:
        while True:
            self._wake.wait(self._poke_every_seconds)
            self._wake.clear()
            with self._lock:
                hints, self._hints = self._hints, set()
                rung, self._rung = self._rung, False
            try:
                self._publish(hints)
                if rung or self._poke_every_seconds is not None:
                    self._poke()
            except _ERRORS as error:
                self._note_away(error)
            except StorageError as error:
                log.info("poke_failed", code=error.code)
            except Exception:  # noqa: BLE001  without this thread nobody would be woken
                log.exception("broker_failed")
            if self._stopping.wait(_MIN_PAUSE_SECONDS):  # rings in between become one
                return

    def _publish(self, hints: set[tuple[Hint, BatchId]]) -> None:
        for hint, batch_id in sorted(hints):
            self._redis.publish(self._channel, json.dumps({hint: batch_id}))

    def _poke(self) -> None:
        self._redis.ping()  # a unit that is marked as poked is left alone for a while
        self._note_there()
        for kind, model in units.poke_due(self._db, again_after_seconds=self._poke_again_seconds):
            name = _NAMES.get(kind)
            if name is None:
                continue
            queue, arguments = control_queue(self._config.prefix), []
            if kind is UnitKind.SHARD:
                if model is None:
                    continue
                queue, arguments = work_queue(self._config.prefix, model), [model]
            room = _MAX_QUEUED - int(self._redis.llen(queue))
            for _ in range(min(room, _MESSAGES.get(kind, 1))):
                self._celery.send_task(name, args=arguments, queue=queue, ignore_result=True)

    # --- listening ---

    def _listen(self) -> None:
        num_tries = 0
        while not self._stopping.is_set():
            try:
                self._hear()
                num_tries = 0
            except _ERRORS as error:
                if self._is_listening:
                    num_tries = 0
                self._is_listening = False
                self._note_away(error)
                self._stopping.wait(_RETRY_SECONDS[min(num_tries, len(_RETRY_SECONDS) - 1)])
                num_tries += 1
        self._is_listening = False

    def _hear(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=False) as subscription:
            subscription.subscribe(self._channel)
            while not self._stopping.is_set():
                # It sends a ping when nothing has come for a while, then one at each call.
                message = subscription.get_message(timeout=_LISTEN_SECONDS)
                if message is None:
                    # Else a connection whose other end is gone without a word is listened to for
                    # ever, by a worker that hardly polls while it believes to hear.
                    if subscription.health_check_response_counter > _MAX_UNANSWERED:
                        raise redis.ConnectionError("Redis answers no ping")
                    continue
                if message["type"] == "subscribe":
                    self._note_there()
                    self._is_listening = True
                elif message["type"] == "message":
                    self._pass_on(message["data"])

    def _pass_on(self, content: bytes | str) -> None:
        """Take a hint for what it is: words of somebody who can write to Redis."""
        for hint, batch_id in _parse_hints(content):
            try:
                self._doorbell.hint_here(hint, batch_id)
            except Exception:  # noqa: BLE001  a listener's fault is not the broker's
                log.exception("hint_failed", hint=hint)

    # --- whether it is there ---

    def _note_away(self, error: Exception) -> None:
        if not self._away.is_set():
            self._away.set()
            log.warning(
                "broker_away",
                url=self._config.shown_url,
                error=type(error).__name__,
                note="work goes on; workers look at the database instead",
            )

    def _note_there(self) -> None:
        if self._away.is_set():
            self._away.clear()
            log.info("broker_back", url=self._config.shown_url)


def _parse_hints(content: bytes | str) -> list[tuple[Hint, BatchId]]:
    if len(content) > _MAX_HINT_BYTES:
        return []
    try:
        told = json.loads(content)
    except ValueError:
        return []
    if not isinstance(told, Mapping):
        return []
    return [
        (Hint(name), BatchId(batch_id))
        for name, batch_id in told.items()
        if name in list(Hint) and isinstance(batch_id, str) and _BATCH_ID.fullmatch(batch_id)
    ]
