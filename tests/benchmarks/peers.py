"""P: the same files through `vllm run-batch` and through `batchctl run` with vLLM, on the CPU.

    P unique    every prompt is another, as W1: about 80 tokens in, 80 out
    P repeats   half of the lines repeat others, as W9
    P shared    as W3: 16 groups with 384 to 1,200 tokens in common, 90 % of each prompt; 16 out

Whole commands on either side, in turns. Both spend much of their time on starting vLLM and on
ending it, so the median of what runs of one line take is subtracted, on either side its own. Same
model (random, 30 million parameters) and same engine arguments: float32, eager, 32 sequences,
2,048 tokens in a step, prefix caching on, a cache for three groups beside what runs; one thread
computes.

A ratio is ours over theirs in answer tokens per second on the clock: above 1 we are faster. Beside
it: the ratio of processor times of the whole trees of processes (theirs has a core process that
spins while its worker computes; where threads are not bound, as here, ours computes in the core);
tokens that were computed, which are prompts without what the cache held, and answers; how many
lines both answered alike.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks import workloads
from tests.benchmarks.measuring import ROOT, Row, main, num_pairs_at, scaled

SLOTS = 32
MODEL = "bench"
CONTEXT = 2048
BATCH_TOKENS = 2048
NUM_LINES = 160
NUM_GROUPS = 16
_CACHED_GROUPS = 3
_SHARED_TOKENS = 1200
_OWN_TOKENS = 160
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
    """What a command took: seconds on the clock and of processors, answer tokens, and computed.

    Attributes:
        answers: by custom_id.
    """

    wall: float
    cpu: float
    tokens: int
    computed: int
    answers: Mapping[str, str]

    def less(self, starts: "Sequence[Spent]") -> "Spent":
        """Return this without what the median of `starts` takes."""
        return replace(
            self,
            wall=self.wall - statistics.median(one.wall for one in starts),
            cpu=self.cpu - statistics.median(one.cpu for one in starts),
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
    answers: dict[str, str] = {}
    for text in output.read_text("utf-8").splitlines():
        line: dict[str, Any] = json.loads(text)
        body = line["response"]["body"]
        usage = body["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        # A line that is answered with another one's answer shows no usage.
        computed += usage["prompt_tokens"] - cached + usage["completion_tokens"]
        tokens += usage["completion_tokens"]
        answers[line["custom_id"]] = body["choices"][0]["message"]["content"]
    return Spent(
        wall=wall,
        cpu=sum(used.values()),
        tokens=tokens,
        computed=computed,
        answers=answers,
    )


class Peers:
    """Both commands, over one model with one cache."""

    def __init__(self, python: Path, work: Path) -> None:
        self._python = str(python)
        self._work = work
        self._model = work / "model"
        self.starts: list[tuple[Spent, Spent]] = []
        held = max(CONTEXT, _CACHED_GROUPS * _SHARED_TOKENS) + SLOTS * _OWN_TOKENS
        self._cache_bytes = held * _BYTES_OF_TOKEN
        options = {"slots": SLOTS, "enforce_eager": True, "batch_tokens": BATCH_TOKENS}
        (work / "batchctl.toml").write_text(
            f'[models.{MODEL}]\nsource = {json.dumps(str(self._model))}\nengine = "vllm"\n'
            f"options = {{{', '.join(f'{k} = {json.dumps(v)}' for k, v in options.items())}}}\n"
            f'[vllm]\ndtype = "float32"\n'
            f"[vllm.engine_args]\nkv_cache_memory_bytes = {self._cache_bytes}\n"
        )

    def write(self, name: str, lines: Iterable[bytes]) -> None:
        (self._work / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))

    def start(self, name: str, line: bytes) -> None:
        """Measure what a file of one line takes, theirs and ours."""
        self.write(name, [line])
        self.starts.append((self.theirs(name), self.ours(name)))

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
                *("--max-num-batched-tokens", str(BATCH_TOKENS), "--disable-log-stats"),
                *("--kv-cache-memory-bytes", str(self._cache_bytes)),
                "--enable-prompt-tokens-details",
            ],
            self._work,
            output,
        )


_ROWS = {
    "unique": (1.0, 1.05, "unique prompts"),
    "repeats": (1.9, 1.98, "50 % duplicates"),
    "shared": (1.1, 1.5, "90 % shared prefixes"),
}


def make_lines(name: str, num_lines: int, seed: int) -> list[bytes]:
    if name == "shared":
        made = workloads.shared_prefix(num_lines, seed=seed, model=MODEL, num_groups=NUM_GROUPS)
    elif name == "repeats":
        made = workloads.duplicates(num_lines, seed=seed, model=MODEL, shrink=0.4)
    else:
        made = workloads.chat(num_lines, seed=seed, model=MODEL, shrink=0.4)
    return list(made)


def describe(name: str, pairs: Sequence[tuple[Spent, Spent]]) -> Row:
    """Return the row of pairs of theirs and ours, without their starts."""
    must, goal, what = _ROWS[name]
    theirs, ours = pairs[-1]
    # As many are delivered to our user: what another line was answered with counts as well.
    delivered = theirs.tokens
    alike = sum(ours.answers[key] == text for key, text in theirs.answers.items())
    cpu = statistics.median(theirs.cpu / ours.cpu for theirs, ours in pairs)
    return Row(
        id=f"P {name}",
        what=f"batchctl run ÷ vllm run-batch, tokens/s, {what}",
        values=[theirs.wall / ours.wall for theirs, ours in pairs],
        must=must,
        goal=goal,
        note=f"{len(theirs.answers)} requests, {delivered} answer tokens: "
        f"{delivered / ours.wall:.0f} tokens/s against {delivered / theirs.wall:.0f}, starts "
        f"subtracted; by processor time {cpu:.2f}; tokens computed "
        f"{ours.computed} against {theirs.computed}; {alike} answers alike",
    )


def measure(size: float) -> list[Row]:
    """Return one row for each kind of file."""
    python, num_pairs = find_python(), num_pairs_at(3, size)
    num_lines = scaled(NUM_LINES, size, least=8)
    pairs: dict[str, list[tuple[Spent, Spent]]] = {name: [] for name in _ROWS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        demo = ROOT / "engine" / "demo" / "model"
        subprocess.run(
            [str(python), "-c", _MAKE_MODEL, str(demo), str(work / "model")],
            env=environment(),
            check=True,
            capture_output=True,
        )
        peers = Peers(python, work)
        for seed in range(num_pairs):
            peers.start(f"one{seed}", make_lines("unique", 1, seed)[0])
            for name, found in pairs.items():
                whole = f"{name}{seed}"
                peers.write(whole, make_lines(name, num_lines, seed))
                # Beside each other in time, and neither always first.
                if seed % 2:
                    ours = peers.ours(whole)
                    found.append((peers.theirs(whole), ours))
                else:
                    theirs = peers.theirs(whole)
                    found.append((theirs, peers.ours(whole)))
    their_starts = [theirs for theirs, _ in peers.starts]
    our_starts = [ours for _, ours in peers.starts]
    return [
        describe(name, [(t.less(their_starts), o.less(our_starts)) for t, o in found])
        for name, found in pairs.items()
    ]


if __name__ == "__main__":
    main(measure)
