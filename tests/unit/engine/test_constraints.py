import json
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest

from engine import constraints
from engine.bounded import BoundedCache
from engine.config import ConstraintBackend
from engine.constraints import check, validate
from engine.matching import Masks, TokenizerConstraints, _LlguidanceMatcher
from jobs.domain.errors import InvalidInput
from jobs.domain.request import Constraint


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def accepts(constraint: Constraint, text: str) -> bool:
    """Return whether the grammar that masks tokens lets `text` through, to its end."""
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), constraints.grammar_of(constraint), log_level=0
    )
    given = list(text.encode())
    return matcher.try_consume_tokens(given) == len(given) and matcher.is_accepting()


def an_object(properties: dict[str, Any], **more: object) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


PERSON = an_object({"name": {"type": "string"}, "ages": {"type": "array"}})
ENFORCED = [
    ("minimum", {"type": "integer", "minimum": 3, "maximum": 7}, 5, 9),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 3}, 3.5, 2.5),
    ("multipleOf", {"type": "integer", "multipleOf": 5}, 15, 16),
    ("maxLength", {"type": "string", "minLength": 2, "maxLength": 4}, "abc", "abcdef"),
    ("pattern", {"type": "string", "pattern": "^[a-c]+$"}, "abc", "xyz"),
    ("unanchored", {"type": "string", "pattern": "b"}, "abc", "xyz"),
    ("date", {"type": "string", "format": "date"}, "2024-01-31", "hello"),
    ("email", {"type": "string", "format": "email"}, "a@b.co", "hello"),
    ("ipv4", {"type": "string", "format": "ipv4"}, "1.2.3.4", "hello"),
    ("enum", {"enum": ["a", 1, None]}, "a", "b"),
    ("maxItems", {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [1], [1, 2, 3]),
    ("prefixItems", {"prefixItems": [{"type": "integer"}], "items": False}, [1], ["a"]),
    (
        "maxProperties",
        {"type": "object", "maxProperties": 1, "additionalProperties": {"type": "integer"}},
        {"a": 1},
        {"a": 1, "b": 2},
    ),
    (
        "patternProperties",
        {"type": "object", "patternProperties": {"^a": {}}, "additionalProperties": False},
        {"ab": 1},
        {"b": 1},
    ),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, True, "x"),
    ("type list", {"type": ["integer", "null"]}, None, "x"),
    (
        "$ref",
        {"$defs": {"p": {"type": "integer"}}, **an_object({"a": {"$ref": "#/$defs/p"}})},
        {"a": 1},
        {"a": "x"},
    ),
]
VALIDATED = [
    ("uniqueItems", {"type": "array", "uniqueItems": True}, [1, 2], [1, 1]),
    ("contains", {"type": "array", "contains": {"const": 7}}, [1, 7], [1, 2]),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}]}, 3, 6),
    ("not", {"type": "string", "not": {"const": "x"}}, "y", "x"),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}, {"ab": 1}, {"b": 1}),
    (
        "dependentRequired",
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"a": 1, "b": 2},
        {"a": 1},
    ),
    (
        "if",
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"a": 1, "b": 2},
        {"a": 1},
    ),
]


@pytest.mark.parametrize(("name", "text", "good", "bad"), ENFORCED, ids=[c[0] for c in ENFORCED])
def test_enforceable_keyword_is_kept_while_generating_and_checked_after(
    name: str,
    text: dict[str, Any],
    good: object,
    bad: object,
) -> None:
    constraint = schema(text)
    assert check(constraint) == "enforced", name
    assert accepts(constraint, json.dumps(good))
    assert not accepts(constraint, json.dumps(bad))
    assert validate(constraint, json.dumps(good)) is None
    assert validate(constraint, json.dumps(bad)) is not None


@pytest.mark.parametrize(("name", "text", "good", "bad"), VALIDATED, ids=[c[0] for c in VALIDATED])
def test_keyword_that_cannot_be_enforced_is_named_and_checked_after(
    name: str,
    text: dict[str, Any],
    good: object,
    bad: object,
) -> None:
    constraint = schema(text)
    outcome, message = constraints.examine(constraint)
    assert outcome == "validated"
    assert f"`{name}`" in message
    assert validate(constraint, json.dumps(good)) is None
    assert validate(constraint, json.dumps(bad)) is not None


@pytest.mark.parametrize(
    "text",
    ['{"name": "x", "ages": [1, 2]}', '{"name":"x","ages":[1,2]}', '{"name":"x", "ages": [1,2]}'],
)
def test_json_may_be_written_with_single_spaces_or_none(text: str) -> None:
    assert accepts(schema(PERSON), text)


