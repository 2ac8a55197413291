"""vLLM on the CPU, for real: engines that take half a minute to start are shared by all tests.

Run by `.venv-vllm/bin/python -m pytest tests/vllm`, an environment of its own that
`scripts/vllm_env.sh` makes.
"""

import gc
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine.base import Engine
from engine.config import AskingConfig, VllmConfig
from engine.demo import model_path
from jobs.domain.request import Request
from jobs.domain.result import Result
from tests.sources import ListSource
from tests.unit.engine.conftest import TOOLS_TEMPLATE, make_tiny_model

HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_LOGGING_STREAM="ext://sys.stderr",
        VLLM_NO_USAGE_STATS="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
    )
    with warnings.catch_warnings():
        # It imports what warns, and our tests take warnings for errors.
        warnings.simplefilter("ignore")
        import vllm.v1.engine.async_llm  # noqa: F401

CACHE_BYTES = 1 << 30
Ask = Callable[[Engine, Iterable[Request]], dict[int, Result]]


def pytest_configure(config: pytest.Config) -> None:
    # vLLM leaves its ZMQ contexts to the garbage collector.
    config.addinivalue_line("filterwarnings", "ignore:Unclosed context:ResourceWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    # Those that are left would be found by pytest's own last look, which knows no filter.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not HAS_VLLM:
            item.add_marker(
                pytest.mark.skip(reason="vllm is not installed here: sh scripts/vllm_env.sh")
            )


def make_config(model: Path, **changes: object) -> VllmConfig:
    settings = {
        "model": str(model),
        "dtype": "float32",
        "slots": 8,
        "engine_args": {"kv_cache_memory_bytes": CACHE_BYTES},
        **changes,
    }
    return VllmConfig.model_validate(settings)


def open_vllm(model: Path, *, name: str = "tiny", **changes: object) -> Engine:
    from engine.registry import open_engine  # noqa: PLC0415 -- only where vLLM is

    return open_engine(make_config(model, **changes), model=name)


class Kept:
    """An engine that outlives the module that borrows it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Stay open: others borrow it as well."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer Llama with a context of 512 tokens.

    Its heads are 32 wide: vLLM's attention for CPUs has nothing narrower.
    """
    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(folder, hidden_size=128, template=TOOLS_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> Iterator[Engine]:
    """A random model, four sequences at once."""
    with closing(open_vllm(tiny_model, slots=4, asking=AskingConfig(max_asks=2))) as engine:
        yield engine


@pytest.fixture(scope="session")
def demo() -> Iterator[Engine]:
    """The demo model, eight sequences at once."""
    with closing(open_vllm(model_path(), name="demo")) as engine:
        yield engine


@pytest.fixture(scope="session")
def ask() -> Ask:
    """Return a function that puts requests to an engine and collects one result for each."""

    def run(engine: Engine, requests: Iterable[Request]) -> dict[int, Result]:
        found: dict[int, Result] = {}
        for result in engine.generate(ListSource(requests)):
            assert result.id not in found, "two results for one request"
            found[result.id] = result
        return found

    return run
