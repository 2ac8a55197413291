"""C7 and C9: the Hugging Face engine against one request at a time, and with a schema each.

C7 is the engine over `model.generate` on one prompt after the other, answers greedy and of exact
length, for the demo model and a random one of about 100 million parameters. C9 is answers held to
a schema, every schema different, over free answers of the same number of tokens: with a step for
each token, and without one for those that the schema leaves no choice about. One torch thread,
bfloat16; processor time of the process.
"""

import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class Arms:
    """A model in the engine, and by itself."""

    def __init__(self, folder: Path) -> None:
        self._stepping, self._skipping = (
            HfEngine(
                HfConfig(
                    model=str(folder),
                    slots=SLOTS,
                    num_blocks=2048,
                    device="cpu",
                    forced_tokens=is_skipping,
                )
            )
            for is_skipping in (False, True)
        )
        self._alone: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._alone.generation_config.eos_token_id = None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self._encoder = PromptEncoder(tokenizer, vocab_size=len(tokenizer))

    def run(
        self, requests: Sequence[Request], *, is_skipping: bool = False
    ) -> tuple[Took, list[Result]]:
        engine = self._skipping if is_skipping else self._stepping
        start = time.process_time()
        results = list(engine.generate(ListSource(requests)))
        spent = time.process_time() - start
        return Took(cpu=spent, tokens=sum(r.usage.completion_tokens for r in results)), results

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
        lambda _: arms.run(asked)[0],
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


def constrained(arms: Arms, name: str, *, num_requests: int, num_pairs: int) -> list[Row]:
    """Return C9 for one model: with a step for every token, and without one for those forced."""
    values, skipping, tokens, misfits = [], [], [], 0
    warm = requests_of(list(workloads.schemas(4, seed=999)))
    arms.run(warm)
    arms.run(warm, is_skipping=True)
    for pair in range(num_pairs):
        # Every schema is new to the engine, as in a batch where all differ, and so is every prompt.
        held, alike = (
            requests_of(list(workloads.schemas(num_requests, seed=pair, salt=salt, shrink=0.5)))
            for salt in (1, 2)
        )
        # Neither arm always goes first: what comes first gives the lengths, and finds the caches
        # of the processor as the other model left them.
        took, results = arms.run(held, is_skipping=pair % 2 == 1)
        lengths = {result.id: result.usage.completion_tokens for result in results}
        free_took, _ = arms.run(
            [
                replace(
                    request,
                    constraint=None,
                    sampling=replace(
                        request.sampling, max_tokens=lengths[request.id], ignore_eos=True
                    ),
                )
                for request in alike
            ]
        )
        assert free_took.tokens == took.tokens
        other_took, others = arms.run(held, is_skipping=pair % 2 == 0)
        misfits += num_misfits(held, results) + num_misfits(held, others)
        stepping, quick = (took, other_took) if pair % 2 == 0 else (other_took, took)
        values.append(stepping.speed / free_took.speed)
        skipping.append(quick.speed / free_took.speed)
        tokens.append(took.tokens)
    note = f"W8, {num_requests} requests, {tokens[0]} tokens, {SLOTS} slots; {misfits} misfits"
    what = f"constrained ÷ free, every schema different, {name}"
    return [
        Row(id=f"C9 {name}", what=what, values=values, must=0.93, goal=0.98, note=note),
        Row(
            id=f"C9 skipped {name}",
            what=f"{what}, forced tokens skipped",
            values=skipping,
            must=0.93,
            goal=1.1,
            note=f"{note}; no step for a token that the schema leaves no choice about",
        ),
    ]


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
                bits = np.unpackbits(room.take().view(np.uint8), bitorder="little")
                if not matcher.advance(rng.choice(np.flatnonzero(bits).tolist())):
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
    demo = Arms(model_path())
    rows = [
        batched(
            demo,
            "demo model",
            num_requests=scaled(128, size, least=8),
            shrink=0.3,
            num_pairs=num_pairs_at(3, size),
        ),
        *constrained(
            demo,
            "demo model",
            num_requests=scaled(64, size, least=8),
            num_pairs=num_pairs_at(5, size),
        ),
        masks(scaled(200, size, least=20), num_pairs_at(5, size)),
    ]
    del demo
    with tempfile.TemporaryDirectory() as folder:
        make_random_model(Path(folder))
        large, name = Arms(Path(folder)), "100M parameters"
        num_requests, num_pairs = scaled(48, math.sqrt(size), least=4), num_pairs_at(3, size)
        rows += [
            batched(large, name, num_requests=num_requests, shrink=0.2, num_pairs=num_pairs),
            *constrained(large, name, num_requests=num_requests, num_pairs=num_pairs),
        ]
    return rows


if __name__ == "__main__":
    main(measure)
