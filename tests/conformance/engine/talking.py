"""Who sends lines to an engine of the conformance suite, as a batch's file holds them."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from engine.base import Engine
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
JSON = Constraint("json_schema", json.dumps(SCHEMA))


@dataclass(frozen=True, kw_only=True)
class Talk:
    """Somebody who sends lines to an engine.

    `enforces` says which constraints the engine has to keep while generating. `tokenizer` is that
    of the engine's model, `end` the token that ends its answers; None where there is no model.
    """

    engine: Engine
    enforces: Callable[[Constraint], bool]
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


def every_constraint(constraint: Constraint) -> bool:  # noqa: ARG001 -- whichever it is
    """Say that the engine has to keep it while generating."""
    return True


def tokens_of(result: Result) -> list[bytes]:
    return [one.token for one in result.logprobs]
