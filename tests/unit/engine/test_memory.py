import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from engine import memory
from engine.config import HfConfig
from engine.hf import weights
from engine.memory import (
    ModelSize,
    WeightKind,
    cache_tokens_left,
    estimate,
    weight_bytes,
)

GB = 1e9


def size_of(config: Mapping[str, Any]) -> ModelSize:
    size = memory.size_of(config)
    assert size is not None
    return size


def read_size(folder: Path) -> ModelSize:
    size = memory.read_size(folder)
    assert size is not None
    return size


def llama2(hidden: int, layers: int, heads: int, intermediate: int, **more: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        **more,
    }


def qwen25(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }


LLAMA_7B = llama2(4096, 32, 32, 11008, num_key_value_heads=32)
LLAMA_13B = llama2(5120, 40, 40, 13824, num_key_value_heads=40)
LLAMA_70B = llama2(8192, 80, 64, 28672, num_key_value_heads=8)
QWEN_3B = qwen25(2048, 36, 16, 11008)
QWEN_1_5B = qwen25(1536, 28, 12, 8960)


@pytest.mark.parametrize(
    ("config", "parameters", "half", "four_bit"),
    [
        pytest.param(LLAMA_7B, 6_738_415_616, 14, (4, 4.5), id="7B"),
        pytest.param(LLAMA_13B, 13_015_864_320, 26, (7, 7), id="13B"),
        pytest.param(LLAMA_70B, 68_976_648_192, 140, (35, 35), id="70B"),
        pytest.param(QWEN_3B, 3_085_938_688, 6, (2, 2), id="3B"),
        pytest.param(QWEN_1_5B, 1_543_714_304, 3, (1.2, 1.2), id="1.5B"),
    ],
)
def test_estimates_agree_with_the_known_sizes(
    config: dict[str, Any], parameters: int, half: float, four_bit: tuple[float, float]
) -> None:
    size = size_of(config)
    assert size.parameters == parameters
    assert weight_bytes(size, "16 bit") / GB == pytest.approx(half, rel=0.1)
    low, high = four_bit
    assert 0.9 * low <= weight_bytes(size, "nf4") / GB <= 1.1 * high


def test_cache_of_a_token_is_key_and_value_of_every_layer() -> None:
    assert size_of(LLAMA_7B).cache_bytes_per_token == 2 * 32 * 32 * 128 * 2
    assert size_of(LLAMA_70B).cache_bytes_per_token == 2 * 80 * 8 * 128 * 2
    mixed = LLAMA_7B | {"layer_types": ["linear_attention", "full_attention"] * 16}
    assert size_of(mixed).cache_bytes_per_token == 2 * 16 * 32 * 128 * 2


SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
        ("gemma2", {"head_dim": 64}),
        ("gemma3_text", {"head_dim": 64}),
        ("phi3", {}),
        ("granite", {}),
        ("starcoder2", {}),
        ("mixtral", {"num_local_experts": 8}),
        (
            "qwen3_moe",
            {"num_experts": 8, "moe_intermediate_size": 128, "mlp_only_layers": [0]},
        ),
        ("gpt2", {"num_key_value_heads": 8, "intermediate_size": 1024, "n_positions": 512}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_of_a_family_give_the_parameters_that_its_model_has(
    family: str, change: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(family, **(SMALL | change))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(one.numel() for one in model.parameters())
    assert size_of(json.loads(config.to_json_string())).parameters == pytest.approx(
        parameters, rel=0.005
    )


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    ("family", "change"), [("llama", {}), ("mixtral", {"num_local_experts": 4})]
)
def test_estimate_is_what_a_loaded_model_takes(
    tiny_model: Path, tmp_path: Path, family: str, change: dict[str, Any], quantization: str
) -> None:
    config = AutoConfig.for_model(family, **(SMALL | change))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    loaded = weights.load(
        HfConfig.model_validate(
            {"model": str(tmp_path), "quantization": quantization, "device": "cpu"}
        )
    )
    kinds: dict[str, WeightKind] = {"nf4": "nf4", "fp4": "fp4", "int8": "int8"}
    kind = kinds.get(quantization, "16 bit")
    expected = weight_bytes(read_size(tmp_path), kind)
    assert loaded.model.get_memory_footprint() == pytest.approx(expected, rel=0.02)


def test_headers_go_before_shapes(tiny_model: Path) -> None:
    by_shapes = size_of(json.loads((tiny_model / "config.json").read_text()))
    by_headers = read_size(tiny_model)
    assert by_headers.parameters == by_shapes.parameters
    assert by_headers.linear == by_shapes.linear
    assert by_headers.stored_bytes == by_headers.parameters * 4  # saved as float32


def test_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    assert read_size(tmp_path) == size_of(LLAMA_7B)


def test_text_part_of_a_model_with_several_is_what_counts() -> None:
    nested = {"model_type": "gemma3", "text_config": LLAMA_7B, "vision_config": {"x": 1}}
    assert size_of(nested).linear == size_of(LLAMA_7B).linear


def test_quantized_checkpoint_takes_what_is_stored() -> None:
    awq = LLAMA_7B | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    size = size_of(awq)
    assert size.stored_quantization == "awq"
    assert weight_bytes(size, "as stored") / GB == pytest.approx(3.9, rel=0.05)
    assert weight_bytes(size_of(LLAMA_7B), "as stored") == weight_bytes(size_of(LLAMA_7B), "16 bit")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        LLAMA_7B | {"hidden_size": "wide"},
        LLAMA_7B | {"num_attention_heads": 0},
        LLAMA_7B | {"text_config": 3},
    ],
    ids=["nothing", "only a type", "a word", "no heads", "no object"],
)
def test_size_is_not_guessed_where_the_config_tells_none(config: dict[str, Any]) -> None:
    assert memory.size_of(config) is None


