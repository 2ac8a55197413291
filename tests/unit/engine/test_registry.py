import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.asking import Asking
from engine.config import GenerationDefaults, HfConfig, SimulatedConfig, VllmConfig
from engine.registry import describe_model, open_engine
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.request import COMPLETIONS, TEXT_ENDPOINTS, Capabilities


def test_model_is_described_from_its_files(tiny_model: Path) -> None:
    found = describe_model(HfConfig(model=str(tiny_model)), "tiny")
    assert found.model == "tiny"
    assert found.engine == "hf"
    assert found.context_tokens == 512
    assert found.endpoints == TEXT_ENDPOINTS
    shorter = describe_model(HfConfig(model=str(tiny_model), context_tokens=100), "tiny")
    assert shorter.context_tokens == 100


def test_description_tells_slots_quantization_and_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    config = HfConfig(model=str(copy), slots=7, quantization="nf4")
    found = describe_model(config, "tiny")
    assert (found.num_slots, found.quantization, found.cache_tokens) == (7, "nf4", 0)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert describe_model(config, "tiny").tokenizer_hash == found.tokenizer_hash
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    assert describe_model(config, "tiny").tokenizer_hash != found.tokenizer_hash
    assert describe_model(SimulatedConfig(slots=3), "simulated").num_slots == 3


def test_describing_needs_no_torch(tiny_model: Path) -> None:
    program = (
        "import sys; from engine.config import HfConfig; from engine.registry import "
        "describe_model; describe_model(HfConfig(model=sys.argv[1]), 'x'); "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_model)], check=True, env={**os.environ})


def test_fingerprint_changes_with_what_could_change_answers(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = HfConfig(model=str(tiny_model))
    first = describe_model(config, "a").fingerprint
    assert describe_model(config, "b").fingerprint == first
    assert describe_model(config.model_copy(update={"slots": 7}), "a").fingerprint == first
    copy = tmp_path / "moved"
    shutil.copytree(tiny_model, copy)
    assert describe_model(HfConfig(model=str(copy)), "a").fingerprint == first
    for change in (
        {"quantization": "nf4"},
        {"compute_dtype": "float32"},
        {"defaults": GenerationDefaults(temperature=0.1)},
    ):
        assert describe_model(config.model_copy(update=change), "a").fingerprint != first
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert describe_model(HfConfig(model=str(copy)), "a").fingerprint != first


def test_identity_changes_with_the_weights_where_the_fingerprint_cannot(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    content, before = weights.read_bytes(), weights.stat()

    def describe(**changes: Any) -> Capabilities:  # noqa: ANN401
        return describe_model(HfConfig(model=str(copy), **changes), "a")

    def write(written: bytes, *, later_ns: int = 0) -> None:
        weights.write_bytes(written)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + later_ns))

    first = describe()
    found = {first.identity}
    for change in (
        lambda: write(content[:-1] + bytes([content[-1] ^ 1])),
        lambda: write(content + b"x"),
        lambda: write(content, later_ns=10_000_000),
        lambda: (copy / "further.bin").write_bytes(b"x"),
    ):
        change()
        again = describe()
        assert again.fingerprint == first.fingerprint
        found.add(again.identity)
    assert len(found) == 5
    (copy / "further.bin").unlink()
    write(content)
    assert describe().identity == first.identity
    assert describe(slots=7, batch_tokens=99).identity == first.identity, "no answer hangs on it"
    assert describe(flash_attention=True).identity != first.identity


def test_identity_changes_with_an_adapter_and_the_arguments_of_vllm(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"one")

    def identity(**changes: Any) -> str:  # noqa: ANN401
        return describe_model(VllmConfig(model=str(tiny_model), **changes), "a").identity

    found = [identity(), identity(adapter=str(adapter)), identity(engine_args={"seed": 3})]
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    found.append(identity(adapter=str(adapter)))
    assert len(set(found)) == 4
    assert identity(slots=7) == identity()


def test_a_model_of_the_hub_is_known_by_its_commit(tiny_model: Path, tmp_path: Path) -> None:
    """Its weights may come later than its description."""
    found = []
    for commit in ("abc", "def"):
        folder = tmp_path / "snapshots" / commit
        shutil.copytree(tiny_model, folder)
        with_weights = describe_model(HfConfig(model=str(folder)), "a").identity
        (folder / "model.safetensors").unlink()
        found.append(describe_model(HfConfig(model=str(folder)), "a").identity)
        assert found[-1] == with_weights
    assert found[0] != found[1]


def test_model_without_a_template_serves_completions_only(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "plain"
    shutil.copytree(tiny_model, copy)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert describe_model(HfConfig(model=str(copy)), "a").endpoints == (COMPLETIONS,)


@pytest.mark.parametrize(
    ("lost", "told"), [("config.json", "config.json"), ("tokenizer.json", "tokenizer.json")]
)
def test_folder_that_is_no_model_says_what_is_missing(
    tiny_model: Path, tmp_path: Path, lost: str, told: str
) -> None:
    copy = tmp_path / "broken"
    shutil.copytree(tiny_model, copy)
    (copy / lost).unlink()
    with pytest.raises(EngineMisconfigured, match=told):
        describe_model(HfConfig(model=str(copy)), "a")


def test_model_that_brings_code_is_refused_and_its_code_not_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "foreign"
    shutil.copytree(tiny_model, copy)
    canary = tmp_path / "canary"
    (copy / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    described = json.loads((copy / "config.json").read_text())
    described["model_type"] = "evil"
    described["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (copy / "config.json").write_text(json.dumps(described))
    with pytest.raises(EngineMisconfigured, match="code of its own"):
        open_engine(HfConfig(model=str(copy), device="cpu"))
    assert not canary.exists()


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_model, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(EngineMisconfigured):
        open_engine(HfConfig(model=str(copy), device="cpu"))


def test_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineMisconfigured, match="no folder /not/here"):
        describe_model(HfConfig(model="/not/here"), "a")


def test_hub_model_that_cannot_be_fetched_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = HfConfig(model="nobody/nothing", cache_folder=str(tmp_path))
    with pytest.raises(EngineMisconfigured, match="hf download nobody/nothing"):
        describe_model(config, "a")


def test_simulated_engine_opens_with_its_answers_watched() -> None:
    engine = open_engine(SimulatedConfig(), model="fake")
    assert isinstance(engine, Asking)
    assert engine.capabilities.model == "fake"
    engine.close()
