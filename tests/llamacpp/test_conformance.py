"""What every engine does, done by llama.cpp: the same suite as for all others."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.base import Engine
from engine.config import AskingConfig
from jobs.domain.request import Constraint
from tests.conformance.engine.talking import every_constraint
from tests.conformance.engine.test_engine import *  # noqa: F403
from tests.llamacpp.conftest import open_llamacpp


@pytest.fixture(scope="module", params=["one-step", "small-steps"])
def open_conformant(request: pytest.FixtureRequest, tiny_file: Path) -> Callable[[], Engine]:
    """Prompts whole, and in pieces of eight tokens in a cache that is too small for all."""
    small = request.param == "small-steps"
    return lambda: open_llamacpp(
        tiny_file,
        asking=AskingConfig(max_asks=2),
        batch_tokens=8 if small else 512,
        cache_tokens=512 if small else None,
    )


@pytest.fixture(scope="module")
def enforces() -> Callable[[Constraint], bool]:
    return every_constraint


@pytest.fixture(scope="module")
def model_folder(files: Path) -> Path:
    return files / "tiny"
