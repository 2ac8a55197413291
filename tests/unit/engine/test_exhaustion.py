"""What becomes of requests when a step, or the cache, finds no memory.

The limit is a real one: the address space of a process of its own, which torch's allocator runs
into as it would into the end of a device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.ceiling import Ceiling
from engine.hf.exhaustion import is_out_of_memory
from engine.tuning import Start, Tuner, render_tuning
from tests.unit.engine.conftest import make_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")

LIMITS = (160, 100, 60, 40, 25, 15, 10)
"""Megabytes beside what is taken already, tried until one is too little for a step."""
_PROGRAM = """
import ctypes, json, os, resource, sys, threading
import torch
from engine.config import HfConfig
from engine.hf.engine import HfEngine
from jobs.domain.errors import EngineError
from jobs.domain.request import Request, SamplingParams
from tests.sources import ListSource

torch.set_num_threads(1)
threading.stack_size(1 << 20)
told = json.loads(sys.argv[1])

def limit(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + (megabytes << 20)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if megabytes else hard, hard))

def requests(lengths, **more):
    for i, length in enumerate(lengths):
        prompt = tuple(10 + (7 * i + 13 * n) % 600 for n in range(length))
        sampling = SamplingParams(max_tokens=told["num_tokens"], ignore_eos=True, **more)
        yield Request(id=i, prompt=prompt, sampling=sampling)

def run(lengths, **more):
    source = ListSource(requests(lengths, **more))
    return [
        [one.id, one.text, one.usage.completion_tokens, one.error and one.error.code,
         [token.logprob for token in one.logprobs]]
        for one in engine.generate(source)
    ]

if told.get("cache_limit"):
    import transformers.models.llama.modeling_llama
    from engine.hf import weights
    loaded = weights.load(HfConfig.model_validate(told["config"]))  # its libraries are in now
    real = weights.load
    def load(config):
        limit(told["cache_limit"])
        return loaded
    weights.load = load
try:
    engine = HfEngine(HfConfig.model_validate(told["config"]))
except EngineError as error:
    print(json.dumps({"code": error.code, "message": error.message}))
    sys.exit()
for parameter in (-3, -1):  # what is large is given back at once, as the environment says
    ctypes.CDLL(None).mallopt(parameter, 1 << 17)
found = {"begun": engine.tuning.choice, "cache_tokens": engine.capabilities.cache_tokens}
limit(0)
engine_runs = list(run([20], temperature=0))  # what is made once is made now
for megabytes in told["limits"]:
    num_shrinks = engine.tuning.num_shrinks
    limit(megabytes)
    answers = run(told["lengths"], **told["sampling"])
    limit(0)
    tuning = engine.tuning
    if megabytes and tuning.num_shrinks == num_shrinks:
        continue  # that was enough memory
    found.setdefault("runs", []).append({
        "answers": sorted(answers), "order": [one[0] for one in answers],
        "slots": tuning.slots, "batch_tokens": tuning.batch_tokens, "by": tuning.slots_by,
        "tokens_by": tuning.batch_tokens_by, "num_shrinks": tuning.num_shrinks,
    })
    if megabytes and told["once"]:
        break
