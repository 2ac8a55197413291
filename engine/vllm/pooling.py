"""Embeds and scores texts with an encoder in vLLM.

    take -> encode -> one task per sequence -> vLLM's scheduler and model -> Result

Vectors are cut, compared and written as the hf engine does it.
"""

import queue
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.inputs import tokens_input
from vllm.pooling_params import PoolingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from engine.ahead import drain
from engine.base import Source
from engine.config import VllmConfig
from engine.encoders import is_scoring
from engine.pooled import Held, Part, Parting, PoolingEngine
from engine.registry import describe_model, find_folder
from engine.vllm import arguments
from engine.vllm.hosting import Host
from engine.vllm.tokenizers import load_tokenizer
from jobs.domain.request import Capabilities, Request
from jobs.domain.result import LineError, Result

if TYPE_CHECKING:
    import asyncio

    import numpy as np
    from numpy.typing import NDArray

_IDLE_SECONDS = 0.002
_FULL_SECONDS = 0.05

_AHEAD = 3

_Events = queue.SimpleQueue[tuple[Part, "asyncio.Task[NDArray[np.float32]]"]]


class _Live:
    """A request of which vLLM has sequences, or will have."""

    __slots__ = ("held", "tasks")

    def __init__(self, held: Held) -> None:
        self.held = held
        self.tasks: list[asyncio.Task[NDArray[np.float32]]] = []


class VllmPoolingEngine(PoolingEngine):
    """An encoder in vLLM that works on `num_slots` sequences at once."""

    def __init__(self, config: VllmConfig, *, model: str | None = None) -> None:
        """Start vLLM and load the model.

        Args:
            model: the name clients use; unset, the configuration's.

        Raises:
            EngineMisconfigured: the model cannot be loaded as configured.
            EngineOutOfMemory: it does not fit.
        """
        capabilities = describe_model(config, model or config.model)
        folder = find_folder(config)
        wanted = arguments.pooling_arguments(config, folder)
        arguments.check_weights(config, wanted)
        backend = load_tokenizer(config, folder).backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._scores = is_scoring(arguments.read_object(folder / "config.json"))
        self._host = Host(wanted, model=config.model)
        described = self._host.llm.vllm_config
        self._num_slots = int(described.scheduler_config.max_num_seqs)
        self._capabilities = msgspec.structs.replace(capabilities, num_slots=self._num_slots)
        self._parting = Parting(
            backend,
            scores=self._scores,
            context_tokens=int(described.model_config.max_model_len),
            vocab_size=int(described.model_config.get_vocab_size()),
        )
        self._num_done = 0

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""
        return self._capabilities

    @property
    def num_slots(self) -> int:
        """How many sequences are worked on at once, at most."""
        return self._num_slots

    def progress(self) -> int:
        """Return the number of vLLM's steps and of sequences so far; any thread may ask."""
        return self._num_done + self._host.num_steps

    def close(self) -> None:
        """End vLLM's processes; may be called twice."""
        self._host.close()

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish.

        Raises:
            EngineDied: vLLM ended; `suspects` were in its hands.
            EngineOutOfMemory: it ended because memory ran out.
        """
        llm = self._host.llm
        live: dict[int, _Live] = {}
        try:
            with self._host.watching(live):
                yield from self._run(source, llm, live)
        finally:
            self._drop(list(live), live)

    def _run(self, source: Source, llm: AsyncLLM, live: dict[int, _Live]) -> Generator[Result]:
        events: _Events = queue.SimpleQueue()
        waiting: deque[Part] = deque()
        num_inside = 0
        is_open = True
        while is_open or live:
            if is_open and len(waiting) < self._num_slots:
                taken = source.take(self._num_slots)
                is_open = taken is not None
                yield from self._accept(taken or (), live, waiting)
            self._drop([n for n in live if source.is_aborted(n)], live)
            num_inside += self._admit(llm, live, waiting, events, num_inside)
            if num_inside:
                ended = drain(events, _FULL_SECONDS)
                num_inside -= len(ended)
                for part, task in ended:
                    result = self._end(part, task, live)
                    if result is not None:
                        yield result
            elif is_open:
                time.sleep(_IDLE_SECONDS)

    def _accept(
        self, taken: Sequence[Request], live: dict[int, _Live], waiting: deque[Part]
    ) -> Generator[Result]:
        """Note what is to run; yield results of what cannot."""
        for request in taken:
            parts = self._parting.encode(request)
            if isinstance(parts, Result):
                yield parts
            else:
                live[request.id] = _Live(parts[0].held)
                waiting += parts

    def _admit(
        self,
        llm: AsyncLLM,
        live: dict[int, _Live],
        waiting: deque[Part],
        events: _Events,
        num_inside: int,
    ) -> int:
        """Give vLLM more than it works on, so that it never waits for us; return how much."""
        num_started = 0
        while waiting and num_inside + num_started < _AHEAD * self._num_slots:
            part = waiting.popleft()
            found = live.get(part.held.request_id)
            if found is not None:
                self._host.loop.call_soon_threadsafe(self._start, part, llm, found, events)
                num_started += 1
        return num_started

    def _end(
        self, part: Part, task: "asyncio.Task[NDArray[np.float32]]", live: dict[int, _Live]
    ) -> Result | None:
        """Take what became of a sequence; return the result of its request if that is all."""
        held = part.held
        self._num_done += 1
        if held.request_id not in live or task.cancelled():
            return None
        error = task.exception()
        if isinstance(error, EngineDeadError):
            raise error
        if error is not None:
            self._drop([held.request_id], live)
            return _failed(held, error)
        if not held.receive(part.number, task.result()):
            return None
        del live[held.request_id]
        return self._parting.conclude(held)

    def _drop(self, dropped: Sequence[int], live: dict[int, _Live]) -> None:
        self._host.cancel([task for n in dropped for task in live.pop(n).tasks])

    # --- in the loop's thread ---

    def _start(self, part: Part, llm: AsyncLLM, live: _Live, events: _Events) -> None:
        task = self._host.loop.create_task(self._serve(part, llm))
        task.add_done_callback(lambda ended: events.put((part, ended)))
        live.tasks.append(task)

    async def _serve(self, part: Part, llm: AsyncLLM) -> "NDArray[np.float32]":
        params = PoolingParams(task="classify" if self._scores else "embed")
        if any(part.types):
            # Where the text begins behind its query, which is all that vLLM asks for.
            params.extra_kwargs = {"compressed_token_type_ids": part.types.index(1)}
        made: Any = None
        async for output in llm.encode(
            tokens_input(part.ids), params, f"{part.held.request_id}-{part.number}"
        ):
            made = output.outputs.data
        vector: NDArray[np.float32] = made.float().reshape(-1).numpy()
        return vector


def _failed(held: Held, error: BaseException) -> Result:
    return Result(
        id=held.request_id,
        error=LineError(
            code="engine_error",
            message=f"vLLM refused the request ({type(error).__name__}).",
            status_code=500,
        ),
    )
