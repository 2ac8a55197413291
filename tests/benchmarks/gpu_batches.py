"""G1, G4, G5 and G6: whole batches and constraints on a device, as ratios; gpu.py runs them.

    G1  end to end over the bare engine, W1 and W2. The bare engine of vLLM is `vllm.LLM`, all
        prompts at once, which is what `vllm bench throughput` does; that of hf is the engine of
        this project, given a list
    G4  planned over as they arrive, W3, prefix caching on in both, with twice as many shared tokens
        as the cache holds; and the share of what could be saved that was
    G5  the engine never drained over one run for each shard, W7; and, with NVML, the share of time
        in which the device did nothing
    G6  held to a schema over free, W8, of which a good many are different

On the clock. On a GPU the first pair warms up and does not count.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from transformers import PreTrainedTokenizerFast

from engine.base import Engine
from engine.chat import PromptEncoder
from engine.config import EngineConfig, VllmConfig
from engine.registry import open_engine
from jobs.domain.request import Request
from jobs.domain.result import Result, Usage
from tests.benchmarks import workloads
from tests.benchmarks.local import ARRIVAL, open_local, requests_of
from tests.benchmarks.measuring import Row, pairs_of
from tests.sources import ListSource

ROWS = ("G1", "G4", "G5", "G6")
MODEL = "random"
_ANSWER = 16
_MEAN_SHARED = 800  # tokens of a beginning of W3, before it is scaled
_TOKENS_OF_BYTES = 2  # of single bytes there are so many for each token that a workload means
_TICK_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of each workload is run."""

    requests: int
    shrink: float
    slots: int
    context_tokens: int
    cache_tokens: int
    shard_lines: int
    num_shards: int
    num_constrained: int
    num_schemas: int
    num_pairs: int
    warms_up: bool


