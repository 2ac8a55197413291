"""How much memory a model needs: weights, cache and one step, from its files and without torch.

Sizes follow from shapes, as the headers of the weights tell them, else as the configuration does.
What libraries take on top is an allowance. GB are 10^9 bytes, as the sizes of models are given.

Source of NF4's 0.516 bytes for each weight: Dettmers et al. 2023, QLoRA, section 3: 4 bits, an
8-bit constant for each block of 64, and a 32-bit one for each 256 of those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.checkpoint import Tensor, read_config, read_tensors

WeightKind = Literal["16 bit", "32 bit", "int8", "nf4", "fp4", "as stored"]
"""How weights are kept: nf4, fp4 and int8 are of the linear layers, the others stay at 16 bit."""

_LINEAR_BYTES: Mapping[WeightKind, float] = {
    "16 bit": 2.0,
    "32 bit": 4.0,
    "int8": 1.0,
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
    "fp4": 0.5 + 1 / 64 + 4 / (64 * 256),
}
# bitsandbytes repacks for a CPU at the first step: one bf16 constant for each block of 64.
_FOUR_BITS_ON_CPU = 0.5 + 2 / 64
_CACHE_ITEM_BYTES = 2

# What a process has beside the model. CPU: 0.4 GB was measured with the demo model, and large
# vocabularies take more. GPU: allowances for the CUDA context and the libraries' work spaces,
# with CUDA graphs for vLLM; not measured.
OVERHEAD_BYTES = {"cpu": 600_000_000, "hf": 1_000_000_000, "vllm": 2_000_000_000}

# Feed-forward layers of two matrices; all others have three (gate, up and down).
_PLAIN_FEED_FORWARD = frozenset(
    {
        *("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "codegen", "opt", "bloom", "mpt"),
        *("falcon", "phi", "starcoder2", "nemotron"),
    }
)
# Whose output layer is the embedding where config.json does not say.
_TIED = ("gemma", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "bloom", "falcon", "mpt", "cohere")
_BIASED_ATTENTION = ("qwen2",)
_LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "opt", "gpt_neo")
_EMBEDDINGS = ("embed", "wte", "wpe", "lm_head", "output_layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What decides a model's memory: numbers of parameters, and the widths of its layers."""

    linear: int
    """Parameters of linear layers, which quantization makes smaller."""
    experts: int
    """Parameters of experts: transformers keeps them as one tensor, which it does not quantize."""
    other: int
    """Embeddings, norms, routers and the output layer: at 16 bit in any case."""
    cache_values: int
    """Numbers kept for each token of a sequence: key and value, in all layers that keep any."""
    hidden: int
    widest: int
    vocabulary: int
    context_tokens: int
    stored_bytes: int | None = None
    stored_quantization: str = ""
    """How the checkpoint itself is quantized, such as awq; empty: not at all."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.linear + self.experts + self.other

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of 16-bit cache for each token; an upper bound where layers look back less far."""
        return self.cache_values * _CACHE_ITEM_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The memory of a model at work."""

    weights: int
    cache: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.overhead


def read_size(folder: Path) -> ModelSize | None:
    """Return the size of the model in `folder`, or None where its files do not tell it.

    config.json is enough.

    Raises:
        EngineMisconfigured: its files are damaged or incomplete.
    """
    described = read_config(folder)
    tensors = read_tensors(folder)
    size = size_of(described)
    return _with_tensors(size, described, tensors) if size and tensors else size


def size_of(described: Mapping[str, Any]) -> ModelSize | None:
    """Return the size that a config.json describes; None if it tells no shapes of a decoder."""
    try:
        return _Shapes(described).size()
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError):
        return None


class _Shapes:
    """The shapes of a decoder, by the names that families of models give them."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        text = described.get("text_config") or described.get("llm_config") or described
        self._text: Mapping[str, Any] = text
        self._whole = described
        self._type = str(text.get("model_type") or described.get("model_type") or "")
        self.hidden = self._whole_number("hidden_size", "n_embd", "d_model")
        self.layers = self._whole_number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        self.heads = self._whole_number("num_attention_heads", "n_head", "n_heads", "num_heads")
        self.vocabulary = self._whole_number("vocab_size")
        self.kv_heads = self._kv_heads()
        self.head_dim = self._optional("head_dim") or self.hidden // self.heads
        self.intermediate = (
            self._optional("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
            or 4 * self.hidden
        )
        if min(self.hidden, self.layers, self.heads, self.vocabulary, self.kv_heads) < 1:
            raise ValueError(self._type)

    def _optional(self, *names: str) -> int | None:
        for name in names:
            value = self._text.get(name)
            if value is not None and not isinstance(value, bool):
                # Some families list one number for each layer; the largest is on the safe side.
                return max(map(int, value)) if isinstance(value, list) else int(value)
        return None

    def _whole_number(self, *names: str) -> int:
        found = self._optional(*names)
        if found is None:
            raise KeyError(names[0])
        return found

    def _kv_heads(self) -> int:
        found = self._optional("num_key_value_heads", "num_kv_heads")
        if self._text.get("multi_query") and not self._text.get("new_decoder_architecture"):
            return 1
        return found or self.heads

    def _attention(self) -> int:
        """Return the parameters of one layer's attention."""
        latent = self._optional("kv_lora_rank")
        if latent:  # multi-head latent attention, of DeepSeek
            rotary = self._whole_number("qk_rope_head_dim")
            plain = self._whole_number("qk_nope_head_dim")
            value = self._whole_number("v_head_dim")
            queries = self.heads * (plain + rotary)
            low = self._optional("q_lora_rank")
            return (
                (low * (self.hidden + queries) if low else self.hidden * queries)
                + self.hidden * (latent + rotary)
                + latent * self.heads * (plain + value)
                + self.heads * value * self.hidden
            )
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    def _feed_forward(self, width: int) -> int:
        return (2 if self._type in _PLAIN_FEED_FORWARD else 3) * self.hidden * width

    def _expert_layers(self) -> int:
        """Return how many layers have experts instead of one feed-forward layer."""
        first = self._optional("first_k_dense_replace") or 0
        every = self._optional("decoder_sparse_step", "interleave_moe_layer_step") or 1
        dense = self._text.get("mlp_only_layers") or ()
        return sum(
            1
            for layer in range(first, self.layers)
            if (layer + 1) % every == 0 and layer not in dense
        )

    def size(self) -> ModelSize:
        num_experts = self._optional(
            "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
        )
        with_experts = self._expert_layers() if num_experts else 0
        experts = routers = shared = 0
        if num_experts and with_experts:
            width = self._optional("moe_intermediate_size") or self.intermediate
            experts = with_experts * num_experts * self._feed_forward(width)
            routers = with_experts * num_experts * self.hidden
            shared_width = self._optional("shared_expert_intermediate_size") or width * (
                self._optional("n_shared_experts") or 0
            )
            shared = with_experts * self._feed_forward(shared_width)
        plain_layers = self.layers - with_experts
        linear = self.layers * self._attention() + shared
        linear += plain_layers * self._feed_forward(self.intermediate)
        is_tied = self._whole.get("tie_word_embeddings", self._text.get("tie_word_embeddings"))
        if is_tied is None:
            is_tied = self._type.startswith(_TIED)
        other = self.vocabulary * self.hidden * (1 if is_tied else 2)
        other += (2 * self.layers + 1) * self.hidden + routers
        if self._text.get("attention_bias") or self._type.startswith(_BIASED_ATTENTION):
            other += self.layers * self.head_dim * (self.heads + 2 * self.kv_heads)
        context_tokens = (
            self._optional("max_position_embeddings", "n_positions", "max_seq_len") or 2048
        )
        if self._type in _LEARNED_POSITIONS:
            other += context_tokens * self.hidden
        described = self._whole.get("quantization_config") or {}
        return ModelSize(
            linear=linear,
            experts=experts,
            other=other,
            cache_values=self._cache_values(),
            hidden=self.hidden,
            widest=max(self.intermediate, self.heads * self.head_dim),
            vocabulary=self.vocabulary,
            context_tokens=context_tokens,
            stored_bytes=_stored_bytes(described, linear + experts, other),
            stored_quantization=str(described.get("quant_method") or ""),
        )

    def _cache_values(self) -> int:
        kinds = self._text.get("layer_types")
        layers = self.layers
        if isinstance(kinds, list):  # linear attention and state spaces keep no token apart
            layers = sum(kind in {"full_attention", "sliding_attention"} for kind in kinds)
        if self._optional("kv_lora_rank"):
            key = self._whole_number("qk_nope_head_dim") + self._whole_number("qk_rope_head_dim")
            return layers * self.heads * (key + self._whole_number("v_head_dim"))
        return 2 * layers * self.kv_heads * self.head_dim


def _stored_bytes(quantization: Mapping[str, Any], linear: int, other: int) -> int | None:
    """Return about what a quantized checkpoint takes, where its files are not here."""
    method = str(quantization.get("quant_method") or "")
    if not method:
        return None
    default = 4 if quantization.get("load_in_4bit") or method in {"awq", "gptq"} else 8
    bits = int(quantization.get("bits") or quantization.get("w_bit") or default)
    return int(linear * bits / 8 * 1.04 + other * 2)  # scales of groups of 128 take 4 %


def _with_tensors(
    size: ModelSize, described: Mapping[str, Any], tensors: Sequence[Tensor]
) -> ModelSize:
    """Return the size by the checkpoint's own tensors; only widths stay as config.json says."""
    stored = sum(tensor.num_bytes for tensor in tensors)
    quantized = bool(size.stored_quantization)
    is_tied = any(
        told.get("tie_word_embeddings") for told in (described, described.get("text_config") or {})
    )
    linear = experts = other = 0
    for tensor in tensors:
        if is_tied and tensor.name.startswith("lm_head."):
            continue  # written, and not loaded a second time
        if ".experts." in tensor.name and len(tensor.shape) > 1:
            experts += tensor.num_values
        elif len(tensor.shape) == 2 and not any(  # noqa: PLR2004  a matrix
            word in tensor.name for word in (*_EMBEDDINGS, "router", "mlp.gate.", ".gate.wg")
        ):
            linear += tensor.num_values
        else:
            other += tensor.num_values
    if quantized:  # packed numbers say nothing of how many there are
        linear, experts, other = size.linear, size.experts, size.other
    return ModelSize(
        linear=linear,
        experts=experts,
        other=other,
        cache_values=size.cache_values,
        hidden=size.hidden,
        widest=size.widest,
        vocabulary=size.vocabulary,
        context_tokens=size.context_tokens,
        stored_bytes=stored,
        stored_quantization=size.stored_quantization,
    )


def weight_bytes(
    size: ModelSize, kind: WeightKind, *, on_cpu: bool = False, packs_experts: bool = False
) -> int:
    """Return the memory of the weights.

    Args:
        on_cpu: where bitsandbytes keeps its constants at 16 bit.
        packs_experts: whether experts are quantized too; vLLM does it, transformers does not.
    """
    if kind == "as stored":
        if size.stored_bytes is not None:
            return size.stored_bytes
        kind = "16 bit"
    each = _FOUR_BITS_ON_CPU if kind in {"nf4", "fp4"} and on_cpu else _LINEAR_BYTES[kind]
    small, plain = (size.linear, size.other + size.experts)
    if packs_experts:
        small, plain = size.linear + size.experts, size.other
    return int(small * each + plain * (4.0 if kind == "32 bit" else 2.0))


def activation_bytes(size: ModelSize, kind: WeightKind, *, slots: int, batch_tokens: int) -> int:
    """Return about what one step needs beside weights and cache.

    The widest layer's inputs and outputs at 16 bit for every token of the step, the logits of
    every sequence as 32-bit numbers twice, and with a quantization the widest matrix unpacked.
    """
    step = max(batch_tokens, slots) * (6 * size.hidden + 3 * size.widest) * 2
    logits = 2 * slots * size.vocabulary * 4
    unpacked = size.hidden * size.widest * 2 if kind in {"nf4", "fp4", "int8"} else 0
    return step + logits + unpacked


def estimate(
    size: ModelSize,
    kind: WeightKind,
    *,
    engine: Literal["hf", "vllm"],
    on_cpu: bool,
    cache_tokens: int,
    slots: int,
    batch_tokens: int,
) -> Need:
    """Return what the model needs with `cache_tokens` tokens of all its sequences in the cache."""
    return Need(
        weights=weight_bytes(size, kind, on_cpu=on_cpu, packs_experts=engine == "vllm"),
        cache=cache_tokens * size.cache_bytes_per_token,
        activations=activation_bytes(size, kind, slots=slots, batch_tokens=batch_tokens),
        overhead=OVERHEAD_BYTES["cpu" if on_cpu else engine],
    )


def cache_tokens_left(size: ModelSize, need: Need, usable_bytes: int) -> int:
    """Return for how many tokens there is cache once everything else has its memory."""
    left = usable_bytes - (need.total - need.cache)
    return max(0, left // max(1, size.cache_bytes_per_token))
