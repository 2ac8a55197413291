"""Trains the demo model: `python -m engine.demo.train --out DIR --seconds N --seed S`."""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from engine.demo import evaluate, words
from engine.demo.text import Example, examples

SPECIAL_TOKENS = ("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
END, PAD = 0, 1
IGNORED = -100
VOCABULARY = 1280
# A step adds up several batches: each is of one length, so of few tasks, and together they mix.
BATCH, BATCHES_PER_STEP = 16, 2
# Batches are cut from this many examples sorted by length: little padding, still random.
POOL = 128 * BATCH
# Longer examples are left out: attention makes them dear, and they teach nothing new.
SHORT_TOKENS, LONGEST_TOKENS = 112, 200
# Short examples alone for this share of the time: copying comes sooner on them, and cheaper.
SHORT_UNTIL = 0.35
MUON_RATE, ADAM_RATE = 2.5e-3, 2e-3
WARMUP_STEPS = 40
FINAL_RATE = 0.02
EMA_HALF_LIFE_STEPS = 50
CHECKPOINT_SECONDS = 180.0

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('Unknown role: ' + message['role']) -}}
  {%- endif -%}
  {{- '<|' + message['role'] + '|>' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] != 'text' -%}
        {{- raise_exception('Only text can be read, not ' + part['type']) -}}
      {%- endif -%}
      {{- part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(*, seed: int, num_examples: int = 20_000) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that splits a word the same way wherever it stands.

    White space, digits and punctuation are never merged into a word, so a name is the same
    tokens in a sentence and between JSON quotes, and copying it is copying tokens. Only the
    joints of JSON, such as `": "`, are tokens of more than one mark.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r'": "|", "|": |, "|\{"|"\}|[\p{L}\p{M}]+|\p{N}|\s|[^\s\p{L}\p{M}\p{N}]'),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(seed, num_examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",  # noqa: S106
        pad_token="<|pad|>",  # noqa: S106
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _tokenizer_corpus(seed: int, num_examples: int) -> Iterator[str]:
    rng = random.Random(seed)  # noqa: S311
    for example in islice(examples(seed, held_out=False), num_examples):
        yield from (message["content"] for message in example.messages)
        yield example.answer
    # Each marked letter often enough to become one token of its own.
    for letter in words.MARKED_LETTERS:
        for _ in range(num_examples // 75):
            yield rng.choice(("", "", " ")) + (letter if rng.random() < 0.8 else letter.upper())  # noqa: PLR2004


def build_model() -> LlamaForCausalLM:
    """Return the untrained model: a Llama of about two million parameters.

    Its attention is the plain one: on CPU the fused kernel's backward pass takes several times
    as long at these lengths (measured with torch 2.13: 40 % of a step).
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=2048,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )
    model.set_attn_implementation("eager")
    return model


def encode(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], int]:
    """Return the tokens of an example and how many of them are the prompt."""
    backend = tokenizer.backend_tokenizer
    prompt = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in example.messages)
    head = backend.encode(prompt + "<|assistant|>").ids
    return head + backend.encode(example.answer + "<|end|>").ids, len(head)


def batches(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, longest: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens and labels of shape [BATCH, length]; a label outside an answer is -100."""
    rng = random.Random(seed)  # noqa: S311
    encoded = (encode(tokenizer, example) for example in examples(seed, held_out=False))
    source = ((tokens, head) for tokens, head in encoded if len(tokens) <= longest)
    while True:
        pool = sorted(islice(source, POOL), key=lambda item: len(item[0]))
        cuts = [pool[start : start + BATCH] for start in range(0, POOL, BATCH)]
        rng.shuffle(cuts)
        for cut in cuts:
            length = max(len(tokens) for tokens, _ in cut)
            inputs = torch.full((len(cut), length), PAD)
            labels = torch.full((len(cut), length), IGNORED)
            for row, (tokens, num_prompt) in enumerate(cut):
                inputs[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, num_prompt : len(tokens)] = inputs[row, num_prompt : len(tokens)]
            yield inputs, labels


def answer_loss(
    model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy summed over answer tokens.

    Padding stands on the right, where a causal model cannot see it: no mask is needed.
    """
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    logits = model.lm_head(hidden[:, :-1][wanted]).float()
    return cross_entropy(logits, targets[wanted], reduction="sum")


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for everything else.

    Source: Jordan 2024, Muon.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]  # noqa: PLR2004
    chosen = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01)]


def rate_factor(step: int, *, fraction: float) -> float:
    """Return the factor on every learning rate: a warm-up, then a cosine over the time budget."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seconds: float,
    seed: int,
    out: Path,
    short_until: float = SHORT_UNTIL,
) -> LlamaForCausalLM:
    """Train for a time budget and return the running average of the weights, saved as it goes.

    Args:
        short_until: the share of the time spent on short examples alone.
    """
    average = deepcopy(model).eval()
    keep = 0.5 ** (1 / EMA_HALF_LIFE_STEPS)
    steppers = optimizers(model)
    base_rates = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    short = batches(tokenizer, seed=seed, longest=SHORT_TOKENS)
    everything = batches(tokenizer, seed=seed + 1, longest=LONGEST_TOKENS)
    started = saved = time.monotonic()
    for step in count():
        now = time.monotonic()
        fraction = (now - started) / seconds
        if fraction >= 1:
            break
        source = short if fraction < short_until else everything
        factor = rate_factor(step, fraction=fraction)
        for stepper, rates in zip(steppers, base_rates, strict=True):
            for group, rate in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        mixed = list(islice(source, BATCHES_PER_STEP))
        num_answer_tokens = sum(int((labels != IGNORED).sum()) for _, labels in mixed)
        loss = 0.0
        for inputs, labels in mixed:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                part = answer_loss(model, inputs, labels) / num_answer_tokens
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - keep if step > WARMUP_STEPS else 1.0)
        if step % 50 == 0:
            _log(step=step, seconds=round(now - started), loss=round(loss, 4))
        if now - saved > CHECKPOINT_SECONDS:
            saved = now
            save(average, tokenizer, out)
    return cast("LlamaForCausalLM", average)


def _log(**values: float) -> None:
    sys.stderr.write(json.dumps(values) + "\n")
    sys.stderr.flush()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the weights as bfloat16, with the configuration, the tokenizer and the template."""
    packed: Any = deepcopy(model)
    packed.to(torch.bfloat16)
    packed.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=END, pad_token_id=PAD, max_length=None, max_new_tokens=256
    )
    packed.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The name that every release of transformers knows.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def average_of(folders: list[Path]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a model whose weights are the mean of others', and their tokenizer.

    Source: Wortsman et al. 2022, model soups.
    """
    models = [LlamaForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]
    with torch.no_grad():
        for parts in zip(*(model.parameters() for model in models), strict=True):
            parts[0].copy_(torch.stack(list(parts)).mean(dim=0))
    return models[0], PreTrainedTokenizerFast.from_pretrained(folders[0])


def main(arguments: Iterable[str] | None = None) -> None:
    """Train, save and print how the result scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=2400.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="go on from the model in this folder")
    parser.add_argument(
        "--average",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="train nothing; save the mean of these models, all resumed from the same one",
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.average:
        save(*average_of(options.average), options.out)
        return
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    if options.resume:
        model = LlamaForCausalLM.from_pretrained(
            options.resume, dtype=torch.float32, attn_implementation="eager"
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.resume)
    else:
        model, tokenizer = build_model(), train_tokenizer(seed=options.seed)
    model = train(
        model,
        tokenizer,
        seconds=options.seconds,
        seed=options.seed,
        out=options.out,
        short_until=0.0 if options.resume else SHORT_UNTIL,
    )
    save(model, tokenizer, options.out)
    _log(**evaluate.score_unseen(model, tokenizer, seed=1, num_per_task=100))


if __name__ == "__main__":
    main()
