"""What each parameter of a line does, as an answer shows it: a check for every one there is.

A check sees an engine through a `Talk`, which sends bodies as a batch's lines hold them; so what a
client writes is what is tried. `CHECKS` has one for each of `PARAMETERS`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from engine.base import Engine
from engine.constraints import validate
from jobs.domain.request import CHAT, COMPLETIONS, Constraint, Request, parse_line
from jobs.domain.result import Result
from tests.sources import ListSource

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Which animal is it?"}]
NUM_TOKENS = 12
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"enum": [1, 2, 3]}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "cet"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
# With an end, as not every engine ends what rambles.
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": ZONE}}


@dataclass(frozen=True, kw_only=True)
class Talk:
    """Somebody who sends lines to an engine.

    `tokenizer` is that of the engine's model, `end` the token that ends its answers; None where
    there is no model.
    """

    engine: Engine
    tokenizer: Tokenizer | None = None
    end: int | None = None

    def request(self, request_id: int, endpoint: str, body: Mapping[str, Any]) -> Request:
        line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
        encoded = json.dumps(line).encode()
        capabilities = self.engine.capabilities
        return parse_line(encoded, endpoint=endpoint, capabilities=capabilities).to_request(
            request_id
        )

    def ask(self, requests: Iterable[Request]) -> dict[int, Result]:
        """Return the results of requests that are there all at once."""
        return {one.id: one for one in self.engine.generate(ListSource(requests))}

    def say(self, **body: Any) -> Result:  # noqa: ANN401 -- a body's fields
        """Return what a completion becomes; greedy and of `NUM_TOKENS`, where `body` is silent."""
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": NUM_TOKENS, **body}
        return self._whole(COMPLETIONS, {"ignore_eos": True, **body})

    def chat(self, **body: Any) -> Result:  # noqa: ANN401
        """Return what a chat becomes; None leaves a field out."""
        body = {"messages": MESSAGES, "temperature": 0, "max_tokens": NUM_TOKENS, **body}
        return self._whole(CHAT, {name: value for name, value in body.items() if value is not None})

    def _whole(self, endpoint: str, body: Mapping[str, Any]) -> Result:
        (result,) = self.ask([self.request(1, endpoint, body)]).values()
        assert result.error is None, result.error
        return result

    def any_token(self) -> int:
        """Return the token of a plain letter."""
        assert self.tokenizer is not None
        (token,) = self.tokenizer.encode("q", add_special_tokens=False).ids
        return int(token)

    def greedy_word(self) -> tuple[int, int, bytes]:
        """Return the place, the token and the bytes of a word of letters in the greedy answer."""
        assert self.tokenizer is not None
        told = self.say(logprobs=0).logprobs
        # The first token only where there is no other: what comes before says more.
        for place, one in [*list(enumerate(told))[1:], (0, told[0])]:
            if one.token.isalpha() and one.token.isascii():
                ids = self.tokenizer.encode(one.token.decode(), add_special_tokens=False).ids
                if len(ids) == 1 and one.token not in [other.token for other in told[:place]]:
                    return place, int(ids[0]), one.token
        raise AssertionError(f"no word in {[one.token for one in told]}")


def tokens_of(result: Result) -> list[bytes]:
    return [one.token for one in result.logprobs]


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


def _check_n(talk: Talk) -> None:
    result = talk.say(n=3, temperature=2, seed=5)
    texts = [result.text, *(one.text for one in result.further)]
    assert len(texts) == len(set(texts)) == 3
    assert result.usage.completion_tokens == 3 * NUM_TOKENS
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


def _check_nothing_asked(**how: Any) -> Callable[[Talk], None]:  # noqa: ANN401
    def check(talk: Talk) -> None:
        assert talk.chat(**how).text == talk.chat().text

    return check


def _fits(talk: Talk, constraint: Constraint, **how: Any) -> None:  # noqa: ANN401
    """Hold answers of both endpoints to a constraint."""
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
    ends_early = talk.engine.capabilities.engine in {"hf", "llamacpp"}
    for result in results.values():
        if result.error is None:
            assert result.constraint in {"enforced", "validated"}
            assert validate(constraint, result.text) is None
        else:
            # Only what could not be kept while generating may be broken, and says so; an object
            # without a form may be cut off, and so may all where nobody ends answers early.
            may_be_cut = constraint.kind == "json_object" or not ends_early
            is_cut = result.error.code == "truncated"
            assert result.constraint == "validated" or (is_cut and may_be_cut), result.error
            assert result.error.code in {"schema_mismatch", "truncated"}


OBJECT = Constraint("json_object")
JSON = Constraint("json_schema", json.dumps(SCHEMA))
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


def _called(talk: Talk, **how: Any) -> Result | None:  # noqa: ANN401
    """Return an answer to a question with two tools on offer.

    None where a server did not hold its model to what it was asked: then the line is an error.
    """
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 120, "tools": [WEATHER, CLOCK]}
    (result,) = talk.ask([talk.request(1, CHAT, body | how)]).values()
    if talk.engine.capabilities.engine == "remote" and result.error is not None:
        assert result.error.code in {"schema_mismatch", "truncated"}, result.error
        return None
    assert result.error is None, result.error
    return result


def _check_tool_choice(talk: Talk) -> None:
    assert talk.chat(tool_choice="none").text == talk.chat().text
    if "tools" not in talk.engine.capabilities.parameters:
        return
    named = {"type": "function", "function": {"name": "weather"}}
    result = _called(talk, tool_choice=named)
    if result is not None:
        (call,) = result.tool_calls
        assert call.name == "weather"
        assert validate(JSON, call.arguments) is None
    silent = _called(talk, tool_choice="none")
    assert silent is not None
    assert not silent.tool_calls


def _check_tools(talk: Talk) -> None:
    required = _called(talk, tool_choice="required", parallel_tool_calls=False)
    if required is not None:
        (call,) = required.tool_calls
        assert call.name in {"weather", "clock"}
        assert isinstance(json.loads(call.arguments), dict)
    free = _called(talk, tool_choice="auto")
    assert free is not None
    assert free.usage.prompt_tokens > talk.chat().usage.prompt_tokens, "the model is shown them"


def _check_parallel_tool_calls(talk: Talk) -> None:
    if "tools" not in talk.engine.capabilities.parameters:
        return  # there is nothing to call
    result = _called(talk, tool_choice="required", parallel_tool_calls=False)
    assert result is None or len(result.tool_calls) == 1


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
    "parallel_tool_calls": _check_parallel_tool_calls,
    "presence_penalty": _check_penalty("presence_penalty", -2, 2),
    "repetition_penalty": _check_penalty("repetition_penalty", 0.2, 5),
    "response_format": _check_response_format,
    "seed": _check_seed,
    "stop": _check_stop,
    "stop_token_ids": _check_stop_token_ids,
    "stream": _check_nothing_asked(stream=False),
    "structured_outputs": _check_structured_outputs,
    "temperature": _check_temperature,
    "tool_choice": _check_tool_choice,
    "tools": _check_tools,
    "top_k": _check_greedy(top_k=1),
    "top_logprobs": _check_logprobs,
    "top_p": _check_greedy(top_p=1e-6),
    "user": _check_nothing_asked(user="somebody"),
}
CHOICE_OF_TOKENS = frozenset(
    {
        *("bad_words", "frequency_penalty", "ignore_eos", "logit_bias", "logprobs", "min_p"),
        *("min_tokens", "n", "presence_penalty", "repetition_penalty", "seed", "stop"),
        *("stop_token_ids", "temperature", "top_k", "top_logprobs", "top_p", "tools"),
        *("tool_choice", "parallel_tool_calls"),
    }
)
"""What an engine takes and ignores that has no tokens to choose from."""
