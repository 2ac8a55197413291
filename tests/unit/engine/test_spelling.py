"""Stop strings, and the marks of tool calls before them."""

import pytest
from transformers import PreTrainedTokenizerFast

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
