"""G1, G4, G5, G6 and G7: batches, and a model of 7 to 8 billion random weights, on a GPU.

    python tests/benchmarks/gpu.py [--rows G1,G4,G5,G6,G7] [--shape 8b|7b|tiny] [--device cuda|cpu]
        [--batches vllm|hf] [--engines hf,nf4,vllm] [--sequences 1,16,64,256] [--prompt 128]
        [--answer 128] [--repeats 3] [--requests 20000] [--folder DIR] [--json FILE]

The weights are made on the device and saved once; each row, and of G7 each engine, then loads them
in a process of its own, as a worker would. G1 to G6 are in gpu_batches.py, and run on vLLM where it
is installed, else on hf. G7 is batched against one by one: prompts are random tokens, answers
greedy and of exact length. For each number of sequences: output tokens per second of wall time,
prompts included; that over one sequence at a time; and its share of what the memory allows, if each
step reads all weights and the cache once at the speed of a plain copy on the same device. The
figures go to FILE, or to standard output. On a machine without CUDA nothing is measured, unless
--device is cpu.
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
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from jobs.telemetry import configure_logging
from tests.benchmarks import gpu_batches, suite
from tests.benchmarks.gpu_batches import FULL, SMALL, Batches, Sizes
from tests.benchmarks.measuring import Row
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
ROWS = (*gpu_batches.ROWS, "G7")
_CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
_PAGE = 32
_FEW = 16
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
    fast.chat_template = _CHAT
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


def config_of_batches(row: str, folder: Path, arguments: argparse.Namespace) -> EngineConfig:
    """Return how to open the engine of a row other than G7."""
    sizes = sizes_of(arguments)
    tokens = sizes.cache_tokens if row == "G4" else None
    if arguments.batches == "vllm":
        size = read_size(folder)
        each = size.cache_bytes_per_token if size is not None else 0
        return VllmConfig(
            model=str(folder),
            slots=sizes.slots,
            context_tokens=sizes.context_tokens,
            dtype="bfloat16" if arguments.device == "cuda" else "float32",
            enforce_eager=arguments.device != "cuda",
            engine_args={} if tokens is None else {"kv_cache_memory_bytes": tokens * each},
        )
    # Beside what is shared, room for what each sequence has of its own.
    own = sizes.slots * sizes.context_tokens // 16
    return HfConfig(
        model=str(folder),
        device=arguments.device,
        slots=sizes.slots,
        context_tokens=sizes.context_tokens,
        batch_tokens=max(2048, sizes.slots) if arguments.device == "cuda" else 512,
        page_tokens=_PAGE,
        num_blocks=None if tokens is None else (tokens + own) // _PAGE,
    )


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """Return how much is run: little of it on a CPU, where it only shows that it works."""
    sizes = FULL if arguments.device == "cuda" else SMALL
    return sizes if arguments.requests is None else replace(sizes, requests=arguments.requests)


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
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=None)
    parser.add_argument("--batches", choices=("vllm", "hf"), help="engine of G1 to G6")
    parser.add_argument("--requests", type=int, help="of G1; a quarter of them in G4")
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
    parser.add_argument("--one", choices=(*ENGINES, *gpu_batches.ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def ratios(engines: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows of G7, from the figures of its engines."""
    speeds = {
        one["engine"]: {run["sequences"]: run["tokens_per_second"] for run in one["runs"]}
        for one in engines
        if "runs" in one
    }
    nf4, half, vllm = (speeds.get(name, {}) for name in ENGINES[1:2] + ENGINES[:1] + ENGINES[2:])
    for num in sorted(nf4):
        if num > 1 and 1 in nf4:
            yield Row(
                id=f"G7 nf4 {num}",
                what=f"NF4 at {num} sequences ÷ one by one",
                values=[nf4[num] / nf4[1]],
                must=15 if num == max(nf4) else None,
                goal=30 if num == max(nf4) else None,
            )
        if num in half:
            yield Row(
                id=f"G7 nf4 ÷ bf16 {num}",
                what=f"NF4 ÷ bfloat16 at {num} sequences",
                values=[nf4[num] / half[num]],
                must=0.8,
                goal=1.0 if num <= _FEW else 0.9,
            )
    for num in sorted(half.keys() & vllm.keys()):
        yield Row(
            id=f"G7 hf ÷ vllm {num}",
            what=f"hf ÷ vLLM at {num} sequences, bfloat16",
            values=[half[num] / vllm[num]],
            must=0.35,
            goal=0.6,
        )


def measure_apart(one: str, folder: Path, given: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one engine or row from a process of its own; a failure is its error."""
    told = folder.parent / f"{folder.name}-{one}.json"
    command = [sys.executable, __file__, *given, "--folder", str(folder)]
    done = subprocess.run([*command, "--one", one, "--to", str(told)], check=False)
    if done.returncode != 0:
        name = "row" if one in gpu_batches.ROWS else "engine"
        return {name: one, "error": f"ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(told.read_text())
    told.unlink()
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print, or say that there is nothing to measure on."""
    given = list(sys.argv[1:] if given is None else given)
    arguments = parse(given)
    configure_logging(level="ERROR")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    if arguments.batches is None:
        has_vllm = arguments.device == "cuda" and find_spec("vllm") is not None
        arguments.batches = "vllm" if has_vllm else "hf"
    if arguments.one in gpu_batches.ROWS:
        config = config_of_batches(arguments.one, arguments.folder, arguments)
        found = Batches(config, arguments.folder, sizes_of(arguments)).measure(arguments.one)
        summed = [one.summary() | {"engine": arguments.batches} for one in found]
        arguments.to.write_text(json.dumps({"row": arguments.one, "rows": summed}))
        return
    if arguments.one:
        figures = measure(arguments.one, arguments.folder, arguments)
        arguments.to.write_text(json.dumps(figures))
        return
    engines = arguments.engines or ["hf", "nf4"]
    if arguments.engines is None and arguments.device == "cuda" and find_spec("vllm"):
        engines.append("vllm")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / f"random-{arguments.shape}"
        if not (folder / "config.json").exists():
            make_model(folder, arguments.shape, arguments.device)
        parts = [
            measure_apart(row, folder, given) for row in gpu_batches.ROWS if row in arguments.rows
        ]
        measured = [measure_apart(one, folder, given) for one in engines if "G7" in arguments.rows]
    rows = [row for part in parts for row in part.get("rows", ())]
    rows += [row.summary() for row in ratios(measured)]
    result = {
        **describe_machine(),
        "device": arguments.device,
        "shape": arguments.shape,
        "prompt_tokens": arguments.prompt,
        "answer_tokens": arguments.answer,
        "rows": rows,
        "failed": [part for part in parts if "error" in part],
        "engines": measured,
    }
    sys.stderr.write(suite.render([row | {"load": 0.0} for row in rows]) + "\n")
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if arguments.json:
        arguments.json.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
