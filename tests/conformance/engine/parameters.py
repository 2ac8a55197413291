"""What each parameter of a line does, as an answer shows it: a check for every one there is.

`CHECKS` has one for each of `PARAMETERS`, and `test_checks.py` proves that it fails where an engine
ignores the parameter.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

from engine.constraints import validate
from jobs.domain.errors import InvalidLine
from jobs.domain.request import CHAT, COMPLETIONS, Constraint
from jobs.domain.result import Result
from tests.conformance.engine.talking import (
    JSON,
    MESSAGES,
    NUM_TOKENS,
    PROMPT,
    SCHEMA,
    Talk,
    tokens_of,
)
from tests.conformance.engine.tool_calls import (
    check_parallel_tool_calls,
    check_tool_choice,
    check_tools,
)


def _check_bad_words(talk: Talk) -> None:
    _, _, word = talk.greedy_word()
    assert word not in tokens_of(talk.say(logprobs=0, bad_words=[word.decode()]))


def _check_penalty(name: str, low: float, high: float) -> Callable[[Talk], None]:
    def check(talk: Talk) -> None:
        distinct = [
            len(set(tokens_of(talk.say(logprobs=0, max_tokens=40, **{name: value}))))
            for value in (low, high)
        ]
        assert distinct[0] < distinct[1], "the more it is punished, the less is repeated"

    return check


def _check_ignore_eos(talk: Talk) -> None:
    ends = {"logit_bias": {str(talk.end): 100.0}}
    assert talk.say(**ends, ignore_eos=False).usage.completion_tokens <= 1
    assert talk.say(**ends).usage.completion_tokens == NUM_TOKENS


def _check_logit_bias(talk: Talk) -> None:
    assert talk.tokenizer is not None
    wanted = talk.any_token()
    forced = talk.say(logit_bias={str(wanted): 100.0})
    assert forced.text == talk.tokenizer.decode([wanted] * NUM_TOKENS)
    _, token, word = talk.greedy_word()
    assert word not in tokens_of(talk.say(logprobs=0, logit_bias={str(token): -100.0}))


def _check_logprobs(talk: Talk) -> None:
    for result in (talk.say(logprobs=3), talk.chat(logprobs=True, top_logprobs=3)):
        assert len(result.logprobs) == result.usage.completion_tokens
        for one in result.logprobs:
            assert one.logprob <= 0
            told = [logprob for _, logprob in one.likeliest]
            assert told == sorted(told, reverse=True)
            assert len(told) >= 3
            assert one.token in dict(one.likeliest), "greedy takes one of the likeliest"
            assert one.logprob == max(told)
    assert not talk.say().logprobs
    assert talk.chat(logprobs=True).logprobs


def _check_max_tokens(talk: Talk) -> None:
    for length in (1, 7):
        result = talk.say(max_tokens=length)
        assert result.usage.completion_tokens == length


def _check_max_completion_tokens(talk: Talk) -> None:
    result = talk.chat(max_tokens=None, max_completion_tokens=5, ignore_eos=True)
    assert result.usage.completion_tokens == 5


def _check_greedy(**how: Any) -> Callable[[Talk], None]:  # noqa: ANN401
    def check(talk: Talk) -> None:
        greedy = talk.say().text
        assert talk.say(temperature=2, seed=3).text != greedy
        assert talk.say(temperature=2, seed=3, **how).text == greedy

    return check


def _check_min_tokens(talk: Talk) -> None:
    ends = {"logit_bias": {str(talk.end): 100.0}, "ignore_eos": False}
    assert talk.say(**ends).usage.completion_tokens <= 1
    assert talk.say(**ends, min_tokens=5).usage.completion_tokens >= 5
    place, _, word = talk.greedy_word()
    early = talk.say(stop=word.decode(), min_tokens=place + 1)
    assert early.usage.completion_tokens > place + 1, "what has come by then ends nothing"
    assert word.decode() in early.text


def _check_n(talk: Talk) -> None:
    result = talk.say(n=3, temperature=2, seed=5)
    texts = [result.text, *(one.text for one in result.further)]
    assert len(texts) == 3
    assert result.usage.completion_tokens == 3 * NUM_TOKENS
    if talk.tokenizer is not None:
        assert len(set(texts)) == 3, "each is drawn for itself"
    assert talk.say(n=3, temperature=2, seed=5) == result


def _check_seed(talk: Talk) -> None:
    first = talk.say(temperature=2, seed=7)
    assert talk.say(temperature=2, seed=7).text == first.text
    assert talk.say(temperature=2, seed=8).text != first.text


def _check_stop(talk: Talk) -> None:
    _, _, word = talk.greedy_word()
    text = talk.say().text
    for stop in (word.decode(), [word.decode(), "never said"]):
        result = talk.say(stop=stop)
        assert result.text == text.partition(word.decode())[0]
        assert result.finish_reason == "stop"


def _check_stop_token_ids(talk: Talk) -> None:
    place, token, _ = talk.greedy_word()
    result = talk.say(stop_token_ids=[token])
    assert result.finish_reason == "stop"
    assert result.usage.completion_tokens == place + 1


def _check_temperature(talk: Talk) -> None:
    greedy = talk.say(temperature=0)
    assert talk.say(temperature=0) == greedy
    assert talk.say(temperature=2, seed=3).text != greedy.text


def _check_stream(talk: Talk) -> None:
    assert talk.chat(stream=False).text == talk.chat().text
    with pytest.raises(InvalidLine, match="Streaming"):
        talk.chat(stream=True)


def _check_user(talk: Talk) -> None:
    body = {"messages": MESSAGES}
    assert talk.request(1, CHAT, body | {"user": "somebody"}) == talk.request(1, CHAT, body)


def _fits(talk: Talk, constraint: Constraint, **how: Any) -> None:  # noqa: ANN401
    """Hold answers of both endpoints to a constraint, and to how the engine has to keep it."""
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": MESSAGES}),
        (COMPLETIONS, {"prompt": PROMPT}),
    ]
    requests = [
        talk.request(number, endpoint, {"max_tokens": 60, "temperature": 1, "seed": 1} | body | how)
        for number, (endpoint, body) in enumerate(bodies)
    ]
    results = talk.ask(requests)
    assert len(results) == len(bodies)
    for result in results.values():
        check_kept(talk, constraint, result)


def check_kept(talk: Talk, constraint: Constraint, result: Result) -> None:
    """Hold one answer to a constraint."""
    error = result.error
    if not talk.enforces(constraint):
        assert result.constraint == "validated"
        if error is not None:
            assert error.code in {"schema_mismatch", "truncated"}, error
            assert validate(constraint, result.text) is not None
            return
    else:
        assert result.constraint == "enforced"
        if error is not None:
            # What has no end may be cut off: any object, and what a server puts blanks into.
            rambles = talk.engine.capabilities.engine == "remote"
            assert constraint.kind == "json_object" or rambles, error
            assert error.code == "truncated"
            assert result.text
            return
    assert validate(constraint, result.text) is None


OBJECT = Constraint("json_object")
REGEX = Constraint("regex", r"[a-f]{3}-\d{2}")
CHOICE = Constraint("choice", '["yes", "no", "maybe"]')
LARK = Constraint("grammar", 'start: "a" | "b" "c"')


def _check_response_format(talk: Talk) -> None:
    named = {"name": "animal", "schema": SCHEMA, "strict": True}
    _fits(talk, JSON, response_format={"type": "json_schema", "json_schema": named})
    _fits(talk, OBJECT, response_format={"type": "json_object"})
    text = {"type": "text"}
    assert talk.chat(response_format=text).text == talk.chat().text


def _check_structured_outputs(talk: Talk) -> None:
    for constraint, how in (
        (JSON, {"json": SCHEMA}),
        (REGEX, {"regex": REGEX.spec}),
        (CHOICE, {"choice": json.loads(CHOICE.spec)}),
        (LARK, {"grammar": LARK.spec}),
        (OBJECT, {"json_object": True}),
    ):
        _fits(talk, constraint, structured_outputs=how)


def _check_guided(constraint: Constraint, value: object) -> Callable[[Talk], None]:
    kind = {"json_schema": "json"}.get(constraint.kind, constraint.kind)
    return lambda talk: _fits(talk, constraint, **{f"guided_{kind}": value})


CHECKS: dict[str, Callable[[Talk], None]] = {
    "bad_words": _check_bad_words,
    "frequency_penalty": _check_penalty("frequency_penalty", -2, 2),
    "guided_choice": _check_guided(CHOICE, json.loads(CHOICE.spec)),
    "guided_grammar": _check_guided(LARK, LARK.spec),
    "guided_json": _check_guided(JSON, SCHEMA),
    "guided_regex": _check_guided(REGEX, REGEX.spec),
    "ignore_eos": _check_ignore_eos,
    "logit_bias": _check_logit_bias,
    "logprobs": _check_logprobs,
    "max_completion_tokens": _check_max_completion_tokens,
    "max_tokens": _check_max_tokens,
    "min_p": _check_greedy(min_p=1),
    "min_tokens": _check_min_tokens,
    "n": _check_n,
    "parallel_tool_calls": check_parallel_tool_calls,
    "presence_penalty": _check_penalty("presence_penalty", -2, 2),
    "repetition_penalty": _check_penalty("repetition_penalty", 0.2, 5),
    "response_format": _check_response_format,
    "seed": _check_seed,
    "stop": _check_stop,
    "stop_token_ids": _check_stop_token_ids,
    "stream": _check_stream,
    "structured_outputs": _check_structured_outputs,
    "temperature": _check_temperature,
    "tool_choice": check_tool_choice,
    "tools": check_tools,
    "top_k": _check_greedy(top_k=1),
    "top_logprobs": _check_logprobs,
    "top_p": _check_greedy(top_p=1e-6),
    "user": _check_user,
}


def _ignored(talk: Talk) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return for each parameter that changes the choice of tokens what to ask without and with it.

    Of any engine that chooses tokens, the two have different answers.
    """
    text = talk.chat().text
    drawn = {"temperature": 2, "seed": 3}
    token = talk.any_token() if talk.tokenizer is not None else 65
    forced = {"logit_bias": {str(token): 100.0}}
    ends = {"logit_bias": {str(talk.end or 0): 100.0}}
    told = {"logprobs": True}
    return {
        "bad_words": (forced, {"bad_words": ["q", text.split(" ")[0]]}),
        "frequency_penalty": ({"max_tokens": 40}, {"frequency_penalty": -2}),
        "ignore_eos": (ends, {"ignore_eos": True}),
        "logit_bias": ({}, forced),
        "logprobs": ({}, told),
        "min_p": (drawn, {"min_p": 1}),
        "min_tokens": (ends, {"min_tokens": NUM_TOKENS}),
        "presence_penalty": ({"max_tokens": 40}, {"presence_penalty": -2}),
        "repetition_penalty": ({"max_tokens": 40}, {"repetition_penalty": 0.2}),
        "seed": ({"temperature": 2, "seed": 1}, {"seed": 2}),
        "stop": ({}, {"stop": text[1:3]}),
        "stop_token_ids": (forced, {"stop_token_ids": [token]}),
        "temperature": ({"seed": 3}, {"temperature": 2}),
        "top_k": (drawn, {"top_k": 1}),
        "top_logprobs": (told, {"top_logprobs": 3}),
        "top_p": (drawn, {"top_p": 1e-6}),
    }


IGNORED = frozenset(
    {
        *("bad_words", "frequency_penalty", "ignore_eos", "logit_bias", "logprobs", "min_p"),
        *("min_tokens", "presence_penalty", "repetition_penalty", "seed", "stop"),
        *("stop_token_ids", "temperature", "top_k", "top_logprobs", "top_p"),
    }
)
"""What the simulated engine takes and ignores, as it has no tokens to choose from."""


def check_ignored(talk: Talk, parameter: str) -> None:
    """Send a parameter, and see that the answer is the one without it."""
    without, changed = _ignored(talk)[parameter]
    plain, asked = talk.chat(**without), talk.chat(**(without | changed))
    assert asked.usage.completion_tokens > 0
    for name in ("text", "finish_reason", "logprobs", "further"):
        assert getattr(asked, name) == getattr(plain, name)
    assert asked.usage.completion_tokens == plain.usage.completion_tokens
