"""Models with Python code of their own on vLLM: run where it is trusted, and only there."""

from contextlib import closing
from pathlib import Path

import pytest

from engine.config import HfConfig
from engine.registry import open_engine
from engine.trust import digest_code
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.request import Request, SamplingParams
from tests.owncode import add_own_code
from tests.unit.engine.conftest import make_tiny_model
from tests.vllm.conftest import Ask, open_vllm

ASKED = [
    Request(id=n, prompt=f"Count to {n}", sampling=SamplingParams(max_tokens=8, temperature=0))
    for n in range(1, 4)
]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Return the file that is there once the model's code has run, in whichever process."""
    return tmp_path / "executed"


@pytest.fixture
def model(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a tiny model that nothing but its own code knows."""
    # The processes that vLLM starts take it from the environment, this one has read that already.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = tmp_path / "own"
    make_tiny_model(folder, hidden_size=128)
    add_own_code(folder, canary)
    return folder


@pytest.mark.timeout(300)
def test_code_that_an_operator_pinned_answers_as_on_the_hf_engine(
    model: Path, canary: Path, ask: Ask
) -> None:
    pin = digest_code(model)
    with closing(open_vllm(model, trusted_code=pin, slots=2, context_tokens=128)) as engine:
        found = ask(engine, ASKED)
    assert canary.exists()
    config = HfConfig(
        model=str(model), trusted_code=pin, device="cpu", compute_dtype="float32", num_blocks=16
    )
    with closing(open_engine(config, model="tiny")) as engine:
        expected = ask(engine, ASKED)
    assert [found[n].error for n in (1, 2, 3)] == [None] * 3
    assert {n: one.text for n, one in found.items()} == {n: e.text for n, e in expected.items()}


def test_code_that_nobody_pinned_or_that_changed_never_runs(model: Path, canary: Path) -> None:
    with pytest.raises(EngineMisconfigured, match="only if an operator trusts it"):
        open_vllm(model)
    pin = digest_code(model)
    with (model / "modeling_own.py").open("a") as file:
        file.write("#")
    with pytest.raises(EngineMisconfigured, match="is not the code that was trusted"):
        open_vllm(model, trusted_code=pin)
    assert not canary.exists()
