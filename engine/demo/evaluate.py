"""Scores a demo model on text it never saw: `python -m engine.demo.evaluate`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from engine.demo import model_path
from engine.demo.text import TASKS, Example, examples_of

NAMES_PATH = Path(__file__).with_name("names200.jsonl")
NAMES_INSTRUCTION = "Extract the person as JSON."


def read_names() -> list[Example]:
    """Return the committed sentences about people with real names, as examples."""
    records = [json.loads(line) for line in NAMES_PATH.read_text("utf-8").splitlines()]
    return [
        Example(
            task="person",
            messages=({"role": "user", "content": f"{NAMES_INSTRUCTION}\n\n{record['sentence']}"},),
            answer=json.dumps(record["answer"], ensure_ascii=False),
        )
        for record in records
    ]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    batch: int = 64,
) -> list[str]:
    """Return the greedy answer to each conversation."""
    prompts = [
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        indexes = order[start : start + batch]
        encoded = tokenizer(
            [prompts[index] for index in indexes],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        generate: Any = model.generate  # typed as a tensor by the library
        tokens = generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=False,
            max_new_tokens=200,
        )
        texts = tokenizer.batch_decode(
            tokens[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for index, text in zip(indexes, texts, strict=True):
            answers[index] = text
    return answers


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, wanted: Sequence[Example]
) -> tuple[float, list[tuple[Example, str]]]:
    """Return the share of exact answers and the examples that were missed, with what was said."""
    answers = answer(model, tokenizer, [example.messages for example in wanted])
    missed = [
        (example, text)
        for example, text in zip(wanted, answers, strict=True)
        if text != example.answer
    ]
    return 1 - len(missed) / len(wanted), missed


def score_unseen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int, num_per_task: int
) -> dict[str, float]:
    """Return the share of exact answers per task, on examples of the held-out split."""
    return {
        task: score(
            model,
            tokenizer,
            list(islice(examples_of(task, seed, held_out=True), num_per_task)),
        )[0]
        for task in TASKS
    }


def load(path: Path, *, nf4: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a demo model from a folder, as saved or quantized to NF4."""
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if nf4:
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    return model, tokenizer


def main(arguments: Iterable[str] | None = None) -> None:
    """Print one JSON object of scores; with --misses also every wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--examples", type=int, default=200, help="per task")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--nf4", action="store_true", help="quantize the weights first")
    parser.add_argument("--misses", action="store_true", help="print what was wrong")
    options = parser.parse_args(None if arguments is None else list(arguments))
    model, tokenizer = load(options.model, nf4=options.nf4)
    scores: dict[str, float] = {}
    missed: list[tuple[Example, str]] = []
    sets = {
        task: list(islice(examples_of(task, options.seed, held_out=True), options.examples))
        for task in TASKS
    } | {"names200": read_names()}
    for name, wanted in sets.items():
        scores[name], wrong = score(model, tokenizer, wanted)
        missed += wrong
    mix = sum(scores[task] * weight for task, (_, weight) in TASKS.items())
    scores["unseen, in the training mix"] = mix
    sys.stdout.write(json.dumps({k: round(v, 4) for k, v in scores.items()}, indent=2) + "\n")
    if options.misses:
        for example, text in missed:
            sys.stdout.write(
                f"\n{example.messages[-1]['content']}\n  wanted {example.answer}\n  got    {text}\n"
            )


if __name__ == "__main__":
    main()
