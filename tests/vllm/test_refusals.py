"""What vLLM cannot run is refused with one clear line, most of it before anything is loaded."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.base import Engine
from engine.config import AskingConfig, VllmConfig
from engine.registry import open_engine
from engine.trust import digest_code
from engine.vllm.arguments import engine_arguments
from jobs.domain.errors import EngineError, EngineMisconfigured, EngineOutOfMemory
from jobs.domain.request import COMPLETIONS, Constraint, Message, Request, SamplingParams
from tests.vllm.conftest import Ask, make_config, open_vllm


def refusal(folder: Path, kind: type[EngineError] = EngineMisconfigured, **changes: object) -> str:
    with pytest.raises(kind) as caught:
        open_engine(make_config(folder, **changes), model="tiny")
    message = caught.value.message
    assert "\n" not in message
    assert len(message) < 800
    return message


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("max_num_batched_token", "max_num_batched_tokens"),
        ("swap_space", "recomputes"),
        ("trust_remote_code", "`trusted_code`"),
        ("code_revision", "`trusted_code`"),
        ("hf_config_path", "`source`"),
        ("worker_cls", "never run"),
        ("max_model_len", "`context_tokens`"),
        ("max_num_seqs", "`slots`"),
        ("nonsense_xyz", "no engine argument nonsense_xyz"),
    ],
)
def test_engine_arguments_that_are_none_are_named(tiny_model: Path, name: str, said: str) -> None:
    message = refusal(tiny_model, engine_args={name: 1})
    assert name in message
    assert said in message


def test_value_of_the_wrong_kind_is_refused(tiny_model: Path) -> None:
    assert "block_size" in refusal(tiny_model, engine_args={"block_size": "many"})


@pytest.mark.parametrize(
    ("quantization", "checkpoint", "said"),
    [
        ("awq", None, "not quantized"),
        ("gptq_marlin", None, "not quantized"),
        ("marlin", None, "gptq and awq"),
        ("nf4", None, "vllm-bnb-plugin"),
        ("nvfp4", "gptq", "quantized as gptq already"),
        ("fp8", "awq", "quantized as awq already"),
    ],
)
def test_quantization_that_does_not_fit_the_files_is_refused(
    copy: Path, quantization: str, checkpoint: str | None, said: str
) -> None:
    if checkpoint is not None:
        described = json.loads((copy / "config.json").read_text())
        described["quantization_config"] = {"quant_method": checkpoint}
        (copy / "config.json").write_text(json.dumps(described))
    assert said in refusal(copy, quantization=quantization)


def test_squeezellm_is_refused_with_the_reason(tiny_model: Path) -> None:
    message = refusal(tiny_model, engine_args={"quantization": "squeezellm"})
    assert "since 0.7" in message


@pytest.mark.parametrize("num_bytes", [0, 100, 20_000])
def test_damaged_safetensors_are_named(copy: Path, num_bytes: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert "model.safetensors is damaged" in refusal(copy)


def test_folder_without_weights_or_tokenizer_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no weights" in refusal(copy)
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(copy)
    shutil.rmtree(copy)
    assert "There is no folder" in refusal(copy)


def test_damaged_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "tokenizer" in refusal(copy)


def test_unknown_architecture_is_refused(copy: Path) -> None:
    described = json.loads((copy / "config.json").read_text())
    described |= {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}
    (copy / "config.json").write_text(json.dumps(described))
    assert "nosuch" in refusal(copy).lower()


def test_context_beyond_the_models_own_is_refused(tiny_model: Path) -> None:
    assert "512" in refusal(tiny_model, context_tokens=100_000)


def test_tensor_that_is_missing_is_told_from_the_child_that_found_it(copy: Path) -> None:
    """Only vLLM's own process knows; what it said last is what we say."""
    save_file({"odd.weight": np.zeros((2, 2), dtype=np.float32)}, copy / "model.safetensors")
    message = refusal(copy)
    assert "vLLM cannot load" in message
    assert "odd" in message
    assert "root cause" not in message


def test_cache_too_small_for_one_context_is_out_of_memory(tiny_model: Path) -> None:
    message = refusal(tiny_model, EngineOutOfMemory, engine_args={"kv_cache_memory_bytes": 100_000})
    assert "does not fit" in message
    assert "context_tokens" in message


# --- adapters, and a model without a chat template ---


def make_adapter(folder: Path, *, rank: int = 4) -> Path:
    """Write a LoRA adapter for the tiny model that changes every answer."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for part in ("q_proj", "v_proj"):
            width = 128 if part == "q_proj" else 64
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(rank, 128)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(width, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def test_adapter_that_is_none_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    assert "adapter_config.json" in refusal(tiny_model, adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "rank" in refusal(tiny_model, adapter=str(tmp_path))
    huge = make_adapter(tmp_path / "huge", rank=4)
    described = json.loads((huge / "adapter_config.json").read_text())
    (huge / "adapter_config.json").write_text(json.dumps({**described, "r": 4096}))
    assert "rank 4096" in refusal(tiny_model, adapter=str(huge))


def test_adapter_answers_differently_and_what_cannot_be_kept_is_refused(
    copy: Path, tiny: Engine, tmp_path: Path, ask: Ask
) -> None:
    """One engine for three things, since starting it takes long."""
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    described = json.loads((copy / "tokenizer_config.json").read_text())
    described.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(described))
    prompt = Request(id=1, prompt="Once", sampling=SamplingParams(temperature=0, max_tokens=20))
    base = ask(tiny, [prompt])[1]
    chat = Request(id=2, messages=(Message("user", "Hello"),))
    unique = json.dumps({"type": "array", "uniqueItems": True})
    held = Request(id=3, prompt="Once", constraint=Constraint("json_schema", unique))
    engine = open_vllm(
        copy,
        slots=2,
        adapter=str(make_adapter(tmp_path / "adapter")),
        asking=AskingConfig(on_unsupported_schema="refuse"),
    )
    try:
        found = ask(engine, [prompt, chat, held])
        assert engine.capabilities.endpoints == (COMPLETIONS,)
    finally:
        closing = time.monotonic()
        engine.close()
        engine.close()
    assert time.monotonic() - closing < 30
    assert found[1].error is None
    assert found[1].text != base.text
    assert found[1].usage.prompt_tokens == base.usage.prompt_tokens
    errors = {n: found[n].error for n in (2, 3)}
    assert errors[2] is not None
    assert "chat template" in errors[2].message
    assert errors[3] is not None
    assert errors[3].code == "schema_unsupported"


def test_code_of_a_model_is_trusted_only_as_it_was_pinned(copy: Path) -> None:
    (copy / "modeling_own.py").write_text("x = 1\n")
    described = json.loads((copy / "config.json").read_text())
    described |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "modeling_own.Own"}}
    (copy / "config.json").write_text(json.dumps(described))
    assert "only if an operator trusts it" in refusal(copy)
    pin = digest_code(copy)
    config = VllmConfig(model=str(copy), trusted_code=pin)
    assert engine_arguments(config, copy).trust_remote_code
    plain = VllmConfig(model=str(copy))
    with pytest.raises(EngineMisconfigured, match="trusted_code"):
        engine_arguments(plain, copy)
    elsewhere = config.model_copy(update={"engine_args": {"hf_overrides": {}}})
    with pytest.raises(EngineMisconfigured, match="hf_overrides"):
        engine_arguments(elsewhere, copy)
    (copy / "modeling_own.py").write_text("x = 2\n")
    assert "not the code that was trusted" in refusal(copy, trusted_code=pin)
