"""The Hugging Face engine against one request at a time by `model.generate`.

    python tests/benchmarks/hf.py [--model FOLDER] [--requests 64] [--pairs 3] [--json FILE]

Prompts of 8 to 256 tokens and answers of 8 to 128, both log-uniform, greedy, exact lengths, 32
slots, bfloat16, one torch thread. Pairs of both are interleaved; what counts is the CPU time of
the process, since a shared machine's clock lies. Then the same prompts with a schema on each
answer, every schema different, against free answers of the same number of tokens. Without
--model: the demo model where it is, and a random one of about 100 million parameters.
"""

import argparse
import gc
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from engine.config import HfConfig
from engine.hf.engine import HfEngine
from jobs.domain.request import Constraint, Request, SamplingParams
from tests.sources import ListSource

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo" / "model"


def make_workload(num_requests: int, vocab_size: int) -> list[tuple[tuple[int, ...], int]]:
    """Return prompts and the lengths of their answers."""
    rng = random.Random(1)

    def draw(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    return [
        (
            tuple(rng.randrange(vocab_size // 2, vocab_size) for _ in range(draw(8, 256))),
            draw(8, 128),
        )
        for _ in range(num_requests)
    ]


def make_random_model(folder: Path) -> None:
    """Write a Llama of 100 million random parameters and a tokenizer of single bytes."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # noqa: S106 -- no password
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
            max_position_embeddings=1024,
            eos_token_id=fast.eos_token_id,
            bos_token_id=None,
            pad_token_id=None,
        )
    )
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def _byte_vocabulary() -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {letter: place for place, letter in enumerate(alphabet)}


def make_schemas(num_requests: int, *, first: int = 0) -> list[Constraint]:
    """Return schemas that are all different and hold about 30 to 60 tokens of JSON."""
    return [
        Constraint(
            "json_schema",
            json.dumps(
                {
                    "type": "object",
                    "properties": {
                        f"name_{i}": {"type": "string", "pattern": "^[a-z]{12,20}$"},
                        "kind": {"enum": [f"alpha{i}", f"beta{i}"]},
                        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
                        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
                    },
                    "required": [f"name_{i}", "kind", "count", "tags"],
                    "additionalProperties": False,
                }
            ),
        )
        for i in range(first, first + num_requests)
    ]


def measure(folder: Path, *, num_requests: int, num_pairs: int) -> dict[str, object]:
    """Return the ratios for one model."""
    engine = HfEngine(HfConfig(model=str(folder), slots=32, num_blocks=640, device="cpu"))
    alone: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    alone.generation_config.eos_token_id = None
    workload = make_workload(num_requests, alone.config.vocab_size)
    num_tokens = sum(length for _, length in workload)

    def run_engine(requests: Sequence[Request]) -> tuple[float, int]:
        start = time.process_time()
        said = sum(r.usage.completion_tokens for r in engine.generate(ListSource(requests)))
        return time.process_time() - start, said

    @torch.inference_mode()
    def run_alone() -> float:
        start = time.process_time()
        for prompt, length in workload:
            given = torch.tensor([prompt])
            alone.generate(
                given,
                attention_mask=torch.ones_like(given),
                generation_config=GenerationConfig(
                    max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
                ),
            )
        return time.process_time() - start

    greedy = [
        Request(
            id=i,
            prompt=prompt,
            sampling=SamplingParams(max_tokens=length, temperature=0, ignore_eos=True),
        )
        for i, (prompt, length) in enumerate(workload)
    ]
    run_engine(greedy[:4])
    ratios: list[float] = []
    speeds: list[float] = []
    for _ in range(num_pairs):
        slow = run_alone()
        fast, said = run_engine(greedy)
        if said != num_tokens:
            raise SystemExit(f"the engine made {said} tokens instead of {num_tokens}")
        ratios.append(slow / fast)
        speeds.append(num_tokens / fast)
    kept_ratios: list[float] = []
    for pair in range(num_pairs):
        # Every schema is new to the engine, as in a batch where all differ.
        schemas = make_schemas(num_requests, first=pair * num_requests)
        held = [
            Request(
                id=i,
                prompt=prompt,
                constraint=constraint,
                sampling=SamplingParams(temperature=1.0, seed=i, max_tokens=200),
            )
            for i, ((prompt, _), constraint) in enumerate(zip(workload, schemas, strict=True))
        ]
        lengths: dict[int, int] = {}
        start = time.process_time()
        for result in engine.generate(ListSource(held)):
            lengths[result.id] = result.usage.completion_tokens
        constrained = time.process_time() - start
        free = [
            Request(
                id=i,
                prompt=prompt,
                sampling=SamplingParams(
                    temperature=1.0, seed=i, max_tokens=lengths[i], ignore_eos=True
                ),
            )
            for i, (prompt, _) in enumerate(workload)
        ]
        kept_ratios.append(run_engine(free)[0] / constrained)
    parameters = sum(p.numel() for p in alone.parameters())
    return {
        "model": str(folder),
        "parameters": parameters,
        "requests": num_requests,
        "output_tokens": num_tokens,
        "engine_over_one_by_one": statistics.median(ratios),
        "engine_over_one_by_one_all": [round(ratio, 2) for ratio in ratios],
        "engine_tokens_per_cpu_second": statistics.median(speeds),
        "constrained_over_free": statistics.median(kept_ratios),
        "constrained_over_free_all": [round(ratio, 3) for ratio in kept_ratios],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, action="append")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folders = list(arguments.model or [])
        if not folders:
            if (DEMO / "config.json").exists():
                folders.append(DEMO)
            random_model = Path(temporary) / "random-100m"
            make_random_model(random_model)
            folders.append(random_model)
        found = []
        for folder in folders:
            found.append(
                measure(folder, num_requests=arguments.requests, num_pairs=arguments.pairs)
            )
            sys.stdout.write(json.dumps(found[-1], indent=2) + "\n")
            sys.stdout.flush()
            gc.collect()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
