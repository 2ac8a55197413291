import json
from functools import cache
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from engine.closing import Closings
from engine.constraints import validate
from engine.matching import TokenizerConstraints
from jobs.domain.request import Constraint

BYTES = llguidance.LLTokenizer("byte")
DEMO = llguidance.LLTokenizer(
    Tokenizer.from_file(
        str(Path(__file__).parents[3] / "engine" / "demo" / "model" / "tokenizer.json")
    ).to_str()
)
TEXT = {"type": "string"}


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def an_object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


@cache
def ends_something(tokenizer: llguidance.LLTokenizer) -> npt.NDArray[np.uint8]:
    """Return for each token whether the model avoids it."""
    ends = b'"]}eE'  # exponents leave the range of numbers
    return np.array(
        [
            token in tokenizer.eos_tokens
            or not set(ends).isdisjoint(tokenizer.decode_bytes([token]))
            for token in range(tokenizer.vocab_size)
        ],
        dtype=np.uint8,
    )


def ramble(
    constraint: Constraint,
    max_tokens: int,
    *,
    tokenizer: llguidance.LLTokenizer = BYTES,
    seed: int = 0,
    closes: bool = True,
) -> tuple[str, int, bool]:
    """Answer as a model that ends nothing it need not end; return that, its tokens, was it cut."""
    made = TokenizerConstraints(tokenizer)
    matcher, enforcement = made.matcher(constraint)
    closing = Closings(tokenizer).open(constraint, enforcement)
    rng = np.random.default_rng(seed)
    row = np.zeros(made.num_words, dtype=np.int32)
    said: list[int] = []
    while len(said) < max_tokens and not matcher.is_finished():
        matcher.fill(row, row.ctypes.data)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        allowed = np.flatnonzero(bits)
        going_on = np.flatnonzero(bits & (1 - ends_something(tokenizer)))
        token = int(rng.choice(going_on if going_on.size else allowed))
        if closes:
            token = closing.choose(said, token, num_left=max_tokens - len(said))
        assert token in allowed, "what is taken instead keeps the constraint too"
        if token in tokenizer.eos_tokens:
            break
        assert matcher.advance(token)
        said.append(token)
    return tokenizer.decode_bytes(said).decode("utf-8", "replace"), len(said), closing.has_cut


CALLS = schema(
    {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                an_object({"name": {"const": name}, "in": an_object({"place": {"enum": [name]}})})
                for name in ("weather", "clock")
            ]
        },
    }
)
"""Of each item more has to come than its list takes to end."""

