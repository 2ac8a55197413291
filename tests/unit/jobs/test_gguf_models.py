"""A .gguf file as a model's source: which engine it gets, and where it is refused."""

import importlib.util
from pathlib import Path

import pytest

from engine.config import LlamacppConfig
from jobs.domain.errors import EngineMisconfigured, InvalidInput
from jobs.model_settings import EngineChoice
from jobs.settings import Settings, complete_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_gguf_file_runs_on_llamacpp_without_saying_so(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate(
        {
            "models": {"mine": {"source": str(file), "options": {"slots": 3}}},
            "llamacpp": {"gpu_layers": 7, "threads": 2, "context_tokens": 99},
        }
    )
    for name in ("mine", str(file)):
        _, model, _ = complete_model(settings, name, check_installed=False)
        config = model.to_engine_config()
        assert isinstance(config, LlamacppConfig)
        assert (config.model, config.gpu_layers, config.threads) == (str(file), 7, 2)
        assert config.context_tokens == 99
        assert config.slots == (3 if name == "mine" else 16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(EngineMisconfigured, match=r"llama_cpp.*not installed.*llamacpp\]"):
        complete_model(settings, "mine")


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_gguf_file_is_refused_on_other_engines(file: Path, engine: EngineChoice) -> None:
    settings = Settings.model_validate({"models": {"mine": {"source": str(file)}}})
    with pytest.raises(InvalidInput, match="the llamacpp engine runs"):
        complete_model(settings, "mine", engine=engine, check_installed=False)


def test_quantization_of_a_gguf_file_is_its_own(file: Path) -> None:
    with pytest.raises(InvalidInput, match="quantization nf4 is not possible"):
        complete_model(Settings(), str(file), quantization="nf4", check_installed=False)


def test_llamacpp_needs_a_gguf_file() -> None:
    with pytest.raises(InvalidInput, match=r"needs a \.gguf file"):
        complete_model(Settings(), "demo", engine="llamacpp", check_installed=False)


def test_option_that_llamacpp_does_not_have_is_named(file: Path) -> None:
    with pytest.raises(ValueError, match="page_tokens"):
        Settings.model_validate(
            {"models": {"mine": {"source": str(file), "options": {"page_tokens": 3}}}}
        )
