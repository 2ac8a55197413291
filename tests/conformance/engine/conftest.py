"""The engines that the conformance suite runs over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.base import Engine
from engine.config import AskingConfig, HfConfig
from engine.registry import open_engine
from tests.unit.engine.conftest import tiny_model

__all__ = ["tiny_model"]


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


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "hf-float32": lambda folder: _open_hf(folder, compute_dtype="float32"),
    "hf-bfloat16": lambda folder: _open_hf(folder, compute_dtype="bfloat16"),
    "hf-nf4": lambda folder: _open_hf(folder, quantization="nf4"),
    "hf-outlines": lambda folder: _open_hf(
        folder, asking=AskingConfig(backend="outlines_core", max_asks=3)
    ),
}
"""Each opens an engine on a tiny model; one that needs none leaves the folder alone."""


@pytest.fixture(scope="module", params=list(ENGINES))
def open_conformant(request: pytest.FixtureRequest, tiny_model: Path) -> Callable[[], Engine]:
    opener = ENGINES[request.param]
    return lambda: opener(tiny_model)