print(json.dumps(found))
"""


def run(folder: Path, **told: Any) -> dict[str, Any]:  # noqa: ANN401
    config = {
        "model": str(folder),
        "device": "cpu",
        "compute_dtype": "float32",
        "slots": 16,
        "batch_tokens": 256,
        "num_blocks": 400,
        **told.pop("config", {}),
    }
    given = {
        "config": config,
        "num_tokens": 6,
        "lengths": (),
        "limits": (),
        "once": True,
        "sampling": {"temperature": 0},
        **told,
    }
    # One arena, and large blocks given back at once: else what was freed counts on.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM, json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_model(folder: Path, **shape: int) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 512,
                "initializer_range": 0.3,
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                **shape,
            }
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs 256 KiB and more for each token of a step."""
    return make_model(tmp_path_factory.mktemp("wide"), intermediate_size=65536)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs 2 MiB and more for each sequence of a step."""
    return make_model(tmp_path_factory.mktemp("wordy"), vocab_size=524_288)


@pytest.mark.slow
def test_prompts_that_are_too_much_for_a_step_go_in_smaller_ones(wide: Path) -> None:
    lengths = (100, 200, 300, 20, 150, 250)
    free, short = run(wide, lengths=lengths, limits=(0, *LIMITS))["runs"]
    assert free["num_shrinks"] == 0
    assert short["answers"] == free["answers"]
    assert [one[2:4] for one in short["answers"]] == [[6, None]] * len(lengths)
    assert short["batch_tokens"] < 256
    assert short["tokens_by"] == "shortage"


@pytest.mark.slow
def test_sequences_that_are_too_many_for_a_step_wait_and_change_no_answer(wordy: Path) -> None:
    sampling = {"temperature": 1.0, "seed": 7, "logprobs": 2}
    found = run(wordy, lengths=(17,) * 20, limits=(0, *LIMITS), num_tokens=8, sampling=sampling)
    free, short = found["runs"]
    assert free["num_shrinks"] == 0
    assert short["slots"] < 16
    assert short["by"] == "shortage"
    assert set(short["order"][:2]) <= set(range(8)), short["order"]  # the oldest first
    for before, after in zip(free["answers"], short["answers"], strict=True):
        assert after[:4] == before[:4]
        assert len(after[4]) == 8  # told once for each token
        assert after[4] == pytest.approx(before[4], abs=1e-3)


@pytest.mark.slow
def test_request_that_is_too_large_alone_is_an_error_and_ends_nothing_else(wide: Path) -> None:
    found = run(wide, lengths=(300, 40, 200), limits=(0, 4, 0), once=False)["runs"]
    assert [one[3] for one in found[1]["answers"]] == ["out_of_memory"] * 3
    assert found[2]["answers"] == found[0]["answers"]


@pytest.mark.slow
def test_cache_is_made_as_large_as_there_is_memory_for(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", hidden_size=256, num_hidden_layers=4)
    asked = {"num_blocks": 40_000, "slots": None, "batch_tokens": None}
    shown = run(folder, config=asked, cache_limit=1500, lengths=(40,) * 4, limits=(0,))
    assert 128 <= shown["cache_tokens"] <= 40_000 * 16 // 2
    assert shown["begun"][-1] == "memory"
    assert [one[3] for one in shown["runs"][0]["answers"]] == [None] * 4


@pytest.mark.slow
def test_engine_without_room_for_a_cache_says_so(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", hidden_size=2048, num_hidden_layers=4)
    refused = run(folder, config={"num_blocks": 40_000}, cache_limit=1)
    assert refused["code"] == "engine_out_of_memory"
    assert "no memory left for the cache" in refused["message"]


def test_what_libraries_say_of_memory_is_understood() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(raised.value)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_bounds_fall_by_half_and_rise_again_more_slowly_each_time() -> None:
    ceiling = Ceiling()
    assert ceiling.shrink(num_rows=32, num_tokens=32)
    assert (ceiling.slots, ceiling.batch_tokens) == (16, 32)

    def steps_until_free() -> int:
        for n in range(1, 100_000):
            ceiling.note_step(most_slots=32, most_tokens=64)
            if ceiling.slots is None:
                return n
        raise AssertionError

    first = steps_until_free()
    ceiling.shrink(num_rows=32, num_tokens=32)
    ceiling.note_step(most_slots=32, most_tokens=64)
    ceiling.shrink(num_rows=16, num_tokens=16)
    assert ceiling.slots == 8
    assert steps_until_free() > first


def test_prompts_of_a_step_are_cut_before_sequences_are() -> None:
    ceiling = Ceiling()
    assert ceiling.shrink(num_rows=4, num_tokens=512)
    assert (ceiling.slots, ceiling.batch_tokens) == (4, 256)
    assert ceiling.shrink(num_rows=1, num_tokens=256)
    assert ceiling.shrink(num_rows=1, num_tokens=17)
    assert not ceiling.shrink(num_rows=1, num_tokens=16)
    assert (ceiling.slots, ceiling.batch_tokens) == (None, None)


def test_tuner_lowers_what_was_asked_for_and_says_why() -> None:
    start = Start(
        slots=8,
        max_slots=8,
        slots_by="asked",
        batch_tokens=64,
        max_batch_tokens=64,
        batch_tokens_by="asked",
        cache_tokens=1000,
    )
    tuner = Tuner(start, is_live=False)
    assert tuner.shrink(num_rows=8, num_tokens=8)
    assert (tuner.limit, tuner.batch_tokens) == (4, 16)
    report = tuner.report(cache_tokens=1000)
    assert (report.slots_by, report.batch_tokens_by, report.num_shrinks) == (
        "shortage",
        "shortage",
        1,
    )
    assert render_tuning(report).startswith("4 of 8 slots (since a step ran out of memory)")