@pytest.mark.parametrize(
    "text", ['{"name":  "x", "ages": []}', '{"name": "x",\n"ages": []}', '{\t"name":"x","ages":[]}']
)
def test_json_may_not_be_padded_with_whitespace(text: str) -> None:
    assert not accepts(schema(PERSON), text)


def test_schema_cannot_loosen_the_rules_with_options_of_its_own() -> None:
    loosened = {**PERSON, "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": r"\s*"}}
    assert not accepts(schema(loosened), '{"name":    "x", "ages": []}')
    lenient = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    assert check(schema(lenient)) == "validated"


@pytest.mark.parametrize(
    ("constraint", "code"),
    [
        (Constraint("json_schema", "{"), "invalid_schema"),
        (Constraint("json_schema", "[1]"), "invalid_schema"),
        (Constraint("json_schema", "false"), "invalid_schema"),
        (schema({"type": "strin"}), "invalid_schema"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "invalid_schema"),
        (schema({"$ref": "http://example.com/schema"}), "invalid_schema"),
        (schema({"$ref": "file:///etc/passwd"}), "invalid_schema"),
        (schema({"$ref": "#/$defs/nowhere"}), "invalid_schema"),
        (schema({"type": "string", "pattern": "("}), "invalid_schema"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "invalid_schema"),
        (schema({"enum": list(range(5001))}), "invalid_schema"),
        (schema({"type": "string", "pattern": "a" * 2049}), "invalid_schema"),
        (schema({"const": "x" * 300_000}), "invalid_schema"),
        (Constraint("regex", "("), "invalid_regex"),
        (Constraint("regex", r"(a)\1"), "invalid_regex"),
        (Constraint("regex", "a" * 2049), "invalid_regex"),
        (Constraint("grammar", "start: missing"), "invalid_grammar"),
        (Constraint("grammar", "?start: ["), "invalid_grammar"),
        (Constraint("choice", "[]"), "invalid_value"),
        (Constraint("choice", "[1]"), "invalid_value"),
    ],
)
def test_constraint_that_is_none_is_refused_with_its_code(
    constraint: Constraint, code: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        check(constraint)
    assert caught.value.error_code == code


def test_deep_and_wide_schemas_are_refused_before_anything_is_compiled() -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"items": deep}
    with pytest.raises(InvalidInput, match="nested deeper"):
        check(schema(deep))
    with pytest.raises(InvalidInput, match="more than 10000 parts"):
        check(schema({"properties": {f"p{i}": {} for i in range(10_001)}}))


def test_refusal_does_not_repeat_what_the_constraint_says() -> None:
    for constraint in (
        schema({"properties": {"canary": {"type": "canary"}}}),
        Constraint("regex", "canary("),
        Constraint("grammar", "start: canary"),
    ):
        with pytest.raises(InvalidInput) as caught:
            check(constraint)
        assert "canary" not in caught.value.message


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Constraint("json_object"), '{"a": [1]}', "[1]"),
        (Constraint("regex", r"[a-f]{3}-\d{2}"), "abc-12", "abc-123"),
        (Constraint("regex", "a|b"), "b", "ab"),
        (Constraint("choice", '["yes", "no", "say \\"hi\\"\\n", "é😀"]'), 'say "hi"\n', "yes "),
        (Constraint("choice", '["no", "not"]'), "not", "n"),
        (Constraint("grammar", 'start: "a" | "b" start'), "bba", "bb"),
        (Constraint("grammar", 'root ::= "a" | "b" root'), "bba", "c"),
    ],
)
def test_other_kinds_are_enforced_and_validated(
    constraint: Constraint, good: str, bad: str
) -> None:
    assert check(constraint) == "enforced"
    assert accepts(constraint, good)
    assert not accepts(constraint, bad)
    assert validate(constraint, good) is None
    assert validate(constraint, bad) is not None
    assert validate(constraint, good) is None, "a verdict does not depend on the one before"


@pytest.mark.parametrize("text", ['{"n": NaN}', '{"n": Infinity}', '{"n": -Infinity}', "{'n': 1}"])
def test_what_is_not_json_is_no_valid_answer(text: str) -> None:
    assert validate(schema({"type": "object"}), text) == "it is not valid JSON"


def test_reason_names_the_keyword_and_not_the_answer() -> None:
    constraint = schema(an_object({"age": {"type": "integer", "maximum": 9}}))
    assert validate(constraint, '{"age": 31337}') == "it breaks `maximum` of its schema"


def test_catastrophic_pattern_is_validated_in_linear_time() -> None:
    constraint = schema({"type": "string", "pattern": "^(a|a)*(b|b)*$"})
    assert validate(constraint, json.dumps("a" * 50_000 + "!")) is not None
    assert validate(Constraint("regex", "(a|aa)*b"), "a" * 5_000) is not None


