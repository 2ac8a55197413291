"""A tiny random model with a byte-level tokenizer and a chat template, made once per session."""

import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.base import Engine, Source
from jobs.domain.request import Request
from jobs.domain.result import Result
from tests.sources import ListSource
from tests.unit.engine.loopback import OpenRemote

TEMPLATE = (
    "{%- for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)

TOOLS_TEMPLATE = "{%- if tools %}{{ tools | tojson }}{%- endif %}" + TEMPLATE
"""The same, for models that are shown tools."""


def make_tokenizer(vocab_size: int = 640) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
    )
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    tokenizer.train_from_iterator(
        [(stdlib / name).read_text() for name in ("json/decoder.py", "textwrap.py")], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token="<|im_end|>",  # noqa: S106 -- no password
        pad_token="<|pad|>",  # noqa: S106 -- no password
        unk_token="<|endoftext|>",  # noqa: S106 -- no password
        model_max_length=512,
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_tiny_model(folder: Path, *, hidden_size: int, template: str = TEMPLATE) -> None:
    """Save a random two-layer Llama with four heads and a context of 512 tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer Llama with a context of 512 tokens."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(folder, hidden_size=64)
    return folder


Ask = Callable[..., dict[int, Result]]


@pytest.fixture
def make_source() -> Callable[..., Source]:
    return ListSource


@pytest.fixture
def ask() -> Ask:
    """Return a function that puts requests to an engine and collects one result for each."""

    def run(
        engine: Engine, requests: Iterable[Request], aborted: Iterable[int] = ()
    ) -> dict[int, Result]:
        found: dict[int, Result] = {}
        for result in engine.generate(ListSource(requests, aborted)):
            assert result.id not in found, "two results for one request"
            found[result.id] = result
        return found

    return run


@pytest.fixture
def open_remote() -> Iterator[OpenRemote]:
    opener = OpenRemote()
    yield opener
    opener.close()
