import json

import llguidance
import pytest

from engine.constraints import byte_tokenizer, check, grammar_of, schema_with_options, validate
from engine.formats import tightened
from jobs.domain.request import Constraint


def fits(schema: object, text: str) -> bool:
    constraint = Constraint("json_schema", json.dumps(schema))
    assert check(constraint) == "enforced"
    matcher = llguidance.LLMatcher(byte_tokenizer(), grammar_of(constraint), log_level=0)
    given = list(json.dumps(text).encode())
    may_be_said = matcher.try_consume_tokens(given) == len(given) and matcher.is_accepting()
    assert may_be_said == (validate(constraint, json.dumps(text)) is None)
    return may_be_said


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", "2024-02-29", "2023-02-29"),
        ("date", "2000-02-29", "1900-02-29"),
        ("date", "2026-04-30", "2026-04-31"),
        ("time", "10:20:59Z", "10:20:60Z"),
        ("date-time", "2024-02-29T01:02:03Z", "2023-02-29T01:02:03Z"),
        ("date-time", "2024-01-01T01:02:59+01:00", "2024-01-01T01:02:60+01:00"),
        ("hostname", "a" * 63 + ".example", "a" * 64 + ".example"),
        ("email", "a" * 64 + "@example.com", "a" * 65 + "@example.com"),
    ],
)
def test_what_no_validator_takes_for_a_format_is_not_generated(
    name: str, good: str, bad: str
) -> None:
    for schema in (
        {"type": "string", "format": name},
        {"type": ["string", "null"], "format": name, "pattern": "[0-9a-z]", "maxLength": 200},
        {"anyOf": [{"format": name}, {"type": "null"}]},
    ):
        assert fits(schema, good)
        assert not fits(schema, bad)


def test_a_value_or_property_that_is_called_format_is_none() -> None:
    for schema in (
        {"const": {"format": "date"}},
        {"enum": [{"format": "date"}]},
        {"properties": {"format": {"type": "integer"}, "date": {"const": "format"}}},
        {"type": "integer", "format": "date"},
        {"type": "string", "format": "uuid"},
    ):
        assert tightened(schema) == schema


def test_what_an_engine_compiles_itself_says_it_too() -> None:
    dated = Constraint("json_schema", '{"items": {"format": "date"}}')
    assert "pattern" in json.loads(schema_with_options(dated, lenient=False))["items"]
