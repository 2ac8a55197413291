"""What the parameters about tools do: who is shown them, who has to call which, and how often."""

import json
from typing import Any

import msgspec

from engine.constraints import validate
from jobs.domain.request import CHAT, Constraint
from jobs.domain.result import Result, render_result
from tests.conformance.engine.talking import JSON, MESSAGES, SCHEMA, Talk

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
# With an end, as not every engine ends what rambles.
ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "cet"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": ZONE}}
_ARGUMENTS = {"weather": JSON, "clock": Constraint("json_schema", json.dumps(ZONE))}


def check_tool_choice(talk: Talk) -> None:
    """Have each tool called by its name, and none."""
    assert talk.chat(tool_choice="none").text == talk.chat().text
    if "tools" not in talk.engine.capabilities.parameters:
        return
    for name in ("weather", "clock"):
        named = {"type": "function", "function": {"name": name}}
        result = _called(talk, tool_choice=named)
        if result is not None:
            _check_calls(talk, result, num_calls=1)
            assert [call.name for call in result.tool_calls] == [name]
    silent = _called(talk, tool_choice="none")
    assert silent is not None
    assert not silent.tool_calls


def check_tools(talk: Talk) -> None:
    """Have tools called that have to be, and those that the model wants called."""
    required = _called(talk, tool_choice="required", parallel_tool_calls=False)
    if required is not None:
        _check_calls(talk, required, num_calls=1)
    if talk.tokenizer is not None:
        free = _called(talk, tool_choice="auto")
        assert free is not None
        plain = talk.chat().usage.prompt_tokens
        assert free.usage.prompt_tokens > plain, "the model is shown them"
    if talk.engine.capabilities.engine == "remote":
        return  # the model says what it likes, and its server takes that apart
    wanted = _spell("weather", {"kind": "cat", "age": 2})
    called = _made_to_say(talk, wanted)
    assert called.error is None, called.error
    _check_calls(talk, called, num_calls=1)
    assert called.tool_calls[0].name == "weather"
    assert json.loads(called.tool_calls[0].arguments) == {"kind": "cat", "age": 2}
    assert not called.text
    for bad in (_spell("weather", {"kind": "cow", "age": 2}), _spell("tides", {})):
        broken = _made_to_say(talk, bad)
        assert broken.error is not None, "arguments have to fit, and the tool to be there"
        assert broken.error.code == "schema_mismatch"
    words = _made_to_say(talk, "It is a cat.")
    assert words.error is None, words.error
    assert (words.text, words.tool_calls) == ("It is a cat.", ())


def check_parallel_tool_calls(talk: Talk) -> None:
    """Allow one call, and see that a model that wants two cannot have them."""
    if "tools" not in talk.engine.capabilities.parameters:
        return  # there is nothing to call
    how: dict[str, Any] = {"tool_choice": "required", "tools": [CLOCK], "max_tokens": 160}
    if talk.tokenizer is not None:
        how["logit_bias"] = _go_on(talk)
        several = _ask(talk, **how)
        if several.error is None:
            assert len(several.tool_calls) > 1, "the model wants more than one"
            _check_calls(talk, several, num_calls=len(several.tool_calls))
        elif talk.engine.capabilities.engine != "remote":
            # It would go on for ever, and not every engine ends it in time.
            assert several.error.code == "truncated", several.error
            assert several.text.count('"clock"') > 1
    one = _called(talk, **how, parallel_tool_calls=False)
    if one is not None:
        _check_calls(talk, one, num_calls=1)
    if talk.engine.capabilities.engine == "remote":
        return  # see check_tools
    two = _spell("clock", {"zone": "utc"}) + _spell("clock", {"zone": "cet"})
    both = _made_to_say(talk, two)
    assert both.error is None, both.error
    _check_calls(talk, both, num_calls=2)
    refused = _made_to_say(talk, two, parallel_tool_calls=False)
    assert refused.error is not None, "there are two calls"
    assert refused.error.code == "schema_mismatch"


def _ask(talk: Talk, **how: Any) -> Result:  # noqa: ANN401 -- a body's fields
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 120, "tools": [WEATHER, CLOCK]}
    (result,) = talk.ask([talk.request(1, CHAT, body | how)]).values()
    return result


def _called(talk: Talk, **how: Any) -> Result | None:  # noqa: ANN401
    """Return an answer to a question with two tools on offer.

    None where a server did not hold its model to what it was asked: then the line is an error.
    """
    result = _ask(talk, **how)
    if talk.engine.capabilities.engine == "remote" and result.error is not None:
        assert result.error.code in {"schema_mismatch", "truncated"}, result.error
        return None
    assert result.error is None, result.error
    return result


def _made_to_say(talk: Talk, text: str, **how: Any) -> Result:  # noqa: ANN401
    """Return what becomes of a text that a model says which may call tools, and need not."""
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 160, "tools": [WEATHER, CLOCK]}
    request = talk.request(1, CHAT, body | how)
    # No line can ask for this: it is how a random model says what a trained one would.
    only = Constraint("choice", json.dumps([text]))
    (result,) = talk.ask([msgspec.structs.replace(request, constraint=only)]).values()
    return result


def _spell(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def _go_on(talk: Talk) -> dict[str, float]:
    """Return a bias to what goes on with a list, and against what ends it."""
    assert talk.tokenizer is not None
    spelled = {
        token: talk.tokenizer.decode([token]) for token in range(talk.tokenizer.get_vocab_size())
    }
    against = {str(token): -100.0 for token, text in spelled.items() if "]" in text}
    return against | {str(token): 50.0 for token, text in spelled.items() if text.strip() == ","}


def _check_calls(talk: Talk, result: Result, *, num_calls: int) -> None:
    """Hold an answer's calls to the tools' schemas, and to how OpenAI's API spells them."""
    rendered = render_result(
        result, custom_id="a", request_id="1", endpoint=CHAT, model="m", created=0
    )
    (choice,) = json.loads(rendered)["response"]["body"]["choices"]
    assert choice["finish_reason"] == "tool_calls", choice["finish_reason"]
    calls = choice["message"]["tool_calls"]
    assert len(calls) == len({call["id"] for call in calls}) == num_calls
    for call in calls:
        assert call.keys() == {"id", "type", "function"}
        assert call["type"] == "function"
        assert call["function"].keys() == {"name", "arguments"}
        assert call["function"]["name"] in _ARGUMENTS
        assert isinstance(call["function"]["arguments"], str)
        constraint = _ARGUMENTS[call["function"]["name"]]
        assert validate(constraint, call["function"]["arguments"]) is None
    # How a call was forced has to be said, as for every other constraint.
    if result.constraint is not None and talk.engine.capabilities.engine != "remote":
        assert result.constraint == "enforced"
