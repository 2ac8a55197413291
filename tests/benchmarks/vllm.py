"""vLLM through us against vLLM alone, on the CPU; writes build/bench-vllm.json.

    .venv-vllm/bin/python tests/benchmarks/vllm.py [--pairs 3] [--requests 300] [--large 48]

1. `ProcessEngine` against `LLM.generate`: the same prompts as token ids, greedy, answers of exact
   lengths, in turns, every round with prompts of its own. Both engines are loaded before.
2. `batchctl run` against `python -m vllm.entrypoints.openai.run_batch` on the same file: whole
   commands, of which a run of one line is subtracted on either side, since both spend most of
   their time on starting vLLM.

Same options on both sides: float32, eager, 32 sequences, 1 GiB of cache, no prefix cache. A ratio
is vLLM's time divided by ours: above 1 we are faster. CPU time is that of the whole tree of
processes, user and system; on the clock the two take turns on a machine that others may use.
Models: the demo model, and a random one of about 100 million parameters.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO, cast

import psutil

from engine.config import VllmConfig
from engine.demo import model_path
from engine.process import ProcessEngine
from jobs.domain.request import Request, SamplingParams
from tests.sources import ListSource

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "bench-vllm.json"
SLOTS = 32
CACHE_BYTES = 1 << 30
Prompts = list[tuple[list[int], int]]
Spent = dict[str, float]


def make_prompts(seed: int, num_requests: int, vocab_size: int) -> Prompts:
    """Return prompts of 8 to 256 tokens and lengths of answers of 8 to 128, both log-uniform."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    return [
        ([rng.randrange(vocab_size // 2, vocab_size) for _ in range(draw(8, 256))], draw(8, 128))
        for _ in range(num_requests)
    ]


def cpu_seconds(engine: int | None = None) -> float:
    """Return what this process and its living descendants have used.

    Args:
        engine: only this child of ours and its descendants, and this process.
    """
    this = psutil.Process()
    first = this if engine is None else psutil.Process(engine)
    family = {this, first, *first.children(recursive=True)}
    times = [one.cpu_times() for one in family]
    return float(sum(one.user + one.system for one in times))


def measured(run: Callable[[], int], engine: int | None = None) -> Spent:
    """Return what `run` took, and the tokens it says it made."""
    cpu, clock = cpu_seconds(engine), time.monotonic()
    tokens = run()
    return {
        "wall": time.monotonic() - clock,
        "cpu": cpu_seconds(engine) - cpu,
        "tokens": float(tokens),
    }


def serve_raw(folder: str, num_requests: int, vocab_size: int) -> None:
    """Be vLLM alone: read seeds from stdin, run that round, write what it took."""
    from vllm import LLM, TokensPrompt  # noqa: PLC0415 -- takes long, and only this process
    from vllm import SamplingParams as VllmSampling  # noqa: PLC0415

    llm = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=SLOTS,
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=False,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = make_prompts(int(line), num_requests, vocab_size)

        def run(prompts: Prompts = prompts) -> int:
            done = llm.generate(
                [TokensPrompt(prompt_token_ids=ids) for ids, _ in prompts],
                [
                    VllmSampling(temperature=0, max_tokens=length, ignore_eos=True)
                    for _, length in prompts
                ],
                use_tqdm=False,
            )
            return sum(len(one.outputs[0].token_ids) for one in done)

        print("took", json.dumps(measured(run)), flush=True)


def compare_engines(folder: Path, *, num_requests: int, num_pairs: int) -> dict[str, Any]:
    """Return the ratios of `LLM.generate` to `ProcessEngine`."""
    vocab_size = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    config = VllmConfig(
        model=str(folder),
        dtype="float32",
        slots=SLOTS,
        prefix_caching=False,
        enforce_eager=True,
        engine_args={"kv_cache_memory_bytes": CACHE_BYTES},
    )
    raw = subprocess.Popen(
        [sys.executable, __file__, "--raw", str(folder), str(num_requests), str(vocab_size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(),
    )
    pairs: list[tuple[Spent, Spent]] = []
    try:
        _read(cast("TextIO", raw.stdout), "ready")
        log = Path(tempfile.gettempdir()) / "bench-vllm-engine.log"
        with closing(ProcessEngine(config, model="bench", log_path=log)) as engine:

            def ours(seed: int) -> Spent:
                requests = [
                    Request(
                        id=number,
                        prompt=tuple(ids),
                        sampling=SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
                    )
                    for number, (ids, length) in enumerate(
                        make_prompts(seed, num_requests, vocab_size)
                    )
                ]
                return measured(
                    lambda: sum(
                        result.usage.completion_tokens
                        for result in engine.generate(ListSource(requests))
                    ),
                    engine.pid,  # not the other child, which is vLLM alone
                )

            def theirs(seed: int) -> Spent:
                cast("TextIO", raw.stdin).write(f"{seed}\n")
                cast("TextIO", raw.stdin).flush()
                return cast("Spent", json.loads(_read(cast("TextIO", raw.stdout), "took")))

            for seed in range(num_pairs + 1):
                # Who goes first changes. The first round warms both up.
                turns = (theirs, ours) if seed % 2 else (ours, theirs)
                done = {turn: turn(seed) for turn in turns}
                found = done[theirs], done[ours]
                if seed:
                    pairs.append(found)
    finally:
        cast("TextIO", raw.stdin).close()
        raw.wait(60)
    return _summarized(pairs)


def _read(stream: TextIO, word: str) -> str:
    for line in stream:
        if line.startswith(word):
            return line.removeprefix(word)
    raise SystemExit("vLLM alone ended early")


def write_file(path: Path, num_lines: int, *, seed: int) -> None:
    """Write chats with answers of exact lengths, which both commands understand."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_lines):
            words = " ".join(f"word{rng.randrange(1000)}" for _ in range(rng.randrange(4, 30)))
            body = {
                "model": "bench",
                "messages": [{"role": "user", "content": words}],
                "temperature": 0,
                "max_tokens": round(math.exp(rng.uniform(math.log(8), math.log(128)))),
                "ignore_eos": True,
            }
            line = {
                "custom_id": f"r{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")


def run_command(command: list[str], folder: Path, output: Path) -> Spent:
    """Return what a whole command took, its descendants included."""
    clock = time.monotonic()
    used: dict[int, float] = {}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, cwd=folder, env=_environment(), stdout=said, stderr=said) as done,
    ):
        root = psutil.Process(done.pid)
        # Sampled: what is killed in the end is waited for by nobody who would tell.
        while done.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in (root, *root.children(recursive=True)):
                    times = one.cpu_times()
                    used[one.pid] = times.user + times.system
            with contextlib.suppress(subprocess.TimeoutExpired):
                done.wait(0.1)
        wall = time.monotonic() - clock
        said.seek(0)
        if done.returncode:
            raise SystemExit(f"{command[:4]} ended with {done.returncode}:\n{said.read()[-2000:]}")
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    return {
        "wall": wall,
        "cpu": sum(used.values()),
        "tokens": float(
            sum(line["response"]["body"]["usage"]["completion_tokens"] for line in lines)
        ),
    }


def compare_commands(folder: Path, *, num_requests: int, num_pairs: int) -> dict[str, Any]:
    """Return the ratios of `run_batch` to `batchctl run`."""
    pairs: list[tuple[Spent, Spent]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        options = {"slots": SLOTS, "enforce_eager": True, "prefix_caching": False}
        (work / "batchctl.toml").write_text(
            f'[models.bench]\nsource = {json.dumps(str(folder))}\nengine = "vllm"\n'
            f"options = {{{', '.join(f'{k} = {json.dumps(v)}' for k, v in options.items())}}}\n"
            f'[vllm]\ndtype = "float32"\n'
            f"[vllm.engine_args]\nkv_cache_memory_bytes = {CACHE_BYTES}\n"
        )

        def ours(name: str) -> Spent:
            output = work / f"{name}.ours.jsonl"
            return run_command(
                [
                    *(sys.executable, "-m", "jobs.cli.main", "run", f"{name}.jsonl"),
                    *("--model", "bench", "--config", "batchctl.toml", "--json"),
                    *("--output", str(output), "--data", str(work / f"data-{name}")),
                ],
                work,
                output,
            )

        def theirs(name: str) -> Spent:
            output = work / f"{name}.raw.jsonl"
            return run_command(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.openai.run_batch"),
                    *("-i", f"{name}.jsonl", "-o", str(output), "--model", str(folder)),
                    *("--served-model-name", "bench", "--dtype", "float32", "--enforce-eager"),
                    *("--max-num-seqs", str(SLOTS), "--no-enable-prefix-caching"),
                    *("--kv-cache-memory-bytes", str(CACHE_BYTES)),
                ],
                work,
                output,
            )

        for pair in range(num_pairs):
            write_file(work / f"one{pair}.jsonl", 1, seed=1000 + pair)
            write_file(work / f"all{pair}.jsonl", num_requests, seed=pair)
            # Beside each other in time: the machine's other work is the same for both.
            their_one, our_one = theirs(f"one{pair}"), ours(f"one{pair}")
            our_all, their_all = ours(f"all{pair}"), theirs(f"all{pair}")
            pairs.append((_less(their_all, their_one), _less(our_all, our_one)))
    return _summarized(pairs)


def _less(whole: Spent, part: Spent) -> Spent:
    return {name: whole[name] - part[name] for name in whole}


def _summarized(pairs: list[tuple[Spent, Spent]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("wall", "cpu"):
        ratios = [theirs[kind] / ours[kind] for theirs, ours in pairs]
        found[f"{kind}_ratio"] = round(statistics.median(ratios), 3)
        found[f"{kind}_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    found["tokens_per_second_ours"] = round(
        statistics.median(ours["tokens"] / ours["wall"] for _, ours in pairs), 1
    )
    found["tokens_per_second_vllm"] = round(
        statistics.median(theirs["tokens"] / theirs["wall"] for theirs, _ in pairs), 1
    )
    found["pairs"] = [{"vllm": theirs, "ours": ours} for theirs, ours in pairs]
    return found


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


def make_random_model(folder: Path) -> None:
    """Write a Llama of 100 million random parameters with the demo model's tokenizer."""
    import torch  # noqa: PLC0415 -- only where vLLM is
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=896,
            intermediate_size=2432,
            num_hidden_layers=11,
            num_attention_heads=14,
            num_key_value_heads=7,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Measure, print and write."""
    # This script would be found under the name of what it measures.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]
    if importlib.util.find_spec("vllm") is None:
        python = ROOT / ".venv-vllm" / "bin" / "python"
        if python.exists():
            os.execve(python, [str(python), __file__, *sys.argv[1:]], _environment())  # noqa: S606
        print("not run: vLLM is not here; sh scripts/vllm_env.sh makes its environment")
        return
    if sys.argv[1:2] == ["--raw"]:
        serve_raw(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--command-pairs", type=int, default=2)
    parser.add_argument("--requests", type=int, default=300, help="for the demo model")
    parser.add_argument("--large", type=int, default=48, help="for the 100M model")
    parser.add_argument("--models", default="demo,random-100m")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "at": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
    }
    with tempfile.TemporaryDirectory() as temporary:
        large = Path(temporary) / "random-100m"
        workloads = {"demo": (model_path(), arguments.requests, 4 * arguments.requests)}
        if "random-100m" in arguments.models:
            make_random_model(large)
        workloads["random-100m"] = (large, arguments.large, arguments.large)
        OUTPUT.parent.mkdir(exist_ok=True)
        for name in arguments.models.split(","):
            folder, num_prompts, num_lines = workloads[name]
            if arguments.pairs:
                found[f"{name}: LLM.generate / ProcessEngine"] = compare_engines(
                    folder, num_requests=num_prompts, num_pairs=arguments.pairs
                )
                OUTPUT.write_text(json.dumps(found, indent=2) + "\n")
            if arguments.command_pairs:
                found[f"{name}: run_batch / batchctl run"] = compare_commands(
                    folder, num_requests=num_lines, num_pairs=arguments.command_pairs
                )
                OUTPUT.write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        shown = (
            value if isinstance(value, str) else {k: v for k, v in value.items() if k != "pairs"}
        )
        print(f"{name}: {json.dumps(shown)}")


if __name__ == "__main__":
    main()
