"""A vLLM server or any other with OpenAI's API behind the Engine protocol; needs no torch."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Coroutine, Generator, Iterator
from typing import Any, TypeVar

import xxhash

from engine import openai_api
from engine.base import Source
from engine.config import RemoteConfig
from engine.sampling import resolve_sampling
from engine.traffic import Traffic
from engine.tuning import Tuning
from jobs.domain.errors import BatchctlError, EngineMisconfigured
from jobs.domain.request import (
    CONSTRAINT_KINDS,
    ENDPOINTS,
    PARAMETERS,
    Capabilities,
    Request,
    SamplingParams,
)
from jobs.domain.result import Result

_T = TypeVar("_T")

_UNKNOWN_CONTEXT_TOKENS = 2**31 - 1
_WAIT_SECONDS = 0.1
_STARVED_SECONDS = 0.005
_ABORT_SECONDS = 0.1
_CALL_SECONDS = 60.0


class RemoteEngine:
    """Asks one server; its event loop has a thread of its own, and is never seen outside."""

    def __init__(self, config: RemoteConfig, *, model: str) -> None:
        """Prepare; the server is called with the first request.

        Args:
            model: the name clients use, and the server too unless `served_model` says otherwise.

        Raises:
            EngineMisconfigured: the environment's proxy or certificates are unusable.
        """
        self._config = config
        self._model = model
        self._arrived: queue.SimpleQueue[Result | BatchctlError] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._traffic = Traffic(config, model=config.served_model or model, emit=self._arrived.put)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="engine-remote", daemon=True
        )
        self._thread.start()
        self._counts = True
        try:
            self._call(self._open())
        except BaseException:
            self._end_loop()
            raise

    @property
    def capabilities(self) -> Capabilities:
        """What the server's model is taken to be able to do: everything that is understood."""
        return describe_remote(self._config, self._model)

    @property
    def num_slots(self) -> int:
        """How many requests are out at once, at most."""
        return self._config.slots

    @property
    def tuning(self) -> Tuning | None:
        """Nothing is chosen here."""
        return None

    def progress(self) -> int:
        """Return a number that grows with bytes and results.

        It also grows while requests wait: each of them has a time-out, and all of them the
        patience with the server, so that no wait is for ever.
        """
        return self._traffic.progress

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters, without the server's own defaults."""
        return resolve_sampling(request, self._config.defaults, None)

    def count_tokens(self, request: Request) -> int:
        """Return the number of prompt tokens; an estimate where the server does not count."""
        if self._counts:
            count = self._call(self._traffic.count_tokens(request))
            if count is not None:
                return count
            self._counts = False
        return openai_api.estimate_tokens(request)

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish.

        Raises:
            EngineMisconfigured: the server cannot be used as configured.
            EngineUnavailable: it has answered nothing for longer than `patience_seconds`.
        """
        if self._loop.is_closed():
            raise EngineMisconfigured("The engine is closed.")
        held: set[int] = set()
        look_at = time.monotonic() + _ABORT_SECONDS
        try:
            while True:
                free = self._traffic.room(len(held))
                taken = source.take(free) if free > 0 else ()
                if taken is None and not held:
                    return
                if taken:
                    held.update(request.id for request in taken)
                    self._loop.call_soon_threadsafe(self._traffic.submit, list(taken))
                is_starved = free > 0 and not taken
                for result in self._receive(_STARVED_SECONDS if is_starved else _WAIT_SECONDS):
                    if result.id in held:
                        held.discard(result.id)
                        yield result
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + _ABORT_SECONDS
                    self._drop_aborted(held, source)
        finally:
            if held and not self._loop.is_closed():
                self._call(self._traffic.abandon())
            # What arrived in between belongs to nobody: the next run may use the ids again.
            while not self._arrived.empty():
                self._arrived.get_nowait()

    def close(self) -> None:
        """Close every connection; may be called twice."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            self._call(self._traffic.close())
        self._end_loop()

    async def _open(self) -> None:
        self._traffic.open()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS)

    def _receive(self, seconds: float) -> Iterator[Result]:
        """Yield the results that are there, after waiting for the first of them so long at most.

        Raises:
            BatchctlError: what ended the work.
        """
        try:
            arrived = self._arrived.get(timeout=seconds)
            while True:
                if isinstance(arrived, BatchctlError):
                    raise arrived
                yield arrived
                arrived = self._arrived.get_nowait()
        except queue.Empty:
            return

    def _drop_aborted(self, held: set[int], source: Source) -> None:
        aborted = [one for one in held if source.is_aborted(one)]
        if aborted:
            held.difference_update(aborted)
            self._loop.call_soon_threadsafe(self._traffic.abort, aborted)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def describe_remote(config: RemoteConfig, model: str) -> Capabilities:
    """Return what a remote model is taken to be able to do; calls nobody.

    The server judges what nobody can know here: how long a prompt may be, which parameters it
    obeys. Constraints are all there, because answers are validated in every case.
    """
    served = config.served_model or model
    digest = xxhash.xxh3_128(f"{openai_api.base_url(config.url)}\0{served}\0".encode())
    digest.update(
        config.model_dump_json(
            include={"context_tokens", "native_constraints", "defaults", "asking"}
        ).encode()
    )
    return Capabilities(
        model=model,
        engine="remote",
        endpoints=ENDPOINTS,
        context_tokens=config.context_tokens or _UNKNOWN_CONTEXT_TOKENS,
        constraints=CONSTRAINT_KINDS,
        parameters=PARAMETERS,
        constraint_backend=config.asking.backend,
        refuses_unenforceable=config.asking.on_unsupported_schema == "refuse",
        fingerprint=f"remote-{digest.hexdigest()}",
        is_greedy=config.defaults.temperature == 0,
        takes_images=True,
    )
