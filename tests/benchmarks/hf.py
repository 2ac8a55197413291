"""C7 and C9: the Hugging Face engine against one request at a time, and with a schema each.

C7 is the engine over `model.generate` on one prompt after the other, answers greedy and of exact
length, for the demo model and a random one of about 100 million parameters. C9 is answers held to
a schema, every schema different, over free answers of the same number of tokens: with a step for
each token, and without one for those that the schema leaves no choice about; each arm in a process
of its own. One torch thread, bfloat16; processor time of the process.
"""

import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import numpy as np
import torch
from msgspec.structs import replace
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from engine.chat import PromptEncoder
from engine.config import HfConfig
from engine.constraints import validate
from engine.demo import model_path
from engine.hf.engine import HfEngine
from engine.hf.tokens import constraint_tokenizer
from engine.matching import Masks, TokenizerConstraints
from jobs.domain.request import Request
from jobs.domain.result import Result
from tests.benchmarks import workloads
from tests.benchmarks.local import requests_of
from tests.benchmarks.measuring import Row, main, num_pairs_at, pairs_of, scaled
from tests.sources import ListSource

SLOTS = 32


def make_random_model(folder: Path) -> None:
    """Write a Llama of about 100 million random parameters with the demo model's tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=None,
        )
    )
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    cpu: float
    tokens: int

    @property
    def speed(self) -> float:
        return self.tokens / self.cpu


def open_engine(folder: Path, *, is_skipping: bool = False) -> HfEngine:
    """Return the engine over a model.

    Args:
        is_skipping: whether it takes no step for a token that a schema leaves no choice about.
    """
    return HfEngine(
        HfConfig(
            model=str(folder),
            slots=SLOTS,
            num_blocks=2048,
            device="cpu",
            forced_tokens=is_skipping,
        )
    )


def run_in(engine: HfEngine, requests: Sequence[Request]) -> tuple[Took, list[Result]]:
    start = time.process_time()
    results = list(engine.generate(ListSource(requests)))
    spent = time.process_time() - start
    return Took(cpu=spent, tokens=sum(r.usage.completion_tokens for r in results)), results


class Arms:
    """A model in the engine, and by itself."""

    def __init__(self, folder: Path) -> None:
        self._engine = open_engine(folder)
        self._alone: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._alone.generation_config.eos_token_id = None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self._encoder = PromptEncoder(tokenizer, vocab_size=len(tokenizer))

    def run(self, requests: Sequence[Request]) -> Took:
        return run_in(self._engine, requests)[0]

    @torch.inference_mode()
    def run_alone(self, requests: Sequence[Request]) -> Took:
        tokens = 0
        start = time.process_time()
        for request in requests:
            given = torch.tensor([self._encoder.encode(request)])
            said = self._alone.generate(
                given,
                attention_mask=torch.ones_like(given),
                generation_config=GenerationConfig(
                    max_new_tokens=request.sampling.max_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                ),
            )
            tokens += said.shape[1] - given.shape[1]
        return Took(cpu=time.process_time() - start, tokens=tokens)


def batched(arms: Arms, name: str, *, num_requests: int, shrink: float, num_pairs: int) -> Row:
    """Return C7 for one model."""
    asked = requests_of(list(workloads.chat(num_requests, shrink=shrink)))
    arms.run(asked[:4])
    pairs = pairs_of(
        lambda _: arms.run(asked),
        lambda _: arms.run_alone(asked),
        num_pairs=num_pairs,
    )
    for together, alone in pairs:
        assert together.tokens == alone.tokens
    speed = sorted(together.tokens / together.cpu for together, _ in pairs)[len(pairs) // 2]
    return Row(
        id=f"C7 {name}",
        what=f"hf engine ÷ one at a time, {name}",
        values=[alone.cpu / together.cpu for together, alone in pairs],
        must=4,
        goal=7,
        note=f"W1 x {shrink}, {num_requests} requests, {pairs[0][0].tokens} answer tokens, {SLOTS} "
        f"slots, {speed:.0f} tokens per second of processor time",
    )


_ENGINE: list[HfEngine] = []
"""The engine of an arm's process."""


