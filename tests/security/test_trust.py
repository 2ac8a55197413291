"""Row 18: Python code that a model brings runs only where an operator has pinned it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from engine import trust
from engine.config import HfConfig, VllmConfig
from engine.hf.engine import HfEngine
from engine.registry import describe_model
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.request import Request, SamplingParams
from jobs.model_settings import ModelSettings
from tests.owncode import add_own_code
from tests.sources import ListSource
from tests.unit.engine.conftest import make_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Return the file that is there once the model's code has run."""
    return tmp_path / "executed"


@pytest.fixture
def model(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a tiny model with code of its own."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = tmp_path / "own"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_own_code(folder, canary)
    return folder


def config_of(model: Path, pin: str | None) -> HfConfig:
    """Return what an entry of the catalogue makes of a pin."""
    entry = ModelSettings(
        source=str(model), engine="hf", trusted_code=pin, options={"device": "cpu", "num_blocks": 8}
    )
    config = entry.to_engine_config()
    assert isinstance(config, HfConfig)
    return config


def looks(config: HfConfig) -> tuple[Callable[[], object], ...]:
    return (lambda: describe_model(config, "m"), lambda: HfEngine(config, model="m"))


def test_code_that_nobody_trusts_is_refused_with_what_to_do(model: Path, canary: Path) -> None:
    for look in looks(config_of(model, None)):
        with pytest.raises(EngineMisconfigured, match="only if an operator trusts it") as refused:
            look()
        assert trust.digest_code(model) in refused.value.message
        assert "`trusted_code`" in refused.value.message
    assert not canary.exists()


@pytest.mark.timeout(120)
def test_code_that_an_operator_pinned_runs_and_answers(model: Path, canary: Path) -> None:
    config = config_of(model, trust.digest_code(model))
    untrusted = config.model_copy(update={"trusted_code": None})
    with pytest.raises(EngineMisconfigured):
        describe_model(untrusted, "m")
    engine = HfEngine(config, model="m")
    try:
        request = Request(id=1, prompt="alpha", sampling=SamplingParams(max_tokens=3))
        (result,) = engine.generate(ListSource([request]))
    finally:
        engine.close()
    assert result.error is None
    assert result.usage.completion_tokens > 0
    assert canary.exists()


@pytest.mark.parametrize("name", ["configuration_own.py", "modeling_own.py", "new/deeper.py"])
def test_code_that_changed_by_a_byte_is_refused(model: Path, canary: Path, name: str) -> None:
    config = config_of(model, trust.digest_code(model))
    before = describe_model(config, "m").fingerprint
    (model / name).parent.mkdir(exist_ok=True)
    with (model / name).open("a") as file:
        file.write("#")
    for look in looks(config):
        with pytest.raises(EngineMisconfigured, match="is not the code that was trusted"):
            look()
    assert not canary.exists()
    again = config_of(model, trust.digest_code(model))
    assert describe_model(again, "m").fingerprint != before, "another code, another model"


def test_code_of_another_repository_is_refused_even_where_the_folder_is_trusted(
    model: Path,
) -> None:
    path = model / "config.json"
    text = path.read_text().replace("modeling_own.Own", "evil/repo--modeling_own.Own")
    path.write_text(text)
    with pytest.raises(EngineMisconfigured, match="another repository"):
        describe_model(config_of(model, trust.digest_code(model)), "m")


def test_a_model_that_needs_none_of_its_code_runs_without_it(model: Path, canary: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace('"own_llama"', '"llama"'))
    assert describe_model(config_of(model, None), "m").engine == "hf"
    assert not canary.exists()


@pytest.mark.parametrize("kind", [HfConfig, VllmConfig])
def test_code_of_the_hub_is_trusted_by_its_commit_only(
    model: Path, tmp_path: Path, kind: type[HfConfig | VllmConfig]
) -> None:
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(model, snapshot)
    described = json.loads((snapshot / "config.json").read_text())

    def is_trusted(pin: str | None, revision: str | None) -> bool:
        config = kind(model="somebody/own", trusted_code=pin, revision=revision)
        return trust.trusts_code(config, snapshot, described)

    assert is_trusted(COMMIT, COMMIT)
    for pin, revision in (
        (COMMIT, None),
        (COMMIT, "main"),
        ("f" * 40, "f" * 40),
        ("main", "main"),
        (trust.digest_code(snapshot), COMMIT),
    ):
        with pytest.raises(EngineMisconfigured, match=COMMIT):
            is_trusted(pin, revision)
    entry = ModelSettings(source="somebody/own", engine="hf", trusted_code=COMMIT)
    config = entry.to_engine_config()
    assert isinstance(config, HfConfig)
    assert (config.revision, config.trusted_code) == (COMMIT, COMMIT)


@pytest.mark.parametrize(
    "entry",
    [
        {"source": "somebody/own", "trusted_code": "main"},
        {"source": "somebody/own", "trusted_code": True},
        {"source": "somebody/own", "trusted_code": COMMIT, "revision": "main"},
        {"source": "somebody/own", "engine": "hf", "options": {"trusted_code": COMMIT}},
        {"source": "somebody/own", "engine": "hf", "options": {"trust_remote_code": True}},
        {"engine": "simulated", "trusted_code": COMMIT},
    ],
    ids=lambda entry: json.dumps(entry)[:40],
)
def test_settings_that_pin_nothing_are_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelSettings.model_validate(entry)
