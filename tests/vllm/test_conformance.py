"""What every engine does, done by vLLM: the same suite as for all others."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from engine.base import Engine
from jobs.domain.request import Constraint
from tests.conformance.engine.talking import every_constraint
from tests.conformance.engine.test_engine import *  # noqa: F403
from tests.vllm.conftest import Kept


@pytest.fixture(scope="module")
def open_conformant(tiny: Engine) -> Callable[[], Engine]:
    return lambda: cast("Engine", Kept(tiny))


@pytest.fixture(scope="module")
def enforces() -> Callable[[Constraint], bool]:
    return every_constraint


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path) -> Path:
    return tiny_model
