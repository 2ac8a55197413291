"""The engines that the conformance suite runs over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.base import Engine
from engine.config import AskingConfig, HfConfig, SimulatedConfig
from engine.registry import open_engine
from jobs.domain.request import Constraint
from tests.conformance.engine.talking import every_constraint
from tests.unit.engine.conftest import TOOLS_TEMPLATE, make_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _open_hf(folder: Path, **changes: object) -> Engine:
    settings = {
        "model": str(folder),
        "device": "cpu",
        "slots": 4,
        "batch_tokens": 64,
        "page_tokens": 16,
        "num_blocks": 128,
        "asking": AskingConfig(max_asks=2),
        **changes,
    }
    return open_engine(HfConfig.model_validate(settings), model="tiny")


def _open_simulated(folder: Path) -> Engine:
    del folder
    config = SimulatedConfig(step_seconds=0.0001, slots=8, context_tokens=512)
    return open_engine(config, model="tiny")


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "simulated": _open_simulated,
    "hf-float32": lambda folder: _open_hf(folder, compute_dtype="float32"),
    "hf-bfloat16": lambda folder: _open_hf(folder, compute_dtype="bfloat16"),
    "hf-nf4": lambda folder: _open_hf(folder, quantization="nf4"),
    "hf-outlines": lambda folder: _open_hf(
        folder, asking=AskingConfig(backend="outlines_core", max_asks=3)
    ),
}
"""Each opens an engine on a tiny model; one that needs none leaves the folder alone."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random model with a context of 512 tokens that is shown tools."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(folder, hidden_size=64, template=TOOLS_TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=list(ENGINES))
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def open_conformant(engine_name: str, tiny_model: Path) -> Callable[[], Engine]:
    opener = ENGINES[engine_name]
    return lambda: opener(tiny_model)


@pytest.fixture(scope="module")
def enforces(engine_name: str) -> Callable[[Constraint], bool]:
    """Return which of the suite's constraints the engine has to keep while generating."""
    if engine_name != "hf-outlines":
        return every_constraint
    return lambda constraint: "minimum" not in constraint.spec  # a keyword that it leaves out


@pytest.fixture(scope="module")
def model_folder(engine_name: str, tiny_model: Path) -> Path | None:
    """Return the folder of the engine's model, or None where it has none."""
    return None if engine_name == "simulated" else tiny_model
