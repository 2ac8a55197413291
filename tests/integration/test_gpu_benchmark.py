"""The benchmark for GPUs, on a machine without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.runs import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = REPOSITORY / "tests" / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_measured_without_a_gpu() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (0, "no CUDA device: nothing measured\n")


def test_small_mode_measures_both_kinds_of_weights_on_a_cpu(tmp_path: Path) -> None:
    done = run(
        *("--rows", "G7", "--device", "cpu", "--shape", "tiny", "--sequences", "1,4"),
        *("--prompt", "8"),
        *("--answer", "8", "--repeats", "1", "--json", str(tmp_path / "found.json")),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["engine"] for one in found["engines"]] == ["hf", "nf4"]
    assert found["versions"]["torch"]
    for engine in found["engines"]:
        assert [one["sequences"] for one in engine["runs"]] == [1, 4]
        for one in engine["runs"]:
            assert one["tokens_per_second"] > 0
            assert one["share_of_bound"] == pytest.approx(
                one["tokens_per_second"] / one["bound_tokens_per_second"]
            )
        assert engine["runs"][0]["over_one_by_one"] == 1
    assert [row["id"] for row in found["rows"]] == [
        "G7 nf4 ÷ bf16 1",
        "G7 nf4 4",
        "G7 nf4 ÷ bf16 4",
    ]
    half, four = found["engines"]
    assert four["weight_bytes_estimated"] < half["weight_bytes_estimated"]


def test_small_mode_measures_batches_on_a_cpu(tmp_path: Path) -> None:
    done = run(
        *("--rows", "G1,G4,G5,G6", "--device", "cpu", "--shape", "tiny"),
        *("--json", str(tmp_path / "found.json")),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] == []
    assert [row["id"] for row in found["rows"]] == [
        *("G1 W1", "G1 W2", "G4", "G4 saved", "G5", "G6"),
    ]
    assert all(row["low"] > 0 for row in found["rows"])
    assert next(row for row in found["rows"] if row["id"] == "G4 saved")["high"] <= 1
