"""llama.cpp in the engine process and under `batchctl run`, as a worker has it."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from engine.config import AskingConfig
from engine.process import ProcessEngine
from jobs.domain.errors import EngineDied, EngineMisconfigured, EngineOutOfMemory
from jobs.domain.request import Request, SamplingParams
from tests.llamacpp.conftest import Ask, make_config, open_llamacpp
from tests.mixed import TOTALS, check_mixed, write_mixed

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


def test_killed_engine_is_reported_with_its_suspects(tiny_file: Path, tmp_path: Path) -> None:
    long = SamplingParams(ignore_eos=True, temperature=0)
    asked = [
        Request(id=1, prompt="Once", sampling=SamplingParams(max_tokens=1)),
        *(Request(id=n, prompt="Once", sampling=long) for n in range(2, 40)),
    ]
    config = make_config(tiny_file, slots=2, asking=AskingConfig())
    engine = ProcessEngine(config, model="tiny", log_path=tmp_path / "engine.log")
    with closing(engine):
        results = engine.generate(Endless(asked))
        assert next(results).id == 1
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied) as caught:
            list(results)
    assert caught.value.suspects <= set(range(2, 40))
    assert caught.value.suspects


def run(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("BATCHCTL_")}
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", *arguments, "--json"],
        cwd=folder,
        env={
            **plain,
            "PYTHONPATH": str(ROOT),
            "BATCHCTL_DATA": str(folder / "data"),
            "BATCHCTL_LLAMACPP__THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended


@pytest.mark.parametrize("engine", [(), ("--engine", "llamacpp")], ids=["auto", "named"])
def test_examples_run_on_a_gguf_file(files: Path, tmp_path: Path, engine: tuple[str, ...]) -> None:
    people, model = ROOT / "examples" / "people.jsonl", files / "demo-q8_0.gguf"
    ended = run(tmp_path, "run", str(people), "-m", str(model), "-o", "out.jsonl", *engine)
    summed = json.loads(ended.stdout)
    assert (summed["requests"], summed["completed"], summed["failed"]) == (24, 24, 0)
    for line in map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines()):
        body = line["response"]["body"]
        assert body["batchctl"] == {"constraint": "enforced", "attempts": 1}
        assert json.loads(body["choices"][0]["message"]["content"]).keys() == {
            *("name", "age", "city", "job")
        }


def test_mixed_batch_is_answered(demo_file: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "in.jsonl"
    write_mixed(mixed)
    run(tmp_path, "run", str(mixed), "-m", str(demo_file), "-o", "out.jsonl")
    assert check_mixed(tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl") == TOTALS


def test_damaged_file_ends_the_run_with_one_line(demo_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_file.read_bytes()[:100_000])
    people = ROOT / "examples" / "people.jsonl"
    ended = run(tmp_path, "run", str(people), "-m", str(cut), "-o", "out.jsonl", code=9)
    assert "is damaged: it is cut off" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


HEAD = struct.Struct("<4sIQQ")
ENTRY = struct.Struct("<Q1sI")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(bytes(4096), "is no GGUF file", id="zeros"),
        pytest.param(b"GGUF\x03", "cut off within its header", id="cut off"),
        pytest.param(
            HEAD.pack(b"GGUF", 3, 2**60, 0) + bytes(64), "more entries than", id="2**60 tensors"
        ),
        pytest.param(
            HEAD.pack(b"GGUF", 3, 0, 1) + ENTRY.pack(1, b"k", 8) + struct.pack("<Q", 2**40),
            "a text of 1,099,511,627,776 bytes",
            id="long text",
        ),
        pytest.param(
            HEAD.pack(b"GGUF", 3, 0, 1) + ENTRY.pack(1, b"k", 77) + bytes(64),
            "unknown type 77",
            id="unknown type",
        ),
        pytest.param(
            HEAD.pack(b"GGUF", 3, 1, 0)
            + ENTRY.pack(1, b"t", 1)
            + struct.pack("<QIQ", 64, 0, 2**50)
            + bytes(512),
            "cut off after",
            id="tensor outside",
        ),
    ],
)
def test_bad_file_is_one_line_of_a_run_and_of_doctor(
    tmp_path: Path, content: bytes, said: str
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    people = ROOT / "examples" / "people.jsonl"
    ended = run(tmp_path, "run", str(people), "-m", str(bad), "-o", "out.jsonl", code=9)
    told = ended.stdout + ended.stderr
    assert f"{bad} is" in told
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "out.jsonl").exists()
    doctor = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", "doctor", "-m", str(bad), "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BATCHCTL_DATA": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert said in doctor.stdout + doctor.stderr
    assert "Traceback" not in doctor.stderr


def test_doctor_knows_the_file(demo_file: Path, tmp_path: Path) -> None:
    told = json.loads(run(tmp_path, "doctor", "-m", str(demo_file)).stdout)
    assert "runs on llamacpp" in json.dumps(told)
    assert "llama-cpp-python 0.3.36" in json.dumps(told["packages"])


def test_what_llama_cpp_cannot_load_is_refused_in_one_line(demo_file: Path, tmp_path: Path) -> None:
    content = demo_file.read_bytes()
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(content.replace(b"llama", b"lmamx"))
    with pytest.raises(EngineMisconfigured, match="unknown model architecture") as caught:
        open_llamacpp(strange)
    assert "\n" not in caught.value.message
    missing = tmp_path / "missing.gguf"
    missing.write_bytes(content.replace(b"blk.3.attn_q.weight", b"blk.3.attn_z.weight"))
    with pytest.raises(EngineMisconfigured, match=r"blk\.3\.attn_q"):
        open_llamacpp(missing)


def test_file_that_ends_llama_cpp_while_it_loads_is_told_as_such(
    tiny_file: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(tiny_file.read_bytes().replace(b"gpt2", b"none", 1))  # the vocabulary's kind
    log = tmp_path / "engine.log"
    with pytest.raises(EngineDied, match="ended by SIGABRT while it loaded odd") as caught:
        ProcessEngine(make_config(odd), model="odd", log_path=log)
    assert str(log) in caught.value.message
    assert "GGML_ASSERT" in log.read_text()


def test_weights_that_are_no_numbers_cost_the_lines_and_not_the_engine(
    tiny_file: Path, tmp_path: Path, ask: Ask
) -> None:
    content = tiny_file.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[:-200_000] + b"\xff" * 200_000)
    sampling = SamplingParams(max_tokens=3)
    with closing(open_llamacpp(broken)) as engine:
        found = ask(engine, [Request(id=n, prompt="alpha", sampling=sampling) for n in range(9)])
    codes = [one.error.code if one.error else None for one in found.values()]
    assert codes == ["numerical_error"] * 9


def test_cache_that_no_memory_holds_is_refused(demo_file: Path) -> None:
    with pytest.raises(EngineOutOfMemory, match="cache_tokens"):
        open_llamacpp(demo_file, cache_tokens=2**31)


def test_engine_needs_no_torch(tiny_file: Path, ask: Ask) -> None:
    del ask
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from engine.config import LlamacppConfig; from engine.registry import open_engine\n"
        "from jobs.domain.request import Message, Request, SamplingParams\n"
        "from tests.sources import ListSource\n"
        "engine = open_engine(LlamacppConfig(model=sys.argv[1], slots=2, threads=1))\n"
        "asked = Request(id=1, messages=(Message('user', 'Hi'),),\n"
        "                sampling=SamplingParams(max_tokens=3, stop=('zzz',)))\n"
        "(found,) = engine.generate(ListSource([asked]))\n"
        "assert found.error is None, found.error\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tiny_file)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
