"""Every sampling parameter on the hf engine: what transformers does with it, or what it means."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MinPLogitsWarper

from engine.adjusting import Adjustment
from engine.base import Engine
from engine.config import HfConfig
from engine.registry import open_engine
from jobs.domain.request import Request, SamplingParams
from jobs.domain.result import Result

Ask = Callable[..., dict[int, Result]]
PROMPT = tuple(range(20, 60))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    opened = open_engine(
        HfConfig(model=str(tiny_model), device="cpu", compute_dtype="float32", slots=8)
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Any:  # noqa: ANN401
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:  # noqa: ANN401
    return AutoTokenizer.from_pretrained(tiny_model)


def asked(request_id: int = 1, **how: Any) -> Request:  # noqa: ANN401
    how = {"temperature": 0.0, "max_tokens": 24, **how}
    return Request(id=request_id, prompt=PROMPT, sampling=SamplingParams(**how))


def generated(alone: Any, **how: Any) -> list[int]:  # noqa: ANN401
    """Return what transformers' own loop says, without the prompt."""
    with torch.inference_mode():
        whole = alone.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24, **how)
    return list(whole[0, len(PROMPT) :].tolist())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
        ({"min_tokens": 12}, {"min_new_tokens": 12}),
        ({}, {}),
    ],
)
def test_greedy_answers_are_those_of_generate(  # noqa: PLR0917 -- fixtures and a table
    engine: Engine,
    alone: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    ask: Ask,
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    expected = generated(alone, **theirs)
    text = ask(engine, [asked(**ours)])[1].text
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_biased_token_is_the_answer_and_a_banned_one_is_not(
    engine: Engine,
    alone: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    ask: Ask,
) -> None:
    token = 77
    results = ask(
        engine,
        [
            asked(1, logit_bias=((token, 100.0),), max_tokens=5),
            asked(2, logit_bias=((generated(alone)[0], -100.0),), logprobs=0),
        ],
    )
    assert results[1].text == tokenizer.decode([token] * 5)
    plain = tokenizer.decode([generated(alone)[0]]).encode()
    assert plain not in [one.token for one in results[2].logprobs]


def test_a_bad_word_does_not_appear(
    engine: Engine,
    alone: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    ask: Ask,
) -> None:
    word = tokenizer.decode([generated(alone)[2]]).strip()
    assert word in ask(engine, [asked(1)])[1].text
    assert word not in ask(engine, [asked(1, bad_words=(word,))])[1].text


def test_bad_words_of_one_token_and_of_two_are_left_out_as_generate_does(
    engine: Engine,
    alone: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    ask: Ask,
) -> None:
    said = generated(alone)
    pairs = [said[i : i + length] for length in (1, 2) for i in range(len(said) - length)]
    words = {tokenizer.decode(pair).lstrip(): len(pair) for pair in pairs}
    num_tried = {1: 0, 2: 0}
    for word, length in words.items():
        spelled = [
            tokenizer.encode(one, add_special_tokens=False) for one in (word, f" {word}") if word
        ]
        # A word that has another spelling behind a space has both left out.
        if not spelled or len(spelled[0]) != length or len(spelled[1]) != length:
            continue
        num_tried[length] += 1
        expected = generated(alone, bad_words_ids=spelled)
        text = ask(engine, [asked(1, bad_words=(word,))])[1].text
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert num_tried[1]
    assert num_tried[2]


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.8), (-1.0, 1.2)])
def test_penalties_are_those_of_a_loop_that_subtracts_them(  # noqa: PLR0917 -- fixtures and a table
    engine: Engine,
    alone: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    ask: Ask,
    presence: float,
    frequency: float,
) -> None:
    def punish(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token, count in Counter(ids[0, len(PROMPT) :].tolist()).items():
            scores[0, token] -= presence + frequency * count
        return scores

    expected = generated(alone, logits_processor=[punish])
    how = {"presence_penalty": presence, "frequency_penalty": frequency}
    text = ask(engine, [asked(1, **how)])[1].text
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("min_p", [0.05, 0.3])
def test_min_p_leaves_the_tokens_that_transformers_leaves(
    engine: Engine,
    alone: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    ask: Ask,
    min_p: float,
) -> None:
    with torch.inference_mode():
        logits = alone(torch.tensor([PROMPT])).logits[:, -1].float()
    left = MinPLogitsWarper(min_p)(torch.LongTensor([PROMPT]), torch.FloatTensor(logits / 2))[0]
    allowed = {tokenizer.decode([token]) for token in torch.isfinite(left).nonzero()[:, 0].tolist()}
    drawn = ask(
        engine,
        [asked(n, temperature=2.0, seed=n, min_p=min_p, max_tokens=1) for n in range(400)],
    )
    texts = {one.text for one in drawn.values() if one.text}
    assert texts <= allowed
    free = ask(engine, [asked(n, temperature=2.0, seed=n, max_tokens=1) for n in range(400)])
    assert not {one.text for one in free.values() if one.text} <= allowed
    assert ask(engine, [asked(1, min_p=min_p)])[1].text == tokenizer.decode(
        generated(alone), skip_special_tokens=True
    ), "of greedy it changes nothing"


def test_a_stop_token_ends_the_answer(
    engine: Engine,
    alone: Any,  # noqa: ANN401
    ask: Ask,
) -> None:
    said = generated(alone)
    result = ask(engine, [asked(1, stop_token_ids=(said[3],))])[1]
    assert result.finish_reason == "stop"
    assert result.usage.completion_tokens == said.index(said[3]) + 1


def test_penalties_count_what_was_generated_and_not_the_prompt() -> None:
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    adjusted = Adjustment(sampling, prompt=[1, 2, 3], ends=(), bad_words=(), vocab_size=8)
    said = [4, 5, 4, 4]
    for token in said:
        adjusted.note(token)
    for row in (np.zeros(8, dtype=np.float32), torch.zeros(8)):
        adjusted.apply(row)
        counts = Counter(said)
        expected = [-(0.5 + 0.25 * counts[t]) if t in counts else 0.0 for t in range(8)]
        assert row.tolist() == pytest.approx(expected)


def test_log_probabilities_are_those_of_the_model(
    engine: Engine,
    alone: Any,  # noqa: ANN401
    ask: Ask,
) -> None:
    result = ask(engine, [asked(1, logprobs=3, max_tokens=6)])[1]
    said = generated(alone)[:6]
    with torch.inference_mode():
        logits = alone(torch.tensor([[*PROMPT, *said]])).logits[0].float()
    known = logits[len(PROMPT) - 1 : -1].log_softmax(dim=-1)
    assert len(result.logprobs) == result.usage.completion_tokens == 6
    for place, one in enumerate(result.logprobs):
        assert one.logprob == pytest.approx(float(known[place, said[place]]), abs=1e-3)
        best = known[place].topk(3).values.tolist()
        assert [logprob for _, logprob in one.likeliest] == pytest.approx(best, abs=1e-3)
        assert one.likeliest[0][0] == one.token, "greedy takes the likeliest"
    assert b"".join(one.token for one in result.logprobs).decode("utf-8", "replace") == result.text


def test_unlikely_tokens_are_left_out_by_their_share_of_the_likeliest(
    engine: Engine, ask: Ask
) -> None:
    greedy = ask(engine, [asked(1)])[1].text
    drawn = ask(engine, [asked(1, temperature=1.0, seed=3)])[1].text
    assert drawn != greedy
    assert ask(engine, [asked(1, temperature=1.0, seed=3, min_p=1.0)])[1].text == greedy


def test_several_answers_have_seeds_of_their_own_and_one_prompt(engine: Engine, ask: Ask) -> None:
    once = ask(engine, [asked(1, temperature=1.0, seed=5)])[1]
    several = ask(engine, [asked(1, temperature=1.0, seed=5, n=3, logprobs=1)])[1]
    assert several.text == once.text, "the first is that of the seed itself"
    texts = [several.text, *(one.text for one in several.further)]
    assert len(set(texts)) == 3
    assert several.usage.prompt_tokens == len(PROMPT)
    assert several.usage.completion_tokens > once.usage.completion_tokens
    assert all(one.logprobs for one in several.further)
    again = ask(engine, [asked(1, temperature=1.0, seed=5, n=3)])[1]
    assert [one.text for one in again.further] == texts[1:]


def test_several_greedy_answers_are_computed_once(engine: Engine, ask: Ask) -> None:
    result = ask(engine, [asked(1, n=4)])[1]
    assert [one.text for one in result.further] == [result.text] * 3
    assert result.usage.completion_tokens == ask(engine, [asked(1)])[1].usage.completion_tokens


def test_a_request_of_many_answers_that_nobody_waits_for_is_dropped(
    engine: Engine, ask: Ask
) -> None:
    requests = [asked(n, temperature=1.0, n=5) for n in (1, 2, 3)]
    found = ask(engine, requests, aborted=[2])
    assert sorted(found) == [1, 3]
    assert all(len(one.further) == 4 for one in found.values())
    assert all(not math.isnan(one.usage.completion_tokens) for one in found.values())
