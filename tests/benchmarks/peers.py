"""P: the same files through `vllm run-batch` and through `batchctl run` with vLLM, on the CPU.

    P unique    every prompt is another, as W1
    P repeats   half of the lines repeat others, as W9
    P shared    90 % of each prompt is that of its group, as W3; the cache holds three groups

Whole commands on either side, of which a run of one line is subtracted, since both spend much of
their time on starting vLLM. Same model (random, 30 million parameters), same options: float32,
eager, 32 sequences, the same cache, prefix caching on, one thread. A ratio is the processor time of
the whole tree of processes, vLLM's over ours: above 1 we are faster. Beside it: answer tokens per
second on the clock, and tokens that were computed, prompts without what the cache held.

vLLM is in an environment of its own (sh scripts/vllm_env.sh); VLLM_PYTHON names another one's.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks import workloads
from tests.benchmarks.measuring import ROOT, Row, main, num_pairs_at, scaled

SLOTS = 32
MODEL = "bench"
CONTEXT = 2048
CACHE_BYTES = 1 << 30
NUM_GROUPS = 12
_CACHED_GROUPS = 3
_SHARED_TOKENS = 1200
LAYERS, HEADS, HEAD_SIZE = 8, 8, 64
_BYTES_OF_TOKEN = 2 * LAYERS * HEADS * HEAD_SIZE * 4
_MAKE_MODEL = f"""
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=len(tokenizer), hidden_size={HEADS * HEAD_SIZE}, intermediate_size=1536,
    num_hidden_layers={LAYERS}, num_attention_heads={HEADS}, num_key_value_heads={HEADS},
    tie_word_embeddings=True, max_position_embeddings={CONTEXT},
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
)).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a command took: seconds on the clock and of processors, answer tokens, and computed."""

    wall: float
    cpu: float
    tokens: int
    computed: int

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(
            wall=self.wall - other.wall,
            cpu=self.cpu - other.cpu,
            tokens=self.tokens - other.tokens,
            computed=self.computed - other.computed,
        )


def find_python() -> Path:
    """Return the Python of an environment that has vLLM."""
    python = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        sys.exit(f"{python} is not there; sh scripts/vllm_env.sh makes it")
    return python


def environment() -> dict[str, str]:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("BATCHCTL_")}
    return {
        **clean,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


def run_command(command: Sequence[str], folder: Path, output: Path) -> Spent:
    """Return what a whole command took, its descendants included."""
    clock = time.monotonic()
    used: dict[int, float] = {}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, cwd=folder, env=environment(), stdout=said, stderr=said) as done,
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
            sys.exit(f"{command[:4]} ended with {done.returncode}:\n{said.read()[-2000:]}")
    tokens = computed = 0
    for line in output.read_text("utf-8").splitlines():
        body: dict[str, Any] = json.loads(line)["response"]["body"]
        usage = body["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        computed += usage["prompt_tokens"] - cached + usage["completion_tokens"]
        same_as = body.get("batchctl", {}).get("same_as")
        # What another line was answered with is delivered here too, and computed once.
        tokens += usage["completion_tokens"] if same_as is None else 0
    return Spent(wall=wall, cpu=sum(used.values()), tokens=tokens, computed=computed)


class Peers:
    """Both commands, over one model with one size of cache."""

    def __init__(self, python: Path, work: Path, *, cache_bytes: int) -> None:
        self._python = str(python)
        self._work = work
        self._model = work / "model"
        self._cache_bytes = cache_bytes
        self._starts: dict[int, tuple[Spent, Spent]] = {}
        options = {"slots": SLOTS, "enforce_eager": True}
        (work / "batchctl.toml").write_text(
            f'[models.{MODEL}]\nsource = {json.dumps(str(self._model))}\nengine = "vllm"\n'
            f"options = {{{', '.join(f'{k} = {json.dumps(v)}' for k, v in options.items())}}}\n"
            f'[vllm]\ndtype = "float32"\n'
            f"[vllm.engine_args]\nkv_cache_memory_bytes = {cache_bytes}\n"
        )

    def write(self, name: str, lines: Iterable[bytes]) -> None:
        (self._work / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))

    def starts(self, seed: int, lines: Sequence[bytes]) -> tuple[Spent, Spent]:
        """Return what one line takes, theirs and ours; once for each seed."""
        if seed not in self._starts:
            name = f"one-{self._cache_bytes}-{seed}"
            self.write(name, lines[:1])
            self._starts[seed] = self.theirs(name), self.ours(name)
        return self._starts[seed]

    def ours(self, name: str) -> Spent:
        output = self._work / f"{name}.ours.jsonl"
        return run_command(
            [
                *(self._python, "-m", "jobs.cli.main", "run", f"{name}.jsonl", "--json"),
                *("--model", MODEL, "--config", "batchctl.toml"),
                *("--output", str(output), "--data", str(self._work / f"data-{name}")),
            ],
            self._work,
            output,
        )

    def theirs(self, name: str) -> Spent:
        output = self._work / f"{name}.theirs.jsonl"
        return run_command(
            [
                *(self._python, "-W", "ignore", "-m", "vllm.entrypoints.openai.run_batch"),
                *("-i", f"{name}.jsonl", "-o", str(output), "--model", str(self._model)),
                *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
                *("--max-num-seqs", str(SLOTS), "--enable-prefix-caching"),
                *("--kv-cache-memory-bytes", str(self._cache_bytes)),
                "--enable-prompt-tokens-details",
            ],
            self._work,
            output,
        )


def compare(peers: Peers, name: str, make: Callable[[int], list[bytes]], num_pairs: int) -> Row:
    """Return a row about files that `make` makes for each seed."""
    must, goal, what = {
        "unique": (1.0, 1.05, "unique prompts"),
        "repeats": (1.9, 1.98, "50 % duplicates"),
        "shared": (1.1, 1.5, "90 % shared prefixes"),
    }[name]
    pairs: list[tuple[Spent, Spent]] = []
    delivered = 0
    for seed in range(num_pairs):
        whole = f"{name}{seed}"
        lines = make(seed)
        peers.write(whole, lines)
        their_start, our_start = peers.starts(seed, lines)
        # Beside each other in time: the machine's other work is the same for both.
        if seed % 2:
            our_all, their_all = peers.ours(whole), peers.theirs(whole)
        else:
            their_all, our_all = peers.theirs(whole), peers.ours(whole)
        pairs.append((their_all - their_start, our_all - our_start))
        delivered = pairs[-1][0].tokens
    theirs, ours = pairs[-1]
    clocks = [theirs.wall / ours.wall for theirs, ours in pairs]
    return Row(
        id=f"P {name}",
        what=f"vllm run-batch ÷ batchctl run, {what}",
        values=[theirs.cpu / ours.cpu for theirs, ours in pairs],
        must=must,
        goal=goal,
        note=f"{len(lines)} requests, {delivered} answer tokens; processor time; on the clock "
        f"{statistics.median(clocks):.2f}: {delivered / ours.wall:.0f} answer tokens/s against "
        f"{delivered / theirs.wall:.0f}; tokens computed {ours.computed} against "
        f"{theirs.computed}",
    )


def measure(size: float) -> list[Row]:
    """Return one row for each kind of file."""
    python, num_pairs = find_python(), num_pairs_at(3, size)
    num_lines = scaled(200, size, least=8)

    def shared(seed: int) -> list[bytes]:
        return list(
            workloads.shared_prefix(num_lines, seed=seed, model=MODEL, num_groups=NUM_GROUPS)
        )

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        demo = ROOT / "engine" / "demo" / "model"
        subprocess.run(
            [str(python), "-c", _MAKE_MODEL, str(demo), str(work / "model")],
            env=environment(),
            check=True,
            capture_output=True,
        )
        roomy = Peers(python, work, cache_bytes=CACHE_BYTES)
        rows += [
            compare(
                roomy,
                "unique",
                lambda seed: list(workloads.chat(num_lines, seed=seed, model=MODEL, shrink=0.4)),
                num_pairs,
            ),
            compare(
                roomy,
                "repeats",
                lambda seed: list(
                    workloads.duplicates(num_lines, seed=seed, model=MODEL, shrink=0.4)
                ),
                num_pairs,
            ),
        ]
        tokens = max(CONTEXT, _CACHED_GROUPS * _SHARED_TOKENS) + SLOTS * 160
        tight = Peers(python, work, cache_bytes=tokens * _BYTES_OF_TOKEN)
        rows.append(compare(tight, "shared", shared, num_pairs))
    return rows


if __name__ == "__main__":
    main(measure)
