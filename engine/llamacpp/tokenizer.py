"""The vocabulary of a GGUF file, as prompts and constraints need it: tokenized by llama.cpp itself.

It has the shape of transformers' fast tokenizers, so prompts are made by the one encoder that all
engines share, and templates are rendered in the one sandbox.
"""

import ctypes
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import llama_cpp
import llguidance
import llguidance.llamacpp
from transformers.utils.chat_template_utils import render_jinja_template

from jobs.domain.errors import EngineMisconfigured

_MOST_BYTES = 2**31 - 1


class Encoding(NamedTuple):
    """The tokens of a text."""

    ids: list[int]


class AddedToken(NamedTuple):
    """A token beside the vocabulary of texts."""

    content: str
    special: bool


class Vocabulary:
    """Encodes and decodes with a loaded model's vocabulary, which has to outlive it."""

    def __init__(self, vocab: Any, *, chat_template: str | None) -> None:  # noqa: ANN401 -- a pointer
        self._vocab = vocab
        self.chat_template = chat_template
        self.num_tokens = int(llama_cpp.llama_vocab_n_tokens(vocab))
        special = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        added = special | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        attributes = {
            token: int(llama_cpp.llama_vocab_get_attr(vocab, token))
            for token in range(self.num_tokens)
        }
        self.added_tokens_decoder: Mapping[int, AddedToken] = {
            token: AddedToken(self._text_of(token), bool(attribute & special))
            for token, attribute in attributes.items()
            if attribute & added
        }
        ends = [t for t in range(self.num_tokens) if llama_cpp.llama_vocab_is_eog(vocab, t)]
        first = int(llama_cpp.llama_vocab_eos(vocab))
        self.end_tokens = tuple(sorted(ends, key=lambda token: token != first))
        """Those that end an answer, the model's end of sequence first."""
        named = {
            "bos_token": llama_cpp.llama_vocab_bos(vocab),
            "eos_token": llama_cpp.llama_vocab_eos(vocab),
            "sep_token": llama_cpp.llama_vocab_sep(vocab),
            "pad_token": llama_cpp.llama_vocab_pad(vocab),
        }
        self._named = {name: self._text_of(t) for name, t in named.items() if t >= 0}

    @property
    def backend_tokenizer(self) -> "Vocabulary":
        """What encodes and decodes: this."""
        return self

    def no_truncation(self) -> None:
        """Cut nothing off, as always here."""

    def no_padding(self) -> None:
        """Add nothing to fill up, as always here."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding:
        """Return the tokens of a text; those that it spells are read as such."""
        given = sequence.encode("utf-8", "replace")
        if len(given) > _MOST_BYTES:
            raise ValueError("longer than llama.cpp can take")
        # No text has more tokens than bytes, but for those that a model adds at either end.
        room = len(given) + 4
        tokens = (llama_cpp.llama_token * room)()
        reads_special = True
        found = llama_cpp.llama_tokenize(
            self._vocab, given, len(given), tokens, room, add_special_tokens, reads_special
        )
        if found < 0:
            raise ValueError("llama.cpp cannot tokenize a text")
        return Encoding(list(tokens[:found]))

    def encode_batch_fast(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[Encoding]:
        """Return the tokens of each text."""
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; U+FFFD stands for bytes that are no character."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 16
        drops_ends, shows_special = False, not skip_special_tokens
        while True:
            text = ctypes.create_string_buffer(room)
            found = llama_cpp.llama_detokenize(
                self._vocab, tokens, len(ids), text, room, drops_ends, shows_special
            )
            if found >= 0:
                return text.raw[:found].decode("utf-8", "replace")
            room = -found

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:  # noqa: ANN401
        """Render messages as transformers does, with its own sandbox.

        Args:
            options: what the template sees; `tokenize` has no meaning here.
        """
        options.pop("tokenize", None)
        found: Any = render_jinja_template(
            [conversation], chat_template=self.chat_template, **{**self._named, **options}
        )
        return str(found[0][0])

    def constraint_tokenizer(self) -> llguidance.LLTokenizer:
        """Return llguidance's view of the vocabulary, as wide as the model's logits.

        Raises:
            EngineMisconfigured: its tokens are not what texts are made of.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a name that it still uses
            try:
                return llguidance.llamacpp.lltokenizer_from_vocab(
                    self._vocab, n_vocab=self.num_tokens, eos_token=list(self.end_tokens) or None
                )
            except ValueError as error:
                raise EngineMisconfigured(
                    f"The model's vocabulary cannot be used ({str(error)[:200]}); convert it again."
                ) from error

    def _text_of(self, token: int) -> str:
        found = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return str((found or b"").decode("utf-8", "replace"))
