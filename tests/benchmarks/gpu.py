"""A model of 7 to 8 billion random weights on a GPU: batched against one by one, and the bound.

    python tests/benchmarks/gpu.py [--shape 8b|7b|tiny] [--device cuda|cpu] [--engines hf,nf4,vllm]
        [--sequences 1,16,64,256] [--prompt 128] [--answer 128] [--repeats 3] [--folder DIR]
        [--json FILE]

The weights are made on the device and saved once; each engine then loads them in a process of its
own, as a worker would. Prompts are random tokens, answers greedy and of exact length. For each
number of sequences: output tokens per second of wall time, prompts included; that over one
sequence at a time; and its share of what the memory allows, if each step reads all weights and
the cache once at the speed of a plain copy on the same device. Without --json the figures go to
standard output. On a machine without CUDA nothing is measured, unless --device is cpu.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.base import Engine
from engine.config import EngineConfig, HfConfig, VllmConfig
from engine.devices import discover_visible
from engine.memory import WeightKind, read_size, weight_bytes
from engine.registry import open_engine
from jobs.domain.request import Request, SamplingParams
from tests.sources import ListSource

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1 8B
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "7b": {  # Llama 2 7B
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 1000,
        "max_position_embeddings": 1024,
    },
}
ENGINES = ("hf", "nf4", "vllm")
_PACKAGES = ("torch", "transformers", "bitsandbytes", "vllm", "batchctl")


def make_model(folder: Path, shape: str, device: str) -> None:
    """Write random bfloat16 weights of the shape, and a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # noqa: S106 -- no password
    config = LlamaConfig(
        **SHAPES[shape],
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="4GB")
    fast.save_pretrained(folder)
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_bandwidth(device: str) -> float:
    """Return the bytes per second that a plain copy on the device reads and writes."""
    num_bytes = 2**30 if device == "cuda" else 2**26
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    speeds = []
    for _ in range(10):
        _synchronize(device)
        begun = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        speeds.append(2 * num_bytes / (time.perf_counter() - begun))
    return statistics.median(speeds[2:])


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def config_of(engine: str, folder: Path, arguments: argparse.Namespace) -> EngineConfig:
    """Return how to open an engine with room for the most sequences that are asked for."""
    slots = max(arguments.sequences)
    context = arguments.prompt + arguments.answer
    if engine == "vllm":
        return VllmConfig(
            model=str(folder),
            slots=slots,
            context_tokens=context,
            prefix_caching=False,
            dtype="bfloat16" if arguments.device == "cuda" else "float32",
            enforce_eager=arguments.device != "cuda",
        )
    return HfConfig(
        model=str(folder),
        device=arguments.device,
        quantization="nf4" if engine == "nf4" else "none",
        slots=slots,
        context_tokens=context,
        batch_tokens=max(2048, slots) if arguments.device == "cuda" else 512,
    )


def run(engine: Engine, num: int, arguments: argparse.Namespace, *, seed: int) -> float:
    """Return output tokens per second with `num` sequences at a time."""
    rng = random.Random(seed)
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    sampling = SamplingParams(temperature=0, max_tokens=arguments.answer, ignore_eos=True)
    requests = [
        Request(
            id=number,
            prompt=tuple(rng.randrange(300, vocabulary) for _ in range(arguments.prompt)),
            sampling=sampling,
        )
        for number in range(num)
    ]
    begun = time.perf_counter()
    said = sum(r.usage.completion_tokens for r in engine.generate(ListSource(requests)))
    seconds = time.perf_counter() - begun
    if said != num * arguments.answer:
        raise SystemExit(f"the engine made {said} tokens instead of {num * arguments.answer}")
    return said / seconds


def measure(engine_name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one engine."""
    bandwidth = measure_bandwidth(arguments.device)
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    size = read_size(folder)
    if size is None:
        raise SystemExit(f"{folder} does not tell its size")
    kind: WeightKind = "nf4" if engine_name == "nf4" else "16 bit"
    read_bytes = weight_bytes(size, kind, on_cpu=arguments.device == "cpu")
    # A step looks up a few rows of the embedding and reads all of the rest.
    read_bytes -= size.vocabulary * size.hidden * 2
    begun = time.perf_counter()
    engine = open_engine(config_of(engine_name, folder, arguments), model="random")
    loaded_seconds = time.perf_counter() - begun
    found: list[dict[str, Any]] = []
    try:
        run(engine, min(8, max(arguments.sequences)), arguments, seed=0)
        for num in arguments.sequences:
            speeds = [
                run(engine, num, arguments, seed=1 + repeat) for repeat in range(arguments.repeats)
            ]
            cached = num * (arguments.prompt + arguments.answer / 2) * size.cache_bytes_per_token
            bound = num * bandwidth / (read_bytes + cached)
            found.append(
                {
                    "sequences": num,
                    "tokens_per_second": statistics.median(speeds),
                    "all": [round(speed, 1) for speed in speeds],
                    "bound_tokens_per_second": bound,
                    "share_of_bound": statistics.median(speeds) / bound,
                }
            )
    finally:
        engine.close()
    alone = next((one["tokens_per_second"] for one in found if one["sequences"] == 1), None)
    for one in found:
        one["over_one_by_one"] = one["tokens_per_second"] / alone if alone else None
    return {
        "engine": engine_name,
        "load_seconds": loaded_seconds,
        "copy_bytes_per_second": bandwidth,
        "parameters": size.parameters,
        "weight_bytes_estimated": weight_bytes(size, kind, on_cpu=arguments.device == "cpu"),
        "peak_device_bytes": torch.cuda.max_memory_allocated()
        if arguments.device == "cuda"
        else None,
        "runs": found,
    }


def describe_machine() -> dict[str, Any]:
    """Return what the figures were measured with."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "devices": [gpu.name for gpu in discover_visible()],
        "system": f"{platform.system()} {platform.machine()}",
    }


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=None)
    parser.add_argument(
        "--sequences",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 16, 64, 256],
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the model is made, and kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def measure_apart(engine: str, folder: Path, given: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one engine from a process of its own; a failure is its error."""
    told = folder.parent / f"{folder.name}-{engine}.json"
    command = [sys.executable, __file__, *given, "--folder", str(folder)]
    done = subprocess.run([*command, "--one", engine, "--to", str(told)], check=False)
    if done.returncode != 0:
        return {"engine": engine, "error": f"ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(told.read_text())
    told.unlink()
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print, or say that there is nothing to measure on."""
    given = list(sys.argv[1:] if given is None else given)
    arguments = parse(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    if arguments.one:
        found = measure(arguments.one, arguments.folder, arguments)
        arguments.to.write_text(json.dumps(found))
        return
    engines = arguments.engines or ["hf", "nf4"]
    if arguments.engines is None and arguments.device == "cuda" and find_spec("vllm"):
        engines.append("vllm")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / f"random-{arguments.shape}"
        if not (folder / "config.json").exists():
            make_model(folder, arguments.shape, arguments.device)
        result = {
            **describe_machine(),
            "device": arguments.device,
            "shape": arguments.shape,
            "prompt_tokens": arguments.prompt,
            "answer_tokens": arguments.answer,
            "engines": [measure_apart(one, folder, given) for one in engines],
        }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.json:
        arguments.json.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
