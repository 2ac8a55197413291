"""What every engine does, done by a real `vllm serve`: the same suite as for all others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.base import Engine
from engine.config import AskingConfig, RemoteConfig
from engine.demo import model_path
from engine.registry import open_engine
from jobs.domain.request import Constraint
from tests.conformance.engine.test_engine import *  # noqa: F403
from tests.remote.conftest import VllmServer

WAYS: dict[str, dict[str, Any]] = {
    "structured-outputs": {"native_constraints": "vllm"},
    "streamed": {"native_constraints": "vllm", "streaming": "always"},
    "response-format": {"native_constraints": "openai"},
}


@pytest.fixture(scope="module", params=list(WAYS))
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def open_conformant(way: dict[str, Any], vllm_server: VllmServer) -> Callable[[], Engine]:
    config = RemoteConfig(
        url=vllm_server.url,
        slots=16,
        context_tokens=2048,
        asking=AskingConfig(max_asks=2),
        **way,
    )
    return lambda: open_engine(config, model="demo")


@pytest.fixture(scope="module")
def enforces(way: dict[str, Any]) -> Callable[[Constraint], bool]:
    """Only vLLM's own way says so; what any server does with `response_format` is not known."""
    return lambda constraint: way["native_constraints"] == "vllm"  # noqa: ARG005


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return model_path()
