"""What an answer must look like: checked before running, proven after; `matching` keeps it.

A constraint is *enforced* when the library that masks tokens keeps all of it, and *validated*
when it keeps only part (a schema with `uniqueItems`, `not`, ...): then the part it can keep is
kept, the answer is checked afterwards, and asked for again where it fails.

Whitespace in JSON is at most one space wherever JSON allows any. That admits what `json.dumps`
writes by default and the compact form, and never the endless blanks that a weak model falls into.
"""

import re
from collections.abc import Collection, Iterator
from importlib.metadata import version
from typing import Any, Literal

import jsonschema_rs
import llguidance
import msgspec
import xxhash
from llguidance.gbnf_to_lark import any_to_lark

from engine.bounded import BoundedCache
from engine.complexity import MAX_LEVELS, Extent, TooDeep, is_endless, measure
from engine.config import ConstraintBackend
from engine.formats import tightened
from jobs.domain.errors import InvalidInput
from jobs.domain.nesting import nesting_of
from jobs.domain.request import Constraint

Enforcement = Literal["enforced", "validated"]

MAX_SPEC_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_NODES = 10_000
MAX_FOLLOWED_PARTS = 100_000
"""Of a schema whose references are followed wherever they stand."""
MAX_ENUM_VALUES = 5_000
MAX_PATTERN_CHARS = 2_048

