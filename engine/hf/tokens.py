"""What constraints know of a tokenizer."""

import llguidance
import llguidance.hf
from transformers import PreTrainedTokenizerFast

_FEW_TOKENS = 4096
"""Up to so many, walking all of them costs less than asking first which kinds of token a schema
allows everywhere: with 1,280, compiling and masks take a quarter less."""


def constraint_tokenizer(
    tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, eos_tokens: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """Return llguidance's view of the tokenizer, as wide as the model's logits."""
    slices: list[str] | None = [] if len(tokenizer) <= _FEW_TOKENS else None
    return llguidance.hf.from_tokenizer(
        tokenizer, n_vocab=vocab_size, eos_token=list(eos_tokens) or None, slices=slices
    )
