"""llama.cpp for real, on GGUF files written from the bundled model and from a random one.

Run by `.venv-llamacpp/bin/python -m pytest tests/llamacpp`, an environment that
`scripts/llamacpp_env.sh` makes: it compiles llama.cpp once.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine.base import Engine
from engine.config import AskingConfig, LlamacppConfig
from engine.demo import model_path
from engine.registry import open_engine
from jobs.domain.request import Request
from jobs.domain.result import Result
from tests.sources import ListSource
from tests.unit.engine.conftest import TOOLS_TEMPLATE, make_tiny_model

HAS_LLAMACPP = importlib.util.find_spec("llama_cpp") is not None
Ask = Callable[[Engine, Iterable[Request]], dict[int, Result]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        if not HAS_LLAMACPP:
            item.add_marker(
                pytest.mark.skip(reason="llama_cpp is not installed: sh scripts/llamacpp_env.sh")
            )


def make_config(model: Path, **changes: object) -> LlamacppConfig:
    settings = {
        "model": str(model),
        "slots": 4,
        "threads": 1,
        "cache_dtype": "float32",
        **changes,
    }
    return LlamacppConfig.model_validate(settings)


def open_llamacpp(model: Path, *, name: str = "tiny", **changes: object) -> Engine:
    return open_engine(make_config(model, **changes), model=name)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the bundled model as demo-KIND.gguf and a random one as tiny.gguf."""
    from tests.llamacpp.gguf_files import write_gguf  # noqa: PLC0415 -- only where gguf is

    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("f32", "f16", "q8_0", "q4_0"):
        write_gguf(model_path(), folder / f"demo-{kind}.gguf", kind)
    make_tiny_model(folder / "tiny", hidden_size=64, template=TOOLS_TEMPLATE)
    write_gguf(folder / "tiny", folder / "tiny.gguf")
    return folder


@pytest.fixture(scope="session")
def tiny_file(files: Path) -> Path:
    """Return the random model's file; its context is 512 tokens."""
    return files / "tiny.gguf"


@pytest.fixture(scope="session")
def demo_file(files: Path) -> Path:
    """Return the bundled model's file, in float32."""
    return files / "demo-f32.gguf"


@pytest.fixture(scope="module")
def tiny(tiny_file: Path) -> Iterator[Engine]:
    """A random model, four sequences at once."""
    with closing(open_llamacpp(tiny_file, asking=AskingConfig(max_asks=2))) as engine:
        yield engine


@pytest.fixture(scope="module")
def demo(demo_file: Path) -> Iterator[Engine]:
    """The bundled model, eight sequences at once."""
    with closing(open_llamacpp(demo_file, name="demo", slots=8)) as engine:
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
