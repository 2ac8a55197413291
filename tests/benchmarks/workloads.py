"""The workloads W1 to W10: seeded, made of nothing but this file, as lines of a batch's input.

    python -m tests.benchmarks.workloads W3 1000 [--model demo] [--seed 0] [--shrink 0.5]

Lengths are tokens of the demo model's tokenizer, to within a few percent; larger vocabularies make
about half as many of the same words. `shrink` scales every length, for machines without a GPU.
Answers are greedy and of exact length.

Source: section 4 of the performance notes, which names whose traffic each one imitates.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CHAT = "/v1/chat/completions"
_TOKENS_PER_WORD = 2.0
_WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with"),
    *("as", "his", "they", "be", "at", "one", "have", "this", "from", "or", "had", "by", "hot"),
    *("but", "some", "what", "there", "we", "can", "out", "other", "were", "all", "your", "when"),
)
Body = dict[str, Any]
Workload = Callable[..., Iterator[bytes]]


def _words(rng: random.Random, num_tokens: float) -> str:
    return " ".join(rng.choices(_WORDS, k=max(1, round(num_tokens / _TOKENS_PER_WORD))))


def _lognormal(rng: random.Random, median: float, sigma: float, cap: float) -> float:
    return min(cap, median * math.exp(rng.gauss(0, sigma)))


def _line(number: int, model: str, prompt: str, max_tokens: float, **body: Any) -> bytes:  # noqa: ANN401
    system = body.pop("system", None)
    messages = [{"role": "system", "content": system}] if system else []
    asked = {
        "model": model,
        "messages": [*messages, {"role": "user", "content": prompt}],
        "max_tokens": max(1, round(max_tokens)),
        "temperature": 0,
        "ignore_eos": True,
        **body,
    }
    line = {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": asked}
    return json.dumps(line).encode()


def chat(
    num_lines: int, *, seed: int = 0, model: str = "demo", shrink: float = 1.0
) -> Iterator[bytes]:
    """W1: prompts of about 200 tokens and answers of about 195, both lognormal."""
    rng = random.Random(f"W1 {seed}")
    for number in range(num_lines):
        asked = _lognormal(rng, 110, 1.1, 1000) * shrink
        answer = _lognormal(rng, 130, 0.9, 900) * shrink
        yield _line(number, model, f"{number} {_words(rng, asked)}", answer)


def batch(
    num_lines: int, *, seed: int = 0, model: str = "demo", shrink: float = 1.0
) -> Iterator[bytes]:
    """W2: 512 tokens in, one of five system prompts among them; about 500 out."""
    rng = random.Random(f"W2 {seed}")
    systems = [_words(rng, 128 * shrink) for _ in range(5)]
    for number in range(num_lines):
        answer = _lognormal(rng, 390, 0.70, 2048) * shrink
        prompt = f"{number} {_words(rng, 384 * shrink)}"
        yield _line(number, model, prompt, answer, system=rng.choice(systems))


def shared_prefix(
    num_lines: int,
    *,
    seed: int = 0,
    model: str = "demo",
    shrink: float = 1.0,
    share: float = 0.9,
    num_groups: int = 8,
    answer: int = 16,
    salt: int = 0,
) -> Iterator[bytes]:
    """W3: groups with 384 to 1,200 tokens in common, `share` of each prompt; zipf sizes, shuffled.

    With share 0 the prompts are as long, and have nothing in common. Two salts of equally many
    digits make prompts of the same lengths that share nothing with one another.
    """
    rng = random.Random(f"W3 {seed}")
    lengths = [rng.uniform(384, 1200) * shrink for _ in range(num_groups)]
    beginnings = [
        f"{salt}.{seed}.{group} {_words(rng, length)}" for group, length in enumerate(lengths)
    ]
    weights = [1 / (1 + group) for group in range(num_groups)]
    for number in range(num_lines):
        group = rng.choices(range(num_groups), weights)[0]
        length = lengths[group]
        if share:
            own = f"{number} {_words(rng, length * (1 - share) / share)}"
            yield _line(number, model, own, answer, system=beginnings[group])
        else:
            yield _line(
                number,
                model,
                "go on",
                answer,
                system=f"{salt}.{seed}.{number} {_words(rng, length)}",
            )


def _fixed(
    name: str, shapes: tuple[tuple[int, int], ...], num_lines: int, seed: int, model: str
) -> Iterator[bytes]:
    rng = random.Random(f"{name} {seed}")
    for number in range(num_lines):
        asked, answer = shapes[number % len(shapes)]
        yield _line(number, model, f"{number} {_words(rng, asked)}", answer)


def prefill_heavy(
    num_lines: int, *, seed: int = 0, model: str = "demo", shrink: float = 1.0
) -> Iterator[bytes]:
    """W4: 2,048 tokens in and 128 out, and 462 in and 16 out, in turns."""
    shapes = tuple((round(i * shrink), round(o * shrink)) for i, o in ((2048, 128), (462, 16)))
    return _fixed("W4", shapes, num_lines, seed, model)


def decode_heavy(
    num_lines: int, *, seed: int = 0, model: str = "demo", shrink: float = 1.0
) -> Iterator[bytes]:
    """W5: 128 tokens in and 2,048 out, and 462 in and 256 out, in turns."""
    shapes = tuple((round(i * shrink), round(o * shrink)) for i, o in ((128, 2048), (462, 256)))
    return _fixed("W5", shapes, num_lines, seed, model)


def mixed(
    num_lines: int,
    *,
    seed: int = 0,
    model: str = "demo",
    shrink: float = 1.0,
    shuffle: bool = True,
) -> Iterator[bytes]:
    """W6: half of W4 and half of W5, shuffled or one after the other."""
    half = num_lines // 2
    lines = [
        *prefill_heavy(half, seed=seed, model=model, shrink=shrink),
        *decode_heavy(num_lines - half, seed=seed, model=model, shrink=shrink),
    ]
    if shuffle:
        random.Random(f"W6 {seed}").shuffle(lines)
    yield from _numbered(lines)


def heavy_tail(
    num_lines: int,
    *,
    seed: int = 0,
    model: str = "demo",
    shrink: float = 1.0,
    cap: int = 16_384,
) -> Iterator[bytes]:
    """W7: short prompts; answers with median 800 and a long tail, as of reasoning."""
    rng = random.Random(f"W7 {seed}")
    for number in range(num_lines):
        answer = _lognormal(rng, 800, 1.2, cap) * shrink
        yield _line(number, model, f"{number} {_words(rng, 64)}", answer)


def schemas(
    num_lines: int, *, seed: int = 0, model: str = "demo", shrink: float = 1.0, salt: int = 0
) -> Iterator[bytes]:
    """W8: a schema of its own for each line, of five sizes.

    Two salts of equally many digits make prompts of the same lengths that share no beginning.
    """
    rng = random.Random(f"W8 {seed}")
    for number in range(num_lines):
        fields = {
            f"name_{seed}_{number}": {"type": "string", "pattern": "^[a-z]{12,20}$"},
            "kind": {"enum": [f"alpha{number}", f"beta{number}"]},
        }
        for extra in range((0, 1, 2, 4, 8)[number % 5]):
            fields |= {
                f"count_{extra}": {"type": "integer", "minimum": 0, "maximum": 9999},
                f"tags_{extra}": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
            }
        schema = {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
        answer = {"name": "answer", "strict": True, "schema": schema}
        yield _line(
            number,
            model,
            f"{salt}.{number} {_words(rng, _lognormal(rng, 110, 1.1, 1000) * shrink)}",
            900,
            temperature=1,
            seed=number,
            ignore_eos=False,
            response_format={"type": "json_schema", "json_schema": answer},
        )


def duplicates(
    num_lines: int,
    *,
    seed: int = 0,
    model: str = "demo",
    shrink: float = 1.0,
    share: float = 0.5,
) -> Iterator[bytes]:
    """W9: W1 with a share of exact repeats, shuffled."""
    num_unique = max(1, round(num_lines * (1 - share)))
    lines = list(chat(num_unique, seed=seed, model=model, shrink=shrink))
    rng = random.Random(f"W9 {seed}")
    # Each is repeated as often as any other, as far as that comes out even.
    lines += [lines[number % num_unique] for number in range(num_lines - num_unique)]
    rng.shuffle(lines)
    yield from _numbered(lines)


def several_models(
    num_lines: int,
    *,
    seed: int = 0,
    models: tuple[str, ...] = ("first", "second", "third"),
    shrink: float = 1.0,
) -> Iterator[bytes]:
    """W10: W1 for three models in turns."""
    each = [chat(num_lines, seed=seed, model=name, shrink=shrink) for name in models]
    for number, lines in enumerate(zip(*each, strict=True)):
        yield lines[number % len(models)]


def _numbered(lines: list[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        yield json.dumps({**json.loads(line), "custom_id": f"r{number}"}).encode()


WORKLOADS: dict[str, Workload] = {
    "W1": chat,
    "W2": batch,
    "W3": shared_prefix,
    "W4": prefill_heavy,
    "W5": decode_heavy,
    "W6": mixed,
    "W7": heavy_tail,
    "W8": schemas,
    "W9": duplicates,
    "W10": several_models,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a workload to standard output.")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("num_lines", type=int)
    parser.add_argument("--model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrink", type=float, default=1.0)
    arguments = parser.parse_args()
    named = {"model": arguments.model} if arguments.model else {}
    lines = WORKLOADS[arguments.workload](
        arguments.num_lines, seed=arguments.seed, shrink=arguments.shrink, **named
    )
    for line in lines:
        sys.stdout.buffer.write(line + b"\n")


if __name__ == "__main__":
    main()


def least_tokens(prompts: Sequence[list[int]]) -> int:
    """Return the edges of a tree of all prompts: what has to be computed at least."""
    total = 0
    before: list[int] = []
    for prompt in sorted(prompts):
        alike = 0
        for one, other in zip(prompt, before, strict=False):
            if one != other:
                break
            alike += 1
        # The last token of a prompt is computed in any case: the answer begins with it.
        total += len(prompt) - min(alike, len(prompt) - 1)
        before = prompt
    return total
