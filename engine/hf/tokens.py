"""What constraints know of a tokenizer."""

import llguidance
import llguidance.hf
from transformers import PreTrainedTokenizerFast


def constraint_tokenizer(
    tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, eos_tokens: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """Return llguidance's view of the tokenizer, as wide as the model's logits."""
    return llguidance.hf.from_tokenizer(
        tokenizer, n_vocab=vocab_size, eos_token=list(eos_tokens) or None
    )