shapes = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(1, 64).map(lambda n: n * 128),
        "num_hidden_layers": st.integers(1, 128),
        "num_attention_heads": st.sampled_from([8, 16, 32, 64]),
        "num_key_value_heads": st.sampled_from([1, 2, 8]),
        "intermediate_size": st.integers(128, 40_000),
        "vocab_size": st.integers(100, 300_000),
    }
)
kinds = st.sampled_from(["16 bit", "32 bit", "int8", "nf4"])


@given(
    shape=shapes,
    more=st.sampled_from(["num_hidden_layers", "intermediate_size", "vocab_size"]),
    kind=kinds,
    on_cpu=st.booleans(),
)
def test_larger_model_never_needs_less(
    shape: dict[str, int], more: str, kind: WeightKind, *, on_cpu: bool
) -> None:
    def total(config: dict[str, int]) -> int:
        return estimate(
            size_of(config),
            kind,
            engine="hf",
            on_cpu=on_cpu,
            cache_tokens=4096,
            slots=32,
            batch_tokens=512,
        ).total

    assert total(shape | {more: shape[more] + 1}) > total(shape)


@given(shape=shapes)
def test_fewer_bits_never_need_more(shape: dict[str, int]) -> None:
    size = size_of(shape)
    order: list[WeightKind] = ["nf4", "int8", "16 bit", "32 bit"]
    needed = [weight_bytes(size, kind) for kind in order]
    assert needed == sorted(needed)
    assert weight_bytes(size, "nf4", on_cpu=True) >= weight_bytes(size, "nf4")


@given(shape=shapes, usable=st.integers(0, 10**12), tokens=st.integers(1, 100_000))
def test_cache_that_is_left_fits_and_no_token_more(
    shape: dict[str, int], usable: int, tokens: int
) -> None:
    size = size_of(shape)
    need = estimate(
        size,
        "16 bit",
        engine="vllm",
        on_cpu=False,
        cache_tokens=tokens,
        slots=256,
        batch_tokens=2048,
    )
    left = cache_tokens_left(size, need, usable)
    without = replace(need, cache=0).total
    each = size.cache_bytes_per_token
    assert left == 0 or without + left * each <= usable
    assert without + (left + 1) * each > usable
    assert (left >= tokens) == (need.total <= usable)


def test_experts_are_quantized_by_vllm_and_not_by_transformers() -> None:
    size = size_of(LLAMA_7B | {"num_local_experts": 8})
    assert weight_bytes(size, "nf4") > 0.9 * weight_bytes(size, "16 bit")
    assert weight_bytes(size, "nf4", packs_experts=True) < 0.3 * weight_bytes(size, "16 bit")


def test_no_torch_is_needed(tiny_model: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from engine.memory import read_size; "
        "read_size(Path(sys.argv[1])); "
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_model)], check=True)