RAMBLING = [
    *(pytest.param(CALLS, n, id=f"items of {n}") for n in (60, 120, 300)),
    pytest.param(schema(TEXT), 30, id="string"),
    pytest.param(schema({}), 30, id="anything"),
    pytest.param(schema(an_object({"a": TEXT, "b": TEXT, "c": TEXT})), 60, id="fields to come"),
    pytest.param(schema({"type": "array", "items": TEXT, "minItems": 3}), 60, id="list"),
    pytest.param(schema(an_object({"n": {"type": "number"}, "s": TEXT})), 60, id="digits"),
    pytest.param(schema(an_object({"a": an_object({"b": an_object({"c": TEXT})})})), 60, id="deep"),
    pytest.param(
        schema(an_object({"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}})), 120, id="tree"
    ),
    pytest.param(
        schema(
            {
                "$defs": {
                    "node": {
                        "oneOf": [
                            an_object(
                                {
                                    "kind": {"const": "branch"},
                                    "left": {"$ref": "#/$defs/node"},
                                    "right": {"$ref": "#/$defs/node"},
                                }
                            ),
                            an_object({"kind": {"const": "leaf"}}),
                        ]
                    }
                },
                "$ref": "#/$defs/node",
            }
        ),
        250,
        id="branches",
    ),
    pytest.param(schema(an_object({"d": {"type": "string", "format": "date"}})), 30, id="format"),
    pytest.param(schema({"type": "string", "pattern": "^(a|b)*cd$"}), 30, id="pattern"),
    pytest.param(
        schema({"type": "string", "pattern": r"^[^\s@]+@[^\s@]+\.[a-z]{2,}$"}), 30, id="address"
    ),
    pytest.param(schema({"type": "integer", "multipleOf": 1000, "minimum": 1}), 30, id="zeros"),
    pytest.param(schema({"type": "string", "minLength": 20}), 60, id="least length"),
    pytest.param(
        schema({"type": "object", "patternProperties": {"^x-": TEXT}, "minProperties": 1}),
        60,
        id="names",
    ),
    pytest.param(Constraint("json_object"), 30, id="any object"),
    pytest.param(Constraint("regex", "(ab|c)*de"), 20, id="regex"),
    pytest.param(Constraint("grammar", 'start: "(" start ")" | "x"'), 21, id="grammar"),
    pytest.param(Constraint("choice", '["a", "ab", "abc"]'), 3, id="choice"),
]


@pytest.mark.parametrize(("constraint", "max_tokens"), RAMBLING)
def test_answer_that_would_not_end_ends_in_time_and_keeps_its_constraint(
    constraint: Constraint, max_tokens: int
) -> None:
    for seed in range(5):
        text, num_tokens, _ = ramble(constraint, max_tokens, seed=seed)
        assert validate(constraint, text) is None, text
        assert num_tokens <= max_tokens


@pytest.mark.parametrize(
    "constraint",
    [
        schema(TEXT),
        schema(an_object({"a": TEXT, "b": TEXT})),
    ],
)
def test_the_same_model_is_cut_off_without_it(constraint: Constraint) -> None:
    text, num_tokens, _ = ramble(constraint, 60, closes=False)
    assert num_tokens == 60
    assert validate(constraint, text) is not None


@pytest.mark.parametrize(("constraint", "max_tokens"), RAMBLING)
def test_answers_end_in_time_in_the_tokens_of_a_model(
    constraint: Constraint, max_tokens: int
) -> None:
    for seed in range(3):
        text, num_tokens, _ = ramble(constraint, max_tokens, tokenizer=DEMO, seed=seed)
        assert validate(constraint, text) is None, text
        assert num_tokens <= max_tokens


def test_any_number_of_tokens_from_the_least_on_suffices() -> None:
    constraint = schema(an_object({"a": TEXT, "b": {"type": "array", "items": TEXT}}))
    least = len('{"a":"","b":[]}')
    for max_tokens in (*range(least, least + 5), 2 * least, 3 * least, 4 * least):
        for seed in range(2):
            text, num_tokens, _ = ramble(constraint, max_tokens, seed=seed)
            assert validate(constraint, text) is None, (max_tokens, text)
            assert num_tokens <= max_tokens
    assert validate(constraint, ramble(constraint, least - 1)[0]) is not None


def test_what_has_to_come_still_gets_a_share_of_the_tokens() -> None:
    constraint = schema(an_object({"a": TEXT, "b": TEXT, "c": TEXT}))
    for seed in range(5):
        said = json.loads(ramble(constraint, 120, seed=seed)[0])
        assert len(said["a"]) > len(said["b"]) > 0
        assert len(said["c"]) > 0


def test_answer_that_ends_by_itself_is_left_alone() -> None:
    constraint = schema(an_object({"kind": {"enum": ["cat", "dog"]}, "ok": {"type": "boolean"}}))
    text, _, has_cut = ramble(constraint, 200)
    assert validate(constraint, text) is None
    assert not has_cut


def test_constraint_whose_end_is_not_found_leaves_the_answer_alone() -> None:
    endless = schema(an_object({"next": {"$ref": "#"}}))
    text, num_tokens, has_cut = ramble(endless, 60)
    assert num_tokens == 60
    assert '"next"' in text
    assert not has_cut


def test_half_a_character_is_finished_before_the_string_is_closed() -> None:
    closing = Closings(BYTES).open(schema(TEXT), "enforced")
    said = list('"ü'.encode())[:2]
    while len(said) < 6:
        token = closing.choose(said, 0xC3, num_left=6 - len(said))
        said.append(token)
        if token == ord('"'):
            break
    assert validate(schema(TEXT), bytes(said).decode()) is None


def test_no_ending_is_looked_for_before_half_of_the_tokens_are_spent() -> None:
    short = schema(an_object({"a": TEXT, "b": TEXT}))
    assert first_look(short, max_tokens=900) == 450


@pytest.mark.parametrize(
    "constraint",
    [
        schema(an_object({f"property_{number}": TEXT for number in range(60)})),
        schema(an_object({"a": {"type": "array", "items": TEXT, "minItems": 100}})),
        schema({"$defs": {"a": an_object({"b": TEXT})}, "$ref": "#/$defs/a"}),
    ],
    ids=["many fields", "many items", "a reference"],
)
def test_ending_that_may_be_long_is_looked_for_early(constraint: Constraint) -> None:
    assert first_look(constraint, max_tokens=900) == 675


def first_look(constraint: Constraint, *, max_tokens: int) -> int:
    """Return how many tokens of an answer are left when an ending is looked for first."""
    closings = Closings(BYTES)
    looked_at: list[int] = []
    compile_ = closings._compile  # noqa: SLF001 -- that it looks shows in nothing else
    num_left = max_tokens

    def note(constraint: Constraint, *, is_lenient: bool) -> llguidance.LLMatcher | None:
        looked_at.append(num_left)
        return compile_(constraint, is_lenient=is_lenient)

    closings._compile = note  # type: ignore[method-assign]  # noqa: SLF001
    closing = closings.open(constraint, "enforced")
    said = list(b"{")
    while not looked_at:
        num_left -= 1
        closing.choose(said, ord(" "), num_left=num_left)
        said.append(ord(" "))
    return looked_at[0]
