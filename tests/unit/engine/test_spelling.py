"""Stop strings, and the marks of tool calls before them."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from engine.adjusting import Adjustment
from engine.demo import model_path
from engine.running import Answer, Ending, Held, Row
from jobs.domain.request import Message, Request, SamplingParams
from jobs.domain.tools import Tools

TOOLS = Tools('[{"type":"function","function":{"name":"now"}}]')


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_a_stop_string_leaves_the_marks_of_calls_before_it(tools: Tools | None) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    mark = tokenizer.all_special_tokens[0]
    answer = Answer(
        Request(id=1, messages=(Message("user", "x"),), tools=tools),
        SamplingParams(stop=("STOP",)),
        max_tokens=99,
        row=Row(),
        tokenizer=tokenizer,
        held=Held(),
    )
    said = tokenizer.encode(f"{mark}now STOP and more", add_special_tokens=False)
    endings = (answer.take(token, frozenset()) for token in said)
    ending = next(ending for ending in endings if ending is not None)
    kept = mark if tools is not None else ""
    assert ending == Ending("stop", text=f"{kept}now ")


def test_a_token_that_stops_an_answer_is_no_text() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    said = tokenizer.encode("now stop", add_special_tokens=False)
    answer = Answer(
        Request(id=1, messages=(Message("user", "x"),)),
        SamplingParams(stop_token_ids=(said[-1],)),
        max_tokens=99,
        row=Row(),
        tokenizer=tokenizer,
        held=Held(),
    )
    endings = [answer.take(token, frozenset()) for token in said]
    assert endings == [*[None] * (len(said) - 1), Ending("stop", num_kept=len(said) - 1)]


def test_ends_that_are_no_tokens_of_the_model_are_left_out() -> None:
    changing = Adjustment(
        SamplingParams(min_tokens=1),
        prompt=(),
        ends=(3, 99, 2**31 - 1),
        bad_words=(),
        vocab_size=10,
    )
    row = np.zeros(10, dtype=np.float32)
    changing.apply(row)
    assert np.flatnonzero(np.isneginf(row)).tolist() == [3]
