"""vLLM in the engine process and under `batchctl run`, as a worker has it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from engine.config import HfConfig
from engine.demo import model_path
from engine.process import ProcessEngine
from engine.registry import open_engine
from jobs.domain.errors import EngineDied
from jobs.domain.request import CHAT, Request, SamplingParams, parse_line
from tests.builders import await_true
from tests.mixed import TOTALS, answers_of, check_mixed, write_mixed
from tests.vllm.conftest import CACHE_BYTES, Ask, make_config

ROOT = Path(__file__).parents[2]


class Endless:
    """A source that never ends."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._waiting = list(requests)

    def take(self, n: int) -> Sequence[Request]:
        taken, self._waiting = self._waiting[:n], self._waiting[n:]
        return taken

    def is_aborted(self, request_id: int) -> bool:
        del request_id
        return False


@pytest.mark.parametrize(
    ("victim", "binding"), [("host", "auto"), ("child", "auto"), ("child", "nobind")]
)
def test_killed_engine_is_reported_and_leaves_no_process(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    binding: str,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    long = SamplingParams(ignore_eos=True, temperature=0)
    asked = [
        Request(id=1, prompt="Once", sampling=SamplingParams(max_tokens=1)),
        *(Request(id=n, prompt="Once", sampling=long) for n in range(2, 12)),
    ]
    engine = ProcessEngine(
        make_config(tiny_model, slots=2), model="tiny", log_path=tmp_path / "engine.log"
    )
    try:
        host = psutil.Process(engine.pid)
        family = [host, *host.children(recursive=True)]
        assert len(family) > 2, "vLLM has processes of its own"
        assert {os.getpgid(one.pid) for one in family} == {engine.pid}
        # Without threads to bind to cores the model runs in the core process.
        has_worker = any("VLLM::Worker" in one.name() for one in family)
        assert has_worker is (binding == "auto")
        results = engine.generate(Endless(asked))
        assert next(results).id == 1
        core = next(one for one in family if "EngineCore" in one.name())
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(list, results)
            held = engine._started  # noqa: SLF001 -- what it has in hand, as it says itself
            await_true(lambda: {2, 3} <= held.keys(), seconds=60)
            os.kill(engine.pid if victim == "host" else core.pid, signal.SIGKILL)
            with pytest.raises(EngineDied) as caught:
                rest.result(120)
        assert {2, 3} <= caught.value.suspects <= set(range(2, 12))
        await_true(lambda: not any(_lives(one) for one in family))
    finally:
        engine.close()
    assert "VLLM_" not in (tmp_path / "engine.log").read_text(), "no variable it does not know"


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("BATCHCTL_", "VLLM_"))}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", "run", *arguments, "--json"],
        cwd=folder,
        env={
            **plain,
            "PYTHONPATH": str(ROOT),
            "BATCHCTL_DATA": str(folder / "data"),
            "BATCHCTL_VLLM__DTYPE": "float32",
            "BATCHCTL_VLLM__ENGINE_ARGS": json.dumps(
                {"enforce_eager": True, "kv_cache_memory_bytes": CACHE_BYTES}
            ),
            # Settings of ours, that vLLM would warn of.
            "VLLM_MAX_MODEL_LEN": "1024",
            "VLLM_PREFIX_CACHING": "true",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_examples_run_on_the_demo_model(tmp_path: Path) -> None:
    people = ROOT / "examples" / "people.jsonl"
    ended = run(tmp_path, str(people), "--engine", "vllm", "-m", "demo", "-o", "out.jsonl")
    assert ended.returncode == 0, ended.stderr
    summed = json.loads(ended.stdout)
    assert (summed["requests"], summed["completed"], summed["failed"]) == (24, 24, 0)
    for line in map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines()):
        body = line["response"]["body"]
        assert body["batchctl"] == {"constraint": "enforced", "attempts": 1}
        assert json.loads(body["choices"][0]["message"]["content"]).keys() == {
            *("name", "age", "city", "job")
        }


def test_mixed_batch_is_answered_as_by_the_hf_engine(tmp_path: Path, ask: Ask) -> None:
    mixed = tmp_path / "in.jsonl"
    write_mixed(mixed)
    ended = run(tmp_path, str(mixed), "--engine", "vllm", "-m", "demo", "-o", "out.jsonl")
    assert ended.returncode == 0, ended.stderr
    totals = check_mixed(tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl")
    assert totals == TOTALS
    answers = answers_of(tmp_path / "out.jsonl")
    hf = open_engine(
        HfConfig(model=str(model_path()), device="cpu", compute_dtype="float32"), model="demo"
    )
    lines = [parse_line(line, endpoint=CHAT) for line in mixed.read_bytes().splitlines()]
    theirs = ask(hf, [line.to_request(number) for number, line in enumerate(lines)])
    hf.close()
    differing = [
        line.custom_id
        for number, line in enumerate(lines)
        if answers[line.custom_id] != theirs[number].text
    ]
    assert differing == []
