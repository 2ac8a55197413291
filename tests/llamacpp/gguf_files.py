"""GGUF files of Llama models in transformers' format, as llama.cpp's own converter writes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

Array = npt.NDArray[np.float32]

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


TEMPLATE = "as the model"


def write_gguf(
    folder: Path, path: Path, kind: str = "f32", *, template: str | None = TEMPLATE
) -> None:
    """Write the model in `folder`, its matrices as `kind`."""
    tensor_type, file_type = _TYPES[kind]
    described = json.loads((folder / "config.json").read_text())
    heads, kv_heads = described["num_attention_heads"], described["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("test")
    writer.add_context_length(described["max_position_embeddings"])
    writer.add_embedding_length(described["hidden_size"])
    writer.add_block_count(described["num_hidden_layers"])
    writer.add_feed_forward_length(described["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_width = described.get("head_dim") or described["hidden_size"] // heads
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_layer_norm_rms_eps(described["rms_norm_eps"])
    writer.add_vocab_size(described["vocab_size"])
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(file_type)
    _add_tokenizer(writer, folder, described)
    if template == TEMPLATE:
        template = (folder / "chat_template.jinja").read_text()
    if template is not None:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, described["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == "lm_head.weight" and described["tie_word_embeddings"]:
            continue
        values: Array = tensor.float().numpy()
        if name.endswith("q_proj.weight"):
            values = _permute(values, heads)
        if name.endswith("k_proj.weight"):
            values = _permute(values, kv_heads)
        stored = tensor_type if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        writer.add_tensor(
            known,
            gguf.quants.quantize(values, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, described: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    spelled = {token: text for text, token in tokenizer["model"]["vocab"].items()}
    special = {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
    ids = range(described["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([special.get(token) or spelled[token] for token in ids])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in ids]
    )
    writer.add_token_merges(
        [one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]]
    )
    writer.add_eos_token_id(described["eos_token_id"])
    writer.add_pad_token_id(described["pad_token_id"])
    writer.add_add_bos_token(False)  # noqa: FBT003 -- the library's


def _permute(values: Array, heads: int) -> Array:
    """Interleave the halves of each head's rows, as llama.cpp rotates them."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