FULL = Sizes(
    requests=20_000,
    shrink=0.5,
    slots=256,
    context_tokens=8192,
    cache_tokens=131_072,
    shard_lines=1000,
    num_shards=10,
    num_constrained=1024,
    num_schemas=200,
    num_pairs=4,
    warms_up=True,
)
SMALL = Sizes(
    requests=24,
    shrink=0.1,
    slots=8,
    context_tokens=1024,
    cache_tokens=512,
    shard_lines=12,
    num_shards=2,
    num_constrained=8,
    num_schemas=4,
    num_pairs=2,
    warms_up=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What a run took on the clock, and what came out."""

    seconds: float
    usage: Usage
    idle: float | None = None

    @property
    def speed(self) -> float:
        """Answer tokens per second."""
        return self.usage.completion_tokens / self.seconds


def timed(run: Callable[[], Usage]) -> Timed:
    begin = time.perf_counter()
    with idling() as idle:
        usage = run()
        seconds = time.perf_counter() - begin
    return Timed(seconds=seconds, usage=usage, idle=statistics.mean(idle) if idle else None)


@contextmanager
def idling() -> Iterator[list[float]]:
    """Collect, where NVML tells it, which share of each moment the first device was idle."""
    found: list[float] = []
    ended = threading.Event()
    nvml: Any = None
    with suppress(ImportError):
        nvml = import_module("pynvml")

    def watch() -> None:
        with suppress(nvml.NVMLError):
            nvml.nvmlInit()
            device = nvml.nvmlDeviceGetHandleByIndex(0)
            while not ended.wait(_TICK_SECONDS):
                found.append(1 - nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)

    thread = threading.Thread(target=watch, name="nvml")
    if nvml is not None:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        if nvml is not None:
            thread.join()


class Batches:
    """The rows, for one engine and one model."""

    def __init__(self, config: EngineConfig, folder: Path, sizes: Sizes) -> None:
        self._config = config
        self._folder = folder
        self._sizes = sizes

    def measure(self, row: str) -> list[Row]:
        measures = {"G1": self.end_to_end, "G4": self.planned, "G5": self.never_drained}
        return measures[row]() if row in measures else self.constrained()

    def _pairs(
        self, first: Callable[[int], Timed], second: Callable[[int], Timed]
    ) -> list[tuple[Timed, Timed]]:
        pairs = pairs_of(first, second, num_pairs=self._sizes.num_pairs)
        return pairs[1:] if self._sizes.warms_up else pairs

    def end_to_end(self) -> list[Row]:
        """Return G1."""
        rows = []
        for name, make in (("W1", workloads.chat), ("W2", workloads.batch)):
            lines = list(make(self._sizes.requests, model=MODEL, shrink=self._sizes.shrink))
            if isinstance(self._config, VllmConfig):
                # Each holds the device's memory, so one comes after the other.
                bare = self._bare_vllm(lines)
                with open_local(self._config, model=MODEL) as local:
                    runs = [
                        timed(lambda: local.run(lines).usage)  # noqa: B023  called at once
                        for _ in range(self._sizes.num_pairs)
                    ]
                pairs = list(zip(bare, runs, strict=True))[self._sizes.warms_up :]
            else:
                with open_local(self._config, model=MODEL) as local:
                    pairs = self._pairs(
                        lambda _: timed(lambda: local.generate(lines).usage),  # noqa: B023
                        lambda _: timed(lambda: local.run(lines).usage),  # noqa: B023
                    )
            rows.append(
                Row(
                    id=f"G1 {name}",
                    what=f"end to end ÷ bare engine, {name}",
                    values=[whole.speed / alone.speed for alone, whole in pairs],
                    must=0.98,
                    goal=1.05,
                    note=f"{len(lines)} requests, {_speeds(pairs)} answer tokens per second",
                )
            )
        return rows

    def _bare_vllm(self, lines: Sequence[bytes]) -> list[Timed]:
        """Return what `vllm.LLM` takes for the same prompts, with the same options."""
        vllm: Any = import_module("vllm")
        config = self._config
        assert isinstance(config, VllmConfig)
        llm = vllm.LLM(
            model=config.model,
            dtype=config.dtype,
            max_model_len=config.context_tokens,
            max_num_seqs=config.slots,
            enable_prefix_caching=config.prefix_caching,
            enforce_eager=config.enforce_eager,
            gpu_memory_utilization=config.gpu_memory_utilization,
            **config.engine_args,
        )
        requests = requests_of(lines)
        prompts = [{"prompt_token_ids": tokens} for tokens in self._encode(requests)]
        sampling = [
            vllm.SamplingParams(
                temperature=0, max_tokens=one.sampling.max_tokens, ignore_eos=True, detokenize=True
            )
            for one in requests
        ]

        def run() -> Usage:
            said = llm.generate(prompts, sampling, use_tqdm=False)
            return Usage(completion_tokens=sum(len(one.outputs[0].token_ids) for one in said))

        try:
            return [timed(run) for _ in range(self._sizes.num_pairs)]
        finally:
            llm.llm_engine.engine_core.shutdown()

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self._folder)
        encoder = PromptEncoder(tokenizer, vocab_size=len(tokenizer))
        return [encoder.encode(request) for request in requests]

    def planned(self) -> list[Row]:
        """Return G4."""
        sizes = self._sizes
        shared = _MEAN_SHARED * sizes.shrink * _TOKENS_OF_BYTES
        num_groups = max(4, round(2 * sizes.cache_tokens / shared))

        def make(seed: int, salt: int) -> list[bytes]:
            return list(
                workloads.shared_prefix(
                    max(sizes.requests // 4, 6 * num_groups),
                    seed=seed,
                    salt=salt,
                    model=MODEL,
                    num_groups=num_groups,
                    shrink=sizes.shrink,
                    answer=_ANSWER,
                )
            )

        def saved(run: Timed, lines: Sequence[bytes]) -> float:
            prompts = self._encode(requests_of(lines))
            total = sum(map(len, prompts))
            return run.usage.cached_tokens / max(1, total - workloads.least_tokens(prompts))

        with open_local(self._config, model=MODEL) as local:
            pairs = self._pairs(
                lambda seed: timed(lambda: local.run(make(seed, 2)).usage),
                lambda seed: timed(lambda: local.run(make(seed, 1), limits=ARRIVAL).usage),
            )
        seeds = range(sizes.num_pairs)[sizes.warms_up :]
        note = (
            f"{num_groups} groups, {2 * sizes.cache_tokens} tokens in common, a cache of "
            f"{sizes.cache_tokens}; {_speeds([(b, a) for a, b in pairs])} answer tokens per second"
        )
        return [
            Row(
                id="G4",
                what="planned ÷ as they arrive, shared beginnings twice the cache",
                values=[planned.speed / arrived.speed for planned, arrived in pairs],
                must=1.5,
                goal=2.5,
                note=note,
            ),
            Row(
                id="G4 saved",
                what="prompt tokens saved ÷ those that could be",
                values=[
                    saved(planned, make(seed, 2))
                    for seed, (planned, _) in zip(seeds, pairs, strict=True)
                ],
                must=0.9,
                goal=0.98,
                exact=True,
                note=f"{note}; as they arrive "
                + ", ".join(
                    f"{saved(arrived, make(seed, 1)):.2f}"
                    for seed, (_, arrived) in zip(seeds, pairs, strict=True)
                ),
            ),
        ]

    def never_drained(self) -> list[Row]:
        """Return G5."""
        sizes = self._sizes
        num_lines = sizes.shard_lines * sizes.num_shards
        lines = list(
            workloads.heavy_tail(
                num_lines,
                model=MODEL,
                shrink=sizes.shrink / 4,
                cap=round(sizes.context_tokens / sizes.shrink),
            )
        )
        cut = [lines[at : at + sizes.shard_lines] for at in range(0, num_lines, sizes.shard_lines)]
        with open_local(self._config, model=MODEL) as local:

            def one_by_one() -> Usage:
                return sum((local.generate(shard).usage for shard in cut), Usage())

            pairs = self._pairs(
                lambda _: timed(lambda: local.run(lines).usage),
                lambda _: timed(one_by_one),
            )
        note = (
            f"W7, {sizes.num_shards} shards of {sizes.shard_lines}, {sizes.slots} slots; "
            f"{_speeds([(b, a) for a, b in pairs])} answer tokens per second"
        )
        rows = [
            Row(
                id="G5",
                what="never drained ÷ one run for each shard",
                values=[whole.speed / parts.speed for whole, parts in pairs],
                must=1.3,
                goal=2.0,
                note=note,
            )
        ]
        idle = [whole.idle for whole, _ in pairs if whole.idle is not None]
        if idle:
            rows.append(
                Row(
                    id="G5 idle",
                    what="share of time in which the device did nothing, planning included",
                    values=idle,
                    must=0.03,
                    goal=0.005,
                    unit="share",
                    less=True,
                    note=note,
                )
            )
        return rows

    def constrained(self) -> list[Row]:
        """Return G6."""
        sizes = self._sizes
        values: list[float] = []
        misfits = tokens = 0
        with closing(open_engine(self._config, model=MODEL)) as engine:
            for pair in range(sizes.num_pairs):
                asked = requests_of(
                    list(
                        workloads.schemas(
                            sizes.num_constrained, seed=pair, model=MODEL, shrink=sizes.shrink
                        )
                    )
                )
                held = [
                    replace(one, constraint=asked[number % sizes.num_schemas].constraint)
                    for number, one in enumerate(asked)
                ]
                took, results = generate(engine, held)
                free, _ = generate(engine, [_freed(one, results[one.id]) for one in held])
                assert free.usage.completion_tokens == took.usage.completion_tokens
                misfits += sum(one.constraint != "enforced" for one in results.values())
                tokens = took.usage.completion_tokens
                values.append(took.speed / free.speed)
        return [
            Row(
                id="G6",
                what=f"constrained ÷ free, {sizes.num_schemas} schemas",
                values=values[sizes.warms_up :],
                must=0.93,
                goal=0.98,
                note=f"W8, {sizes.num_constrained} requests, {tokens} tokens, {sizes.slots} slots; "
                f"{misfits} answers without full enforcement",
            )
        ]


def generate(engine: Engine, requests: Sequence[Request]) -> tuple[Timed, dict[int, Result]]:
    results: dict[int, Result] = {}

    def run() -> Usage:
        results.update((one.id, one) for one in engine.generate(ListSource(requests)))
        return sum((one.usage for one in results.values()), Usage())

    return timed(run), results


def _freed(request: Request, result: Result) -> Request:
    """Return the request without its constraint, for an answer as long as it had."""
    length = result.usage.completion_tokens
    sampling = replace(request.sampling, max_tokens=length, ignore_eos=True)
    return replace(request, constraint=None, sampling=sampling)


def _speeds(pairs: Sequence[tuple[Timed, Timed]]) -> str:
    first, second = ([pair[side].speed for pair in pairs] for side in (0, 1))
    return f"{statistics.median(first):.0f} and {statistics.median(second):.0f}"