def test_deeply_nested_answer_is_invalid_and_not_a_crash() -> None:
    assert validate(Constraint("json_object"), '{"a":' * 100_000) is not None


def test_cache_forgets_the_oldest_by_number_and_by_weight() -> None:
    cache: BoundedCache[int] = BoundedCache(max_entries=2, max_bytes=100)
    cache.keep(b"a", 1, weight=10)
    cache.keep(b"b", 2, weight=10)
    assert cache.find(b"a") == 1
    cache.keep(b"c", 3, weight=10)
    assert cache.find(b"b") is None
    cache.keep(b"d", 4, weight=95)
    assert cache.find(b"a") is None
    assert cache.find(b"d") == 4


def test_what_a_cache_was_told_to_forget_weighs_nothing() -> None:
    cache: BoundedCache[int] = BoundedCache(max_entries=9, max_bytes=100)
    for _ in range(9):
        cache.keep(b"a", 1, weight=60)
        cache.forget(b"a")
        cache.forget(b"a")
    assert cache.find(b"a") is None
    cache.keep(b"b", 2, weight=40)
    cache.keep(b"c", 3, weight=40)
    assert cache.find(b"b") == 2


@pytest.mark.parametrize("backend", ["llguidance", "outlines_core"])
@pytest.mark.parametrize(
    "constraint",
    [
        schema(an_object({"k": {"enum": ["x", "y"]}, "ok": {"type": "boolean"}})),
        Constraint("regex", r"[a-f]{3}-\d{2}"),
        Constraint("choice", '["yes", "no", "not"]'),
    ],
    ids=["json_schema", "regex", "choice"],
)
@pytest.mark.parametrize("is_beside", [False, True], ids=["at once", "beside"])
def test_walk_along_the_masks_ends_in_a_valid_answer(
    backend: ConstraintBackend,
    constraint: Constraint,
    is_beside: bool,  # noqa: FBT001 -- a value of the table
) -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    made = TokenizerConstraints(tokenizer, backend=backend)
    masks = Masks(2, made.num_words, is_beside=is_beside)
    rng = np.random.default_rng(0)
    for _ in range(5):
        matcher, enforcement = made.matcher(constraint)
        assert enforcement == "enforced"
        said = bytearray()
        while not matcher.is_finished():
            masks.begin([matcher])
            words, places, known = masks.take()
            if known:
                assert (places, list(known)) == ([], [0])
                token = known[0]
            else:
                bits = np.unpackbits(words[0].view(np.uint8), bitorder="little")
                token = int(rng.choice(np.flatnonzero(bits[: tokenizer.vocab_size])))
            assert matcher.advance(token)
            if token in tokenizer.eos_tokens:
                break
            said.append(token)
        assert matcher.is_accepting()
        assert validate(constraint, said.decode()) is None


def test_outlines_core_says_which_schemas_it_only_half_keeps() -> None:
    bounded = schema({"type": "integer", "minimum": 0, "maximum": 9})
    assert check(bounded, backend="outlines_core") == "validated"
    assert check(bounded) == "enforced"


def test_indexes_of_outlines_core_count_what_they_weigh() -> None:
    vocabulary = Path(__file__).parents[3] / "engine" / "demo" / "model" / "tokenizer.json"
    made = TokenizerConstraints(llguidance.LLTokenizer(str(vocabulary)), backend="outlines_core")
    bounded = {"type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": 8}
    for number in range(8):
        made.matcher(schema(an_object({f"lines{number}": bounded, "about": bounded})))
    # Each of these schemas has less than 300 bytes, and an index of some ten megabytes.
    kept = made._indexes  # noqa: SLF001 -- what it holds is not told
    assert 1 <= len(kept) < 8
    assert kept._num_bytes <= 64 << 20  # noqa: SLF001


@pytest.mark.parametrize("is_beside", [False, True], ids=["at once", "beside"])
def test_matcher_that_gives_up_lets_everything_pass_and_says_so(
    is_beside: bool,  # noqa: FBT001 -- a value of the table
) -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    limits = llguidance.LLParserLimits(initial_lexer_fuel=10)
    grammar = constraints.grammar_of(schema(PERSON))
    tired = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher = _LlguidanceMatcher(tired)  # no schema tires it on demand
    masks = Masks(1, (tokenizer.vocab_size + 31) // 32, is_beside=is_beside)
    masks.begin([matcher])
    assert (masks.take().words == -1).all()
    assert not matcher.forced()
    assert not matcher.advance(65)
    assert not matcher.is_finished()


def test_an_answer_that_is_deeper_than_the_library_compares_is_told_as_such() -> None:
    deep = "[" * 300 + "]" * 300
    assert validate(schema({"type": "array"}), deep) is None
    assert validate(schema({"enum": [1, [2]]}), deep) == "it is nested too deeply"