def _open_arm(folder: Path, is_skipping: bool) -> None:  # noqa: FBT001 -- initargs has no names
    torch.set_num_threads(1)
    _ENGINE.append(open_engine(folder, is_skipping=is_skipping))


def _run_arm(requests: Sequence[Request]) -> tuple[Took, list[Result]]:
    return run_in(_ENGINE[0], requests)


class _Timed:
    """A matcher of llguidance that adds up the processor time of what is asked of it."""

    spent_ns = 0

    def __init__(self, make: Callable[[], Any]) -> None:
        self._native = self._time(make)

    def deep_copy(self) -> "_Timed":
        return _Timed(self._native.deep_copy)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._time, getattr(self._native, name))

    @staticmethod
    def _time(call: Callable[..., Any], *given: object) -> Any:  # noqa: ANN401 -- the library's
        start = time.thread_time_ns()
        try:
            return call(*given)
        finally:
            _Timed.spent_ns += time.thread_time_ns() - start


def _time_library(requests: Sequence[Request]) -> tuple[float, float]:
    """Return the seconds of constrained answers that llguidance takes by itself, and all."""
    new = TokenizerConstraints._new  # noqa: SLF001 -- all of the library goes through it
    with patch.object(TokenizerConstraints, "_new", lambda *given: _Timed(partial(new, *given))):
        took, _ = _run_arm(requests)
    return _Timed.spent_ns / 1e9, took.cpu


