"""Memory that a step frees stays with the process, so that the next step need not fetch it."""

import os
import subprocess
import sys

import pytest

from engine.demo import model_path

ROUNDS = """
import resource, sys
import torch
from engine.config import HfConfig
from engine.hf import weights

if len(sys.argv) > 1:
    weights.load(HfConfig(model=sys.argv[1], device="cpu"))
torch.set_num_threads(1)
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(1 << 20) for _ in range(32)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_ALL_PAGES = 32 * (4 << 20) // 4096


def faults(*arguments: str) -> int:
    """Return how many pages the ninth round of 32 pieces of 4 MiB had to ask the kernel for."""
    ended = subprocess.run(
        [sys.executable, "-c", ROUNDS, *arguments],
        # Without it glibc adapts, and whether it gives back hangs on what lies above.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return int(ended.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another malloc")
@pytest.mark.timeout(300)
def test_a_process_with_a_model_on_the_cpu_does_not_fetch_the_same_memory_again() -> None:
    assert faults(str(model_path())) < _ALL_PAGES // 100
    assert faults() > _ALL_PAGES // 2, "without, each round fetches all of it"