ONE_SPACE = " ?"
_STRICT = {"coerce_one_of": False, "lenient": False}
_SPACE_BEHIND = {
    "whitespace_flexible": False,
    "whitespace_pattern": "",
    "item_separator": ", ?",
    "key_separator": ": ?",
}
_SPACE_ANYWHERE = {
    "whitespace_flexible": True,
    "whitespace_pattern": ONE_SPACE,
    "item_separator": ",",
    "key_separator": ":",
}
# llguidance before 1.9, which vLLM holds to, repeats `whitespace_pattern` without end.
_REPEATS_PATTERN = tuple(map(int, version("llguidance").split(".")[:2])) < (1, 9)
_JSON_OPTIONS = {**_STRICT, **(_SPACE_BEHIND if _REPEATS_PATTERN else _SPACE_ANYWHERE)}
"""Given as overrides: a schema may not loosen them with an `x-guidance` of its own."""
_LOOSE = {"coerce_one_of": True, "lenient": True}
_LENIENT = {**_JSON_OPTIONS, **_LOOSE}
_ANY_OBJECT = '{"type": "object"}'
OUTLINES_IGNORES = frozenset(
    {
        "allOf",
        "contains",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "if",
        "maxContains",
        "maxProperties",
        "maximum",
        "minContains",
        "minProperties",
        "minimum",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
"""Keywords that outlines_core leaves out, or reads otherwise, without a word."""


def key_of(constraint: Constraint) -> bytes:
    """Return what tells this constraint from every other."""
    return xxhash.xxh3_128_digest(f"{constraint.kind}\0{constraint.spec}".encode())


# --- before running: may this constraint be used, and how well can it be kept? ---


def check(constraint: Constraint, *, backend: ConstraintBackend = "llguidance") -> Enforcement:
    """Return how well a constraint can be kept; see `examine`."""
    return examine(constraint, backend=backend)[0]


def examine(
    constraint: Constraint, *, backend: ConstraintBackend = "llguidance"
) -> tuple[Enforcement, str]:
    """Return how well a constraint can be kept, and what of it cannot; fetches nothing.

    Needs no model. Compiles the constraint, so an unknown one belongs in `engine.sandbox`.

    Raises:
        InvalidInput: it is no schema, regular expression or grammar, or is larger than allowed;
            `error_code` is invalid_schema, invalid_regex, invalid_grammar or invalid_value.
    """
    _check_size(constraint)
    if constraint.kind == "json_schema":
        return _examine_schema(constraint, backend)
    if constraint.kind != "json_object":
        _try_compile(grammar_of(constraint), constraint.kind)
    return "enforced", ""


def _check_size(constraint: Constraint) -> None:
    if len(constraint.spec.encode("utf-8", "surrogatepass")) > MAX_SPEC_BYTES:
        raise _invalid(constraint.kind, f"is larger than {MAX_SPEC_BYTES // 1024} KiB")
    if constraint.kind == "regex" and len(constraint.spec) > MAX_PATTERN_CHARS:
        raise _invalid("regex", f"is longer than {MAX_PATTERN_CHARS} characters")


def _examine_schema(constraint: Constraint, backend: ConstraintBackend) -> tuple[Enforcement, str]:
    schema = parse_schema(constraint.spec)
    _schema_validator(constraint)
    strict = _grammar_of_schema(constraint.spec, lenient=False)
    complaint = llguidance.LLMatcher.validate_grammar(strict, None)
    if not complaint:
        _try_compile(strict, "json_schema")
        ignored = OUTLINES_IGNORES.intersection(keywords_of(schema))
        if backend == "outlines_core" and ignored:
            return "validated", _partly(ignored)
        return "enforced", ""
    if complaint.startswith("Unsatisfiable"):
        raise _invalid("json_schema", "cannot be satisfied by any value")
    lenient = _grammar_of_schema(constraint.spec, lenient=True)
    if llguidance.LLMatcher.validate_grammar(lenient, None).startswith("Unsatisfiable"):
        raise _invalid("json_schema", "cannot be satisfied by any value")
    if complaint.startswith("Unknown format"):
        return "validated", _partly({"format"})
    return "validated", _partly(_SCHEMA_WORDS.intersection(re.findall(r"[$A-Za-z]+", complaint)))


def _partly(keywords: Collection[str]) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(keywords)) or "a keyword"
    return f"The JSON schema uses {names}, which cannot be enforced while generating."


def _try_compile(grammar: str, kind: str) -> None:
    """Build the parser over bytes and ask it for one mask, which is where the work is done."""
    matcher = llguidance.LLMatcher(byte_tokenizer(), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise _invalid(kind, f"is refused: {first_line(matcher.get_error())}")


def first_line(complaint: str) -> str:
    """Return what is wrong, without the quotation of the text that llguidance adds."""
    for line in complaint.splitlines():
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    first = complaint.splitlines()[0] if complaint else "unknown reason"
    return re.sub(r':? *\(.*|"[^"]*"', "...", first)[:200]


_CODES = {
    "json_schema": ("invalid_schema", "The JSON schema"),
    "json_object": ("invalid_schema", "The JSON schema"),
    "regex": ("invalid_regex", "The regular expression"),
    "choice": ("invalid_value", "The list of choices"),
    "grammar": ("invalid_grammar", "The grammar"),
}


def _invalid(kind: str, what: str) -> InvalidInput:
    code, subject = _CODES[kind]
    return InvalidInput(f"{subject} {what}.", error_code=code)


def parse_schema(spec: str) -> dict[str, Any] | bool:
    """Return a schema within the static limits.

    Raises:
        InvalidInput: it is not a schema, is too large, or refers to somewhere else.
    """
    try:
        schema = msgspec.json.decode(spec)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise _invalid("json_schema", "is not valid JSON") from None
    if schema is False:
        raise _invalid("json_schema", "cannot be satisfied by any value")
    if schema is not True and not isinstance(schema, dict):
        raise _invalid("json_schema", "is neither an object nor true")
    num_nodes = 0
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        node, depth = waiting.pop()
        num_nodes += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise _invalid("json_schema", f"is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        if num_nodes > MAX_SCHEMA_NODES:
            raise _invalid("json_schema", f"has more than {MAX_SCHEMA_NODES} parts")
        if isinstance(node, dict):
            _check_keywords(node)
            waiting.extend((value, depth + 1) for value in node.values())
        elif isinstance(node, list):
            waiting.extend((value, depth + 1) for value in node)
    _check_extent(schema)
    return schema


def _check_extent(schema: object) -> None:
    try:
        extent = measure(schema)
    except TooDeep:
        raise _invalid(
            "json_schema", f"goes deeper than {MAX_LEVELS} levels when its references are followed"
        ) from None
    if extent.num_parts > MAX_FOLLOWED_PARTS:
        raise _invalid(
            "json_schema",
            f"has more than {MAX_FOLLOWED_PARTS} parts when its references are followed; name "
            "fewer definitions more than once",
        )
    if is_endless(schema):
        raise _invalid("json_schema", "cannot be satisfied by any value that ends")


def _check_keywords(node: dict[str, Any]) -> None:
    for name in ("$ref", "$dynamicRef", "$recursiveRef"):
        target = node.get(name)
        if isinstance(target, str) and not target.startswith("#"):
            raise _invalid(
                "json_schema",
                f"has a {name} that points outside of it; nothing is fetched, so put the "
                "definition under $defs",
            )
    values = node.get("enum")
    if isinstance(values, list) and len(values) > MAX_ENUM_VALUES:
        raise _invalid("json_schema", f"has an enum of more than {MAX_ENUM_VALUES} values")
    pattern = node.get("pattern")
    named = node.get("patternProperties")
    patterns = [pattern, *(named if isinstance(named, dict) else ())]
    if any(isinstance(p, str) and len(p) > MAX_PATTERN_CHARS for p in patterns):
        raise _invalid("json_schema", f"has a pattern of more than {MAX_PATTERN_CHARS} characters")


def keywords_of(schema: object) -> Iterator[str]:
    """Yield every key of a schema, wherever it stands."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def choices_of(constraint: Constraint) -> list[str]:
    """Return the strings that a "choice" constraint allows.

    Raises:
        InvalidInput: there is none, or there are too many.
    """
    try:
        choices = msgspec.json.decode(constraint.spec, type=list[str])
    except (msgspec.MsgspecError, UnicodeError):
        raise _invalid("choice", "is not a list of strings") from None
    if not 1 <= len(choices) <= MAX_ENUM_VALUES:
        raise _invalid("choice", f"must have 1 to {MAX_ENUM_VALUES} entries")
    return choices


def grammar_of(constraint: Constraint, *, lenient: bool = False) -> str:
    """Return the constraint as llguidance spells it; `lenient` leaves out what it cannot keep.

    Raises:
        InvalidInput: it cannot be spelled at all.
    """
    if constraint.kind == "json_schema":
        return _grammar_of_schema(constraint.spec, lenient=lenient)
    if constraint.kind == "json_object":
        return _grammar_of_schema(_ANY_OBJECT, lenient=False)
    if constraint.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(constraint.spec)
    if constraint.kind == "choice":
        # A Lark string is written as a JSON string is.
        alternatives = (msgspec.json.encode(choice).decode() for choice in choices_of(constraint))
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(alternatives))
    try:
        return llguidance.LLMatcher.grammar_from_lark(any_to_lark(constraint.spec))
    except Exception:  # noqa: BLE001 -- the converter raises bare Exceptions
        raise _invalid("grammar", "is neither Lark nor EBNF") from None


def _grammar_of_schema(spec: str, *, lenient: bool) -> str:
    try:
        if '"format"' in spec:
            spec = msgspec.json.encode(tightened(msgspec.json.decode(spec))).decode()
        return llguidance.LLMatcher.grammar_from_json_schema(
            "{}" if spec.strip() == "true" else spec,
            overrides=_LENIENT if lenient else _JSON_OPTIONS,  # type: ignore[arg-type]  # a TypedDict
        )
    except ValueError:
        raise _invalid("json_schema", "is not valid JSON") from None


def schema_with_options(constraint: Constraint, *, lenient: bool) -> str:
    """Return a JSON constraint's schema that carries our options itself.

    For an engine that calls llguidance without them; with `lenient` without the keywords that
    cannot be kept. One space may follow a comma or a colon, with every version of llguidance.
    """
    schema = parse_schema(_ANY_OBJECT if constraint.kind == "json_object" else constraint.spec)
    options = {**(_LOOSE if lenient else _STRICT), **_SPACE_BEHIND}
    described = tightened(schema) if isinstance(schema, dict) else {}
    return msgspec.json.encode({**described, "x-guidance": options}).decode()


# --- after generating: is the answer what was asked for? ---

_QUICK_STEPS = 300_000
"""About a tenth of a second at worst."""
_QUICK_BYTES = 256 * 1024


def is_quick(constraint: Constraint, text: str) -> bool:
    """Return whether `validate` is sure to take no longer than a blink on this text.

    What is not belongs in `engine.sandbox`: nothing can interrupt it.
    """
    if constraint.kind in {"choice", "json_object"}:
        return True
    if constraint.kind != "json_schema":
        return len(text) <= _QUICK_BYTES
    extent = _schema_validator(constraint)[1]
    steps = (extent.num_parts + extent.num_states) * (1 + len(text) // 8)
    if extent.num_returns > 1 and steps <= _QUICK_STEPS:
        # Each level of the answer may be followed again by every one of them.
        steps *= (1 + extent.num_returns) ** min(nesting_of(text.encode("utf-8", "replace")), 64)
    return steps <= _QUICK_STEPS


def validate(constraint: Constraint, text: str) -> str | None:
    """Return why `text` breaks the constraint, or None when it keeps it; never quotes the text."""
    if constraint.kind == "choice":
        return None if text in choices_of(constraint) else "it is none of the choices"
    if constraint.kind in ("regex", "grammar"):
        return _validate_by_grammar(constraint, text)
    try:
        value = msgspec.json.decode(text)
    except RecursionError:
        return "it is nested too deeply"
    except (msgspec.MsgspecError, UnicodeError):
        return "it is not valid JSON"
    try:
        return _validate_value(constraint, value)
    except (ValueError, RecursionError):  # it compares with `enum` down to 255 levels
        return "it is nested too deeply"


def _validate_value(constraint: Constraint, value: object) -> str | None:
    if constraint.kind == "json_object":
        return None if isinstance(value, dict) else "it is not a JSON object"
    validator = _schema_validator(constraint)[0]
    if validator.is_valid(value):
        return None
    error = next(iter(validator.iter_errors(value)), None)
    return f"it breaks `{error.kind.name}` of its schema" if error else "it breaks its schema"


_VALIDATORS: BoundedCache[tuple[jsonschema_rs.Validator, Extent]] = BoundedCache(
    max_entries=4096, max_bytes=64 << 20
)
_ACCEPTORS: BoundedCache[llguidance.LLMatcher] = BoundedCache(max_entries=512, max_bytes=64 << 20)
ACCEPTOR_BYTES = 512 * 1024
"""Measured with classes of Unicode, once it has read a text."""
SCHEMA_BYTES = 160 * 1024
"""Measured with a schema of two properties, once it has made a mask."""
_BYTES: list[llguidance.LLTokenizer] = []


def _schema_validator(constraint: Constraint) -> tuple[jsonschema_rs.Validator, Extent]:
    key = key_of(constraint)
    found = _VALIDATORS.find(key)
    if found is not None:
        return found
    schema = parse_schema(constraint.spec)
    try:
        validator = jsonschema_rs.validator_for(
            schema,
            validate_formats=True,
            offline=True,
            # Linear in the text, whatever the pattern: no look-around, no back-references.
            pattern_options=jsonschema_rs.RegexOptions(),
        )
    except jsonschema_rs.ValidationError as error:
        where = [part for part in error.instance_path if part in _SCHEMA_WORDS]
        at = f" (at `{where[-1]}`)" if where else ""
        raise _invalid("json_schema", f"is not a valid schema{at}") from None
    except ValueError:
        raise _invalid("json_schema", "is not a valid schema") from None
    extent = measure(schema)
    # Measured: some ten kilobytes for each pattern that was used, whatever its length.
    weight = 8 * len(constraint.spec) + 8192 * extent.num_patterns + 64 * extent.num_states
    return _VALIDATORS.keep(key, (validator, extent), weight=weight)


_SCHEMA_WORDS = frozenset(
    {
        "unevaluatedProperties",
        "unevaluatedItems",
        "then",
        "minContains",
        "maxContains",
        "if",
        "else",
        "dependentSchemas",
        "dependentRequired",
        "$anchor",
        "$defs",
        "$ref",
        "$schema",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "contains",
        "definitions",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "prefixItems",
        "properties",
        "propertyNames",
        "required",
        "type",
        "uniqueItems",
    }
)


def byte_tokenizer() -> llguidance.LLTokenizer:
    """Return llguidance's tokenizer whose tokens are the bytes."""
    if not _BYTES:
        _BYTES.append(llguidance.LLTokenizer("byte"))
    return _BYTES[0]


def _validate_by_grammar(constraint: Constraint, text: str) -> str | None:
    key = key_of(constraint)
    acceptor = _ACCEPTORS.find(key)
    if acceptor is None:
        acceptor = llguidance.LLMatcher(byte_tokenizer(), grammar_of(constraint), log_level=0)
        _ACCEPTORS.keep(key, acceptor, weight=8 * len(constraint.spec) + ACCEPTOR_BYTES)
    else:
        acceptor.reset()
    given = list(text.encode("utf-8", "surrogatepass"))
    num_taken = acceptor.try_consume_tokens(given)
    if acceptor.is_error():
        _ACCEPTORS.forget(key)
        return "it could not be checked"
    if num_taken == len(given) and acceptor.is_accepting():
        return None
    noun = "regular expression" if constraint.kind == "regex" else "grammar"
    return f"it does not match its {noun}"