class Pair:
    """Constrained answers and free ones, each engine in a process of its own.

    In one process the second to come finds what the first has left: kernels compiled for steps of
    just these sizes, and memory in pieces that fit. That is worth a tenth.
    """

    def __init__(self, folder: Path, *, is_skipping: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._held, self._free = (
            ProcessPoolExecutor(1, context, initializer=_open_arm, initargs=(folder, skips))
            for skips in (is_skipping, False)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.shutdown()
        self._free.shutdown()

    def compare(self, *, seed: int, num_requests: int) -> tuple[float, int, int]:
        """Return the speed of constrained answers over that of free ones of the same lengths.

        Every schema is new to the engine, as in a batch where all differ, and so is every prompt.

        Returns:
            the ratio, how many tokens each arm said, and how many answers do not fit their schema.
        """
        held, alike = (_asked(num_requests, seed=seed, salt=salt) for salt in (1, 2))
        took, results = self._held.submit(_run_arm, held).result()
        lengths = {result.id: result.usage.completion_tokens for result in results}
        free = [
            replace(
                request,
                constraint=None,
                sampling=replace(request.sampling, max_tokens=lengths[request.id], ignore_eos=True),
            )
            for request in alike
        ]
        free_took, _ = self._free.submit(_run_arm, free).result()
        assert free_took.tokens == took.tokens
        return took.speed / free_took.speed, took.tokens, num_misfits(held, results)

    def library_share(self, *, seed: int, num_requests: int) -> float:
        """Return the share of a constrained arm's time that llguidance takes by itself."""
        asked = _asked(num_requests, seed=seed, salt=1)
        library, everything = self._held.submit(_time_library, asked).result()
        return library / everything


def _asked(num_requests: int, *, seed: int, salt: int) -> list[Request]:
    return requests_of(list(workloads.schemas(num_requests, seed=seed, salt=salt, shrink=0.5)))


def constrained(
    folder: Path,
    name: str,
    *,
    num_requests: int,
    num_starts: int = 1,
    num_pairs: int,
    is_skipping: bool,
) -> Row:
    """Return C9 for one model: with a step for every token, or without one for those forced.

    Args:
        num_starts: how many processes each arm has, one after the other. Where a process finds
            its memory is luck for as long as it lives: a few percent of a small model's steps.
    """
    pairs: list[tuple[float, int, int]] = []
    for start in range(num_starts):
        with Pair(folder, is_skipping=is_skipping) as arms:
            arms.compare(seed=999, num_requests=num_requests)  # touches the cache's memory
            seeds = range(start * num_pairs, (start + 1) * num_pairs)
            pairs += [arms.compare(seed=seed, num_requests=num_requests) for seed in seeds]
            share = arms.library_share(seed=998, num_requests=num_requests)
    what = f"constrained ÷ free, every schema different, {name}"
    note = (
        f"W8, {num_requests} requests, {pairs[0][1]} tokens, {SLOTS} slots; "
        f"{sum(num for _, _, num in pairs)} misfits; {share:.1%} of the constrained arm are calls "
        "of llguidance"
    )
    return Row(
        id=f"C9 skipped {name}" if is_skipping else f"C9 {name}",
        what=f"{what}, forced tokens skipped" if is_skipping else what,
        values=[ratio for ratio, _, _ in pairs],
        must=0.93,
        goal=1.1 if is_skipping else 0.98,
        note=f"{note}; no step for a token that the schema leaves no choice about"
        if is_skipping
        else note,
    )


def num_misfits(asked: Sequence[Request], results: Sequence[Result]) -> int:
    constraints = {request.id: request.constraint for request in asked}
    found = 0
    for result in results:
        constraint = constraints[result.id]
        assert constraint is not None
        is_good = result.constraint == "enforced" and not validate(constraint, result.text or "")
        found += not is_good
    return found


def masks(num_requests: int, num_walks: int) -> Row:
    """Return the time of the slowest masks: random walks through W8, every schema different."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    made = TokenizerConstraints(
        constraint_tokenizer(
            tokenizer, vocab_size=len(tokenizer), eos_tokens=(tokenizer.eos_token_id,)
        )
    )
    room = Masks(1, made.num_words)
    slowest: list[float] = []
    for walk in range(num_walks):
        spent: list[int] = []
        rng = random.Random(walk)
        for request in requests_of(list(workloads.schemas(num_requests, seed=500 + walk))):
            assert request.constraint is not None
            matcher, _ = made.matcher(request.constraint)
            while not matcher.is_finished():
                start = time.thread_time_ns()
                room.begin([matcher])
                spent.append(time.thread_time_ns() - start)
                words, _, known = room.take()
                bits = np.unpackbits(words.view(np.uint8), bitorder="little")
                if not matcher.advance(rng.choice([*known.values()] or np.flatnonzero(bits))):
                    break
        spent.sort()
        slowest.append(spent[len(spent) * 99 // 100] / 1e3)
    return Row(
        id="C9 mask",
        what="processor time of a mask, 99th percentile",
        values=slowest,
        must=1000,
        goal=200,
        unit="us",
        less=True,
        note=f"random walks through W8, {num_requests} schemas, all different, one thread, "
        f"vocabulary of {len(tokenizer)} tokens",
    )


def measure(size: float) -> list[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_random_model(Path(folder))
        large, name = Path(folder), "100M parameters"
        num_requests, num_pairs = scaled(48, math.sqrt(size), least=4), num_pairs_at(3, size)
        return [
            batched(
                Arms(model_path()),
                "demo model",
                num_requests=scaled(128, size, least=8),
                shrink=0.3,
                num_pairs=num_pairs_at(3, size),
            ),
            batched(Arms(large), name, num_requests=num_requests, shrink=0.2, num_pairs=num_pairs),
            masks(scaled(200, size, least=20), num_pairs_at(5, size)),
            *(
                constrained(
                    model_path(),
                    "demo model",
                    num_requests=scaled(64, size, least=8),
                    num_starts=num_pairs_at(4, size),
                    num_pairs=num_pairs_at(5, size),  # of seconds each, in which a machine varies
                    is_skipping=is_skipping,
                )
                for is_skipping in (False, True)
            ),
            *(
                constrained(
                    large,
                    name,
                    num_requests=num_requests,
                    num_pairs=num_pairs,
                    is_skipping=is_skipping,
                )
                for is_skipping in (False, True)
            ),
        ]


if __name__ == "__main__":
    main(measure)
