"""AsyncLLM in a thread of its own, with what its processes say kept for when one of them ends."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from engine.tuning import Fitting
from engine.vllm import startup
from jobs.domain.errors import EngineDied, EngineMisconfigured, EngineOutOfMemory

_CLOSE_SECONDS = 20.0


class StepCounter(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is not where mypy runs
    """Counts vLLM's steps; stands where its Prometheus metrics would, which nobody reads here.

    Attributes:
        fitting: what the cache has been seen to hold.
    """

    def __init__(self, vllm_config: Any, engine_indexes: object = None) -> None:  # noqa: ANN401
        """Begin with no steps."""
        del engine_indexes
        self.count = 0
        self.fitting = Fitting(int(vllm_config.scheduler_config.max_num_seqs))

    def record(
        self,
        scheduler_stats: Any = None,  # noqa: ANN401 -- vLLM's
        iteration_stats: Any = None,  # noqa: ANN401
        *_: object,
        **__: object,
    ) -> None:
        """Note a step."""
        self.count += 1
        if scheduler_stats is not None:
            # What was preempted is computed again from the start.
            self.fitting.note(
                num_running=int(scheduler_stats.num_running_reqs),
                num_evicted=int(getattr(iteration_stats, "num_preempted_reqs", 0)),
            )

    def log(self) -> None:
        """Say nothing."""

    def log_engine_initialized(self) -> None:
        """Say nothing."""

    def record_sleep_state(self, *_: object) -> None:
        """Note nothing."""

    def record_admission_rejection(self, *_: object) -> None:
        """Note nothing."""


class Host:
    """vLLM, started by its arguments and ended by `close`.

    Attributes:
        loop: its event loop, which runs in the thread "vllm-loop".
        steps: None until it is open.
    """

    def __init__(self, wanted: Any, *, model: str) -> None:  # noqa: ANN401 -- AsyncEngineArgs
        """Start vLLM and load the model.

        Args:
            model: what messages call it.

        Raises:
            EngineMisconfigured: the model cannot be loaded as configured.
            EngineOutOfMemory: it does not fit.
        """
        self.steps: StepCounter | None = None
        self._stderr = startup.StandardError()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="vllm-loop", daemon=True)
        self._thread.start()
        self._llm: AsyncLLM | None = None
        try:
            with self._stderr.inherited():
                self._llm = asyncio.run_coroutine_threadsafe(self._open(wanted), self.loop).result()
        except Exception as error:
            said = self._stderr.text(wait_seconds=2.0)
            self.close()
            raise startup.explain(error, said, model=model) from error

    @property
    def llm(self) -> AsyncLLM:
        """What answers.

        Raises:
            EngineMisconfigured: it is closed.
        """
        if self._llm is None:
            raise EngineMisconfigured("The engine is closed.")
        return self._llm

    @property
    def num_steps(self) -> int:
        """How many steps vLLM has made; any thread may ask."""
        return self.steps.count if self.steps is not None else 0

    def close(self) -> None:
        """End vLLM's processes; may be called twice."""
        if self.loop.is_closed():
            return
        llm, self._llm = self._llm, None
        # Its reader of outputs first: it would report the end of vLLM's processes as a failure.
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(_CLOSE_SECONDS)
        if llm is not None:
            llm.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self.loop.close()

    def cancel(self, tasks: "Sequence[asyncio.Task[Any]]") -> None:
        """Make vLLM drop requests, and wait until it knows."""
        if tasks and not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(_cancel(tasks), self.loop).result(_CLOSE_SECONDS)

    @contextmanager
    def watching(self, live: "dict[int, Any]") -> Iterator[None]:
        """Turn the end of vLLM's engine into what it means for the requests that it had.

        Raises:
            EngineDied: it ended; `suspects` are those in `live`.
            EngineOutOfMemory: it ended because memory ran out.
        """
        try:
            yield
        except EngineDeadError as error:
            said = self._stderr.text(wait_seconds=1.0)
            if startup.ran_out_of_memory(said):
                raise EngineOutOfMemory(
                    f"The device ran out of memory with {len(live)} requests; lower slots, "
                    "batch_tokens or gpu_memory_utilization."
                ) from error
            raise EngineDied(
                f"vLLM's engine ended with {len(live)} requests in flight"
                f"{startup.last_reason(said)}.",
                suspects=frozenset(live),
            ) from error

    async def _open(self, wanted: Any) -> AsyncLLM:  # noqa: ANN401 -- AsyncEngineArgs
        llm = AsyncLLM.from_engine_args(wanted, stat_loggers=[StepCounter])
        loggers = llm.logger_manager.stat_loggers if llm.logger_manager is not None else []
        self.steps = next((one for one in loggers if isinstance(one, StepCounter)), None)
        return llm


async def _cancel(tasks: "Sequence[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _cancel_all() -> None:
    await _cancel([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])
