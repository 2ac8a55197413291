"""Some six hundred schemas written for the purpose: every keyword, and what people really ask for.

Each comes with answers that keep it and answers that break it. `tests.corpus.table` writes them to
`schemas.jsonl` and measures them.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.schemas import make_schema

Schema = Any
Case = tuple[Schema, list[Any], list[Any]]
"""A schema, answers that keep it, answers that break it."""
FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {}

TEXT = {"type": "string"}
INT = {"type": "integer"}
NUM = {"type": "number"}
BOOL = {"type": "boolean"}
NULL = {"type": "null"}
LINE = {"type": "string", "maxLength": 24}
"""A string that a toy model ends."""


def family(make: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    FAMILIES[make.__name__] = make
    return make


def obj(properties: dict[str, Any], *optional: str, closed: bool = True, **more: Any) -> Schema:  # noqa: ANN401 -- any JSON
    """Return an object schema whose properties are required but for the `optional` ones."""
    made: dict[str, Any] = {"type": "object", "properties": properties}
    required = [name for name in properties if name not in optional]
    if required:
        made["required"] = required
    if closed:
        made["additionalProperties"] = False
    return made | more


def arr(items: Schema, least: int | None = None, most: int | None = None, **more: Any) -> Schema:  # noqa: ANN401 -- any JSON
    made: dict[str, Any] = {"type": "array", "items": items}
    if least is not None:
        made["minItems"] = least
    if most is not None:
        made["maxItems"] = most
    return made | more


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def one_of(*schemas: Schema) -> Schema:
    return {"oneOf": list(schemas)}


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


@family
def types() -> Iterator[Case]:
    values: dict[str, list[Any]] = {
        "string": ["", "a", 'ü " \\ \n'],
        "integer": [0, -7, 123456789012],
        "number": [0, -1.5, 2e3],
        "boolean": [True, False],
        "null": [None],
        "array": [[], [1, "x", [None]]],
        "object": [{}, {"a": {"b": [1]}}],
    }
    for kind, good in values.items():
        bad = [value for other, some in values.items() if other != kind for value in some[:1]]
        if kind == "number":
            bad.remove(0)
        if kind == "integer":
            bad = [value for value in bad if value != 0] + [1.5]
        yield {"type": kind}, good, bad
    pairs = (("string", "null"), ("integer", "string"), ("boolean", "null", "number"))
    for several in (*pairs, ("array", "object"), ("string", "array", "null")):
        good = [value for kind in several for value in values[kind]]
        others = [
            k for k in values if k not in several and not {k, *several} >= {"integer", "number"}
        ]
        yield {"type": list(several)}, good, [values[kind][0] for kind in others]
    yield {}, [1, "x", [], {}, None], []
    yield True, [1, "x", [], {}, None], []
    yield {"title": "Anything", "description": "no rule", "default": 1}, [1, []], []
    yield {"type": "object", "additionalProperties": True}, [{}, {"a": 1}], [[], 1]
    yield (
        {"type": "object", "properties": {"a": True, "b": {}}, "required": ["a"]},
        [
            {"a": 1},
            {"a": None, "b": "x"},
        ],
        [{}, {"b": 1}],
    )


@family
def bounds() -> Iterator[Case]:
    yield INT | {"minimum": 0, "maximum": 9}, [0, 9], [-1, 10, "5"]
    yield INT | {"minimum": 18, "maximum": 130}, [18, 99, 130], [17, 131, 5]
    yield INT | {"minimum": -273}, [-273, 0, 10**6], [-274]
    yield INT | {"maximum": 1000}, [1000, -5], [1001]
    yield INT | {"exclusiveMinimum": 0, "exclusiveMaximum": 101}, [1, 100], [0, 101]
    yield INT | {"minimum": 1900, "maximum": 2100}, [1900, 2026], [1899, 2101]
    yield INT | {"minimum": 5, "maximum": 5}, [5], [4, 6]
    yield INT | {"minimum": 0.5, "maximum": 2.5}, [1, 2], [0, 3]
    yield INT | {"minimum": -5, "maximum": 5, "multipleOf": 1}, [-5, 0, 5], [6]
    yield INT | {"multipleOf": 3, "minimum": 0, "maximum": 30}, [0, 27], [1, 31, 33]
    yield INT | {"multipleOf": 7}, [0, 49, 7000], [1, 50]
    yield INT | {"multipleOf": 100, "exclusiveMinimum": 0}, [100, 25000], [0, 150]
    yield INT | {"minimum": 10**12, "maximum": 10**15}, [10**13], [10**11, 10**16]
    yield NUM | {"minimum": 0, "maximum": 1}, [0, 0.25, 1], [-0.1, 1.01]
    yield NUM | {"minimum": -1, "maximum": 1}, [-1, -0.5, 0, 1], [-1.5, 2]
    yield NUM | {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.001], [0, 1]
    yield NUM | {"minimum": -90, "maximum": 90}, [-90, 12.5, 90], [90.1, -91]
    yield NUM | {"minimum": 36.5, "maximum": 42.25}, [36.5, 40, 42.25], [36.4, 42.3]
    yield NUM | {"multipleOf": 0.5, "minimum": 0, "maximum": 5}, [0, 0.5, 4.5], [0.25, 5.5]
    yield NUM | {"multipleOf": 0.01, "minimum": 0, "maximum": 100}, [0.25, 99.99], [0.005, 101]
    yield NUM | {"minimum": 1e-3, "maximum": 1e3}, [0.5, 1000], [0.0001, 1001]
    yield TEXT | {"minLength": 1, "maxLength": 5}, ["a", "abcde", "äöüßé"], ["", "abcdef"]
    yield TEXT | {"minLength": 3}, ["abc", "x" * 20], ["", "ab"]
    yield TEXT | {"maxLength": 10}, ["", "0123456789"], ["01234567890"]
    yield TEXT | {"minLength": 4, "maxLength": 4}, ["abcd", "日本語文"], ["abc", "abcde"]
    yield TEXT | {"minLength": 100, "maxLength": 120}, ["x" * 110], ["x" * 99, "x" * 121]
    yield arr(INT, 2, 4), [[1, 2], [1, 2, 3, 4]], [[1], [1, 2, 3, 4, 5], ["a", "b"]]
    yield arr(BOOL, 1, 1), [[True]], [[], [True, False]]
    yield arr(INT | {"minimum": 0, "maximum": 9}, 20, 20), [[1] * 20], [[1] * 19, [1] * 21]
    yield arr(BOOL, 0, 200), [[], [True] * 200], [[True] * 201]
    yield arr(LINE, 3), [["a", "b", "c"]], [["a"]]
    yield arr(NULL, None, 2), [[], [None]], [[None] * 3]
    for least, most in ((1, 2), (0, 1), (2, None), (None, 3)):
        counted: Schema = {
            "type": "object",
            "additionalProperties": INT | {"minimum": 0, "maximum": 9},
        }
        if least is not None:
            counted["minProperties"] = least
        if most is not None:
            counted["maxProperties"] = most
        good = {f"k{n}": n for n in range(least or most or 1)}
        bad = [{f"k{n}": n for n in range((most or 8) + 1)}] if most else [{"k": 1}]
        yield counted, [good], bad
    yield {"minimum": 5}, [5, "text", None], [4]
    yield {"maxLength": 2}, ["ab", 12345], ["abc"]
    yield {"minItems": 1}, [[1], "x", {}], [[]]
    yield (
        obj({"low": NUM | {"maximum": 0}, "high": NUM | {"minimum": 0}}),
        [{"low": -1, "high": 2.5}],
        [{"low": 1, "high": 1}],
    )


PATTERNS = (
    (r"^[A-Z]{2}-\d{3}$", ["AB-123"], ["AB-12", "ab-123", "xAB-123"]),
    (r"^\d{5}(-\d{4})?$", ["12345", "12345-6789"], ["1234", "12345-"]),
    (r"^(red|green|blue)$", ["red", "blue"], ["redd", "gre"]),
    (r"^[a-z]+(_[a-z]+)*$", ["snake", "snake_case_x"], ["Snake", "_a", "a__b"]),
    (r"^#[0-9a-fA-F]{6}$", ["#00ffAA"], ["#00ff", "00ffAA"]),
    (r"^\+?[1-9]\d{1,14}$", ["+491234567", "12"], ["0123", "+"]),
    (r"^v\d+\.\d+\.\d+(-[a-z0-9]+)?$", ["v1.2.3", "v0.10.0-rc1"], ["1.2.3", "v1.2"]),
    (r"^[A-Z]\d{2}(\.\d{1,2})?$", ["J45", "E11.65"], ["45", "J4", "E11."]),
    (r"^(?:[01]\d|2[0-3]):[0-5]\d$", ["00:00", "23:59"], ["24:00", "7:30"]),
    (r"^[^\s@]+@[^\s@]+\.[a-z]{2,}$", ["a@b.co"], ["a@b", "a b@c.de"]),
    (r"^(0|[1-9]\d*)$", ["0", "42"], ["042", "-1"]),
    (r"^[A-Z0-9]{4,8}$", ["ABCD", "A1B2C3D4"], ["ABC", "ABCDEFGHI"]),
    (r"^https://[a-z.]+/\d+$", ["https://a.b/1"], ["http://a.b/1", "https://a.b/"]),
    (r"^[ACGT]{3,12}$", ["ACG", "TTTTGGGG"], ["AC", "ACX"]),
    (r"^\d{4}-W[0-5]\d$", ["2026-W09"], ["2026-09", "26-W09"]),
    (r"^(\d{1,3}\.){3}\d{1,3}$", ["1.2.3.4"], ["1.2.3", "1.2.3.4.5"]),
    (r"^$", [""], ["a"]),
    (r"^a{0,3}b{2}$", ["bb", "aaabb"], ["aaaabb", "b"]),
    (r"^[äöüß]{2}$", ["äö", "ßü"], ["ae", "ä"]),
    (r"^[一-龥]{1,4}$", ["日本", "文"], ["にほん", ""]),
    (r"^\p{Lu}\p{Ll}+$", ["Ärger", "Paris"], ["paris", "P"]),
    (r"^[а-яё]{2,6}$", ["привет"], ["hello", "п"]),  # noqa: RUF001 -- Cyrillic is meant
    (r"^\w+$", ["abc_1"], ["", "a b"]),
    (r"^[\w.-]{1,12}$", ["a-b.c"], ["", "a b", "x" * 13]),
    (r"^\S{1,10}$", ["abc!?"], ["a b", ""]),
    (r"^.{3}$", ["abc", 'a"c'], ["ab", "abcd"]),
    (r"^(a|a)*b$", ["b", "aaab"], ["a", "ba"]),
    (r"^(x+x+)+y$", ["xxy"], ["xy", "xx"]),
    (r"\d", ["a1b", "7"], ["abc", ""]),
    (r"foo", ["foo", "a foo b"], ["fo", "bar"]),
    (r"^Dear ", ["Dear Ann", "Dear "], ["dear Ann", "Hi"]),
    (r"[.!?]$", ["Yes.", "No!"], ["Yes", ""]),
    (r"a|b", ["a", "xbx"], ["c", ""]),
    (r"^a|b$", ["ax", "xb"], ["xa", "c"]),
    (r"^\\[a-z]+\{\}$", ["\\alpha{}"], ["alpha", "\\alpha"]),
    (r"^\"[a-z]*\"$", ['"abc"', '""'], ["abc", '"']),
    (r"^\/api\/v\d\/$", ["/api/v1/"], ["api/v1"]),
    (r"^[\u0041-\u0043]{2}$", ["AB", "CC"], ["AD"]),
    (r"^\x41\t?$", ["A", "A\t"], ["B"]),
    (r"^(?i)abc$", ["abc", "ABC"], ["abd"]),
    (r"^[0-9]{1,3}%$", ["7%", "100%"], ["%", "1000%"]),
    (r"^(?:(?:ab){1,2}c?){2}$", ["abab", "abcababc"], ["ab", "abd"]),
)


@family
def patterns() -> Iterator[Case]:
    for pattern, good, bad in PATTERNS:
        yield TEXT | {"pattern": pattern}, good, [*bad, 5]
    yield (
        TEXT | {"pattern": "^[a-z]*$", "minLength": 2, "maxLength": 4},
        ["ab", "abcd"],
        [
            "a",
            "abcde",
            "AB",
        ],
    )
    yield {"pattern": "^x"}, ["xy", 5, None], ["y"]
    yield (
        obj({"sku": TEXT | {"pattern": "^[A-Z]{3}$"}, "lot": TEXT | {"pattern": r"^\d+$"}}),
        [{"sku": "ABC", "lot": "12"}],
        [{"sku": "AB", "lot": "12"}, {"sku": "ABC", "lot": "x"}],
    )
    yield arr(TEXT | {"pattern": "^[01]{8}$"}, 2, 2), [["01010101", "11111111"]], [["0101", "1"]]


FORMATS: dict[str, tuple[list[str], list[str]]] = {
    "date": (["2026-02-28", "2024-02-29"], ["2026-13-01", "28.02.2026", "2023-02-29"]),
    "time": (["23:59:59Z", "08:30:00+02:00"], ["25:00:00Z", "08:30"]),
    "date-time": (["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.678-05:00"], ["2026-01-02"]),
    "duration": (["P3D", "PT1H30M", "P1Y2M"], ["3 days", "P"]),
    "email": (["ann@example.com"], ["ann", "ann@"]),
    "idn-email": (["ann@example.com"], ["ann"]),
    "hostname": (["example.com", "a-b.c"], ["-a.com", "a..b"]),
    "idn-hostname": (["example.com"], ["a..b"]),
    "ipv4": (["127.0.0.1", "255.255.255.255"], ["256.1.1.1", "1.2.3"]),
    "ipv6": (["::1", "2001:db8::ff00:42:8329"], ["12345::", "1.2.3.4"]),
    "uri": (["https://example.com/a?b=c#d", "urn:isbn:123"], ["not a uri", "/relative"]),
    "uri-reference": (["/relative", "https://example.com"], ["a b"]),
    "iri": (["https://example.com/ü"], ["a b"]),
    "iri-reference": (["/ü"], ["a b"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567", "g" * 36]),
    "uri-template": (["/users/{id}"], ["/users/{id"]),
    "json-pointer": (["/a/0", ""], ["a/b"]),
    "relative-json-pointer": (["1/a", "0#"], ["/a"]),
    "regex": (["^a+$"], ["("]),
}


@family
def formats() -> Iterator[Case]:
    for name, (good, bad) in FORMATS.items():
        yield TEXT | {"format": name}, good, [*bad, 5]
    yield TEXT | {"format": "phone-number"}, ["anything"], [5]
    yield TEXT | {"format": "password", "minLength": 4, "maxLength": 12}, ["secret"], ["abc"]
    yield INT | {"format": "int32"}, [1], ["x"]
    yield NUM | {"format": "double", "minimum": 0, "maximum": 9}, [1.5], [10]
    yield TEXT | {"format": "date", "pattern": "^2026"}, ["2026-05-06"], ["2025-05-06"]
    yield TEXT | {"format": "uuid", "minLength": 36}, FORMATS["uuid"][0], ["x"]
    names = ("date", "uuid", "ipv4", "email", "time")
    yield (
        obj({name: TEXT | {"format": name} for name in names}),
        [{name: FORMATS[name][0][0] for name in names}],
        [dict.fromkeys(names, "x"), {}],
    )
    yield arr(TEXT | {"format": "date"}, 1, 3), [["2026-01-01"]], [["x"], []]
    yield any_of(TEXT | {"format": "ipv4"}, TEXT | {"format": "ipv6"}), ["1.2.3.4", "::1"], ["x"]
    yield {"format": "date"}, ["2026-01-01", 5], ["x"]
    for name in ("date-time", "hostname", "email", "uri"):
        yield (
            obj({"id": INT | {"minimum": 0, "maximum": 99}, "at": TEXT | {"format": name}}),
            [{"id": 1, "at": FORMATS[name][0][0]}],
            [{"id": 1, "at": "no such thing !"}],
        )


@family
def values() -> Iterator[Case]:
    yield {"const": "fixed"}, ["fixed"], ["other", None]
    yield {"const": None}, [None], [0, "null", False]
    yield {"const": 0}, [0], [1, "0", False]
    yield {"const": -1.25}, [-1.25], [1.25]
    yield {"const": True}, [True], [1, False]
    yield {"const": ""}, [""], [" "]
    yield {"const": [1, [2, {"a": None}]]}, [[1, [2, {"a": None}]]], [[1, [2]], []]
    yield {"const": {"a": 1, "b": [True]}}, [{"a": 1, "b": [True]}], [{"a": 1}, {}]
    yield (
        {"const": 'quote " backslash \\ newline \n tab \t'},
        ['quote " backslash \\ newline \n tab \t'],
        ["quote"],
    )
    yield {"const": "日本語 émoji 😀 \u200d"}, ["日本語 émoji 😀 \u200d"], ["日本語"]
    yield {"const": 12345678901234567890}, [12345678901234567890], [1]
    yield {"const": 1e22}, [1e22], [1]
    yield {"enum": ["a"]}, ["a"], ["b"]
    yield {"enum": ["a", "ab", "abc", "b"]}, ["a", "ab", "abc", "b"], ["c", "abcd", ""]
    yield {"enum": [1, 2, 3, 5, 8, 13]}, [1, 13], [4, 15, "1"]
    yield {"enum": [None, True, 0, "0", 0.5, [], {}]}, [None, True, 0, "0", 0.5, [], {}], [1, "x"]
    yield {"enum": [[1, 2], [3, 4]]}, [[1, 2], [3, 4]], [[1, 4], [1]]
    yield {"enum": [{"k": 1}, {"k": 2}]}, [{"k": 1}], [{"k": 3}, {}]
    yield {"enum": ["", " ", "  "]}, ["", " ", "  "], ["x"]
    yield {"enum": ["ja", "nein", "ça dépend", "не знаю", "はい"]}, ["ja", "はい"], ["yes"]
    yield TEXT | {"enum": ["low", "medium", "high"]}, ["low", "high"], ["lo", "highest", 1]
    yield INT | {"enum": [10, 20, 30]}, [20], [15, "20"]
    yield TEXT | {"enum": ["a", 1, "b"]}, ["a", "b"], [1]
    yield TEXT | {"enum": ["apple", "banana", "kiwi"], "maxLength": 4}, ["kiwi"], ["apple"]
    yield {"enum": [-1, 0, 1], "minimum": 0}, [0, 1], [-1]
    for size in (50, 200, 1000, 3000):
        codes = [f"C{number:05d}" for number in range(0, size * 7, 7)]
        yield {"enum": codes}, [codes[0], codes[-1]], ["C99999", "C0000"]
    countries = "AT BE BG CH CY CZ DE DK EE ES FI FR GB GR HR HU IE IS IT LT LU LV MT NL NO PL PT"
    yield obj({"country": {"enum": countries.split()}}), [{"country": "DE"}], [{"country": "XX"}]
    yield (
        obj({"yes": {"const": "yes"}, "n": {"const": 7}}),
        [{"yes": "yes", "n": 7}],
        [{"yes": "no", "n": 7}],
    )
    yield arr({"enum": ["news", "sport", "art"]}, 1, 3), [["news"], ["art", "art"]], [[], ["x"]]


@family
def objects() -> Iterator[Case]:
    yield (
        obj({"name": LINE, "age": INT | {"minimum": 0, "maximum": 150}}),
        [{"name": "Ann", "age": 5}],
        [{"name": "Ann"}, {"name": 1, "age": 5}, {"name": "A", "age": 5, "x": 1}],
    )
    yield obj({"a": BOOL, "b": BOOL, "c": BOOL}, "a", "b", "c"), [{}, {"b": True}], [{"d": 1}]
    yield obj({"a": BOOL, "b": NULL}, "a", closed=False), [{"b": None, "x": 9}], [{"a": True}]
    yield obj({}), [{}], [{"a": 1}, []]
    yield obj({"": LINE}), [{"": "x"}], [{}]
    yield (
        obj({"a b": INT, 'quo"te': INT, "back\\slash": INT}),
        [{"a b": 1, 'quo"te': 2, "back\\slash": 3}],
        [{"a b": 1}],
    )
    yield (
        obj({"straße": LINE, "名前": LINE, "имя": LINE, "😀": BOOL}),
        [{"straße": "x", "名前": "y", "имя": "z", "😀": True}],
        [{"straße": "x"}],
    )
    yield (
        obj({"$ref": LINE, "type": LINE, "properties": LINE}),
        [{"$ref": "a", "type": "b", "properties": "c"}],
        [{}],
    )
    yield {"type": "object", "additionalProperties": INT}, [{}, {"a": 1}], [{"a": "x"}, []]
    yield {"type": "object", "additionalProperties": arr(LINE, 0, 2)}, [{"a": ["x"]}], [{"a": 1}]
    yield (
        obj({"id": INT}, closed=False, additionalProperties=LINE),
        [
            {"id": 1},
            {"id": 1, "x": "y"},
        ],
        [{"id": 1, "x": 2}],
    )
    yield (
        obj({"a": INT}, "a", closed=False, additionalProperties=any_of(BOOL, NULL)),
        [{"a": 1, "b": None}],
        [{"b": 1}],
    )
    yield {"type": "object", "required": ["a", "b"]}, [{"a": 1, "b": 2}], [{"a": 1}]
    yield (
        {"type": "object", "required": ["x"], "additionalProperties": BOOL},
        [{"x": True}],
        [
            {"x": 1},
            {},
        ],
    )
    yield {"properties": {"a": INT}}, [{"a": 1}, [], "x"], [{"a": "x"}]
    yield (
        {"type": "object", "patternProperties": {"^x-": LINE}, "additionalProperties": False},
        [
            {"x-a": "b"},
            {},
        ],
        [{"y": "b"}, {"x-a": 1}],
    )
    yield (
        {
            "type": "object",
            "patternProperties": {r"^\d+$": INT, "^[a-z]+$": BOOL},
            "additionalProperties": False,
        },
        [{"1": 2, "a": True}],
        [{"1": True}, {"A": 1}],
    )
    yield (
        obj({"id": INT}, patternProperties={"^meta_": LINE}),
        [{"id": 1, "meta_a": "x"}],
        [{"id": 1, "meta_a": 5}],
    )
    yield (
        {"type": "object", "patternProperties": {"^s_": LINE}, "additionalProperties": INT},
        [{"s_a": "x", "n": 1}],
        [{"s_a": 1}],
    )
    yield (
        obj({"deprecated": BOOL}, readOnly=True, examples=[{"deprecated": True}]),
        [{"deprecated": True}],
        [{}],
    )
    for width in (10, 30, 100):
        wide = {
            f"field_{n}": (BOOL, NULL, INT | {"minimum": 0, "maximum": 9})[n % 3]
            for n in range(width)
        }
        filled = {f"field_{n}": (True, None, 7)[n % 3] for n in range(width)}
        yield obj(wide), [filled], [{}, filled | {"field_0": 5}]
        yield obj(wide, *list(wide)[1:]), [filled, {"field_0": True}], [{"field_1": None}]
    yield (
        obj({f"group_{g}": obj({f"flag_{n}": BOOL for n in range(5)}) for g in range(6)}),
        [{f"group_{g}": {f"flag_{n}": True for n in range(5)} for g in range(6)}],
        [{}],
    )


@family
def arrays() -> Iterator[Case]:
    yield arr(INT), [[], [1, 2]], [["a"], {}]
    yield arr(arr(INT | {"minimum": 0, "maximum": 9}, 2, 2), 2, 2), [[[1, 2], [3, 4]]], [[[1, 2]]]
    yield arr(arr(arr(BOOL, 1, 1), 1, 1), 1, 1), [[[[True]]]], [[[True]]]
    yield (
        {"type": "array", "prefixItems": [INT, TEXT], "items": False},
        [[1, "a"], [1], []],
        [
            ["a"],
            [1, "a", 2],
        ],
    )
    yield (
        {"type": "array", "prefixItems": [INT, BOOL], "items": False, "minItems": 2},
        [[1, True]],
        [[1], [1, 2]],
    )
    yield (
        {"type": "array", "prefixItems": [LINE], "items": INT, "minItems": 1, "maxItems": 4},
        [["a", 1, 2]],
        [[1], ["a", "b"]],
    )
    yield (
        {"prefixItems": [NUM, NUM], "minItems": 2, "maxItems": 2, "type": "array"},
        [[1.5, 2]],
        [[1], ["a", 1]],
    )
    yield (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [INT, TEXT],
            "additionalItems": False,
        },
        [[1, "a"]],
        [["a", 1], [1, "a", 2]],
    )
    yield {"type": "array", "items": False}, [[]], [[1]]
    yield {"type": "array", "maxItems": 0}, [[]], [[1]]
    yield {"type": "array", "items": True, "minItems": 1, "maxItems": 2}, [[1], ["a", None]], [[]]
    yield {"items": INT}, [[1], "x", None], [["x"]]
    yield arr(any_of(INT, NULL), 1, 5), [[1, None]], [[], ["x"]]
    yield arr(obj({"k": LINE, "v": INT}), 0, 3), [[], [{"k": "a", "v": 1}]], [[{}], [1]]
    yield arr(obj({"id": INT | {"minimum": 1, "maximum": 99}}), 1, 3), [[{"id": 1}]], [[], [{}]]
    yield (
        obj({"matrix": arr(arr(NUM, 3, 3), 3, 3)}),
        [{"matrix": [[1, 2, 3]] * 3}],
        [{"matrix": [[1, 2, 3]] * 2}],
    )
    yield (
        obj({"tags": arr(LINE, 0, 5), "ids": arr(INT, 1, 3)}),
        [{"tags": [], "ids": [1]}],
        [{"tags": [], "ids": []}],
    )
    yield arr({"enum": list("abcdefg")}, 7, 7), [list("abcdefg")], [list("abc")]
    yield arr({"type": ["string", "null"], "maxLength": 3}, 1, 4), [["a", None]], [["abcd"]]
    yield arr(BOOL, 50, 60), [[True] * 55], [[True] * 49]


@family
def nested() -> Iterator[Case]:
    for depth in (2, 4, 6, 9, 12):
        made: Schema = obj({"leaf": BOOL})
        good: Any = {"leaf": True}
        bad: Any = {"leaf": 1}
        for level in range(depth):
            name = f"level_{level}"
            made, good, bad = obj({name: made}), {name: good}, {name: bad}
        yield made, [good], [bad, {}]
    for depth in (3, 7, 11):
        deep: Schema = INT | {"minimum": 0, "maximum": 9}
        good, bad = 5, 50
        for _ in range(depth):
            deep, good, bad = arr(deep, 1, 1), [good], [bad]
        yield deep, [good], [bad, []]
    for width in (2, 3):
        tree: Schema = {"enum": ["x", "y"]}
        value: Any = "x"
        for level in range(3):
            tree = obj({f"{'abc'[n]}{level}": tree for n in range(width)})
            value = {f"{'abc'[n]}{level}": value for n in range(width)}
        yield tree, [value], [{}]
    yield (
        obj({"a": arr(obj({"b": arr(obj({"c": arr(BOOL, 1, 2)}), 1, 2)}), 1, 2)}),
        [{"a": [{"b": [{"c": [True]}]}]}],
        [{"a": [{"b": []}]}],
    )
    yield (
        obj({"any": {}, "list": arr({}), "map": {"type": "object"}}),
        [{"any": 1, "list": [1, "a"], "map": {"x": [1]}}],
        [{"any": 1}],
    )
    for seed in range(25):
        yield make_schema(10_000 + seed), [], []


@family
def references() -> Iterator[Case]:
    point = obj({"x": INT, "y": INT})
    defs = {"$defs": {"point": point}}
    yield defs | ref("point"), [{"x": 1, "y": 2}], [{"x": 1}]
    yield (
        obj({"from": ref("point"), "to": ref("point")}) | defs,
        [{"from": {"x": 1, "y": 2}, "to": {"x": 3, "y": 4}}],
        [{"from": {"x": 1}, "to": 1}],
    )
    yield (
        {
            "definitions": {"n": INT | {"maximum": 9}},
            "items": {"$ref": "#/definitions/n"},
            "type": "array",
            "maxItems": 3,
        },
        [[1, 2]],
        [[10]],
    )
    yield {"$defs": {"a": ref("b"), "b": ref("c"), "c": BOOL}, **ref("a")}, [True], [1]
    yield (
        {"$defs": {"a/b": INT, "c~d": TEXT, "e%f": BOOL}}
        | obj({"x": {"$ref": "#/$defs/a~1b"}, "y": {"$ref": "#/$defs/c~0d"}}),
        [{"x": 1, "y": "s"}],
        [{"x": "s", "y": 1}],
    )
    yield {"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": INT | {"maximum": 9}}}, [5], [1, 10]
    yield {"$defs": {"p": {"$anchor": "spot", "type": "integer"}}, "$ref": "#spot"}, [5], ["x"]
    yield (
        obj({"a": INT | {"maximum": 9}, "b": {"$ref": "#/properties/a"}}),
        [{"a": 1, "b": 2}],
        [{"a": 1, "b": "x"}],
    )
    yield (
        {"$id": "https://example.com/s.json", "$defs": {"n": INT}, "$ref": "#/$defs/n"},
        [1],
        ["x"],
    )
    linked = obj({"value": INT | {"minimum": 0, "maximum": 9}, "next": any_of(ref("n"), NULL)})
    yield (
        {"$defs": {"n": linked}, **ref("n")},
        [
            {"value": 1, "next": None},
            {"value": 1, "next": {"value": 2, "next": None}},
        ],
        [{"value": 1}, {"value": 1, "next": {}}],
    )
    yield (
        obj({"name": LINE, "children": arr({"$ref": "#"}, 0, 3)}),
        [
            {"name": "a", "children": []},
            {"name": "a", "children": [{"name": "b", "children": []}]},
        ],
        [{"name": "a", "children": [1]}],
    )
    yield (
        obj({"v": BOOL, "left": {"$ref": "#"}, "right": {"$ref": "#"}}, "left", "right"),
        [
            {"v": True},
            {"v": True, "left": {"v": False}},
        ],
        [{"left": {"v": True}}],
    )
    expression = {
        "anyOf": [
            INT | {"minimum": 0, "maximum": 99},
            obj({"op": {"enum": ["add", "mul"]}, "args": arr(ref("e"), 2, 2)}),
        ]
    }
    yield (
        {"$defs": {"e": expression}, **ref("e")},
        [
            5,
            {"op": "add", "args": [1, {"op": "mul", "args": [2, 3]}]},
        ],
        [{"op": "sub", "args": [1, 2]}],
    )
    yield (
        {
            "$defs": {
                "node": one_of(
                    obj({"kind": {"const": "branch"}, "parts": arr(ref("node"), 1, 2)}),
                    obj({"kind": {"const": "leaf"}, "text": LINE}),
                )
            },
            **ref("node"),
        },
        [
            {"kind": "leaf", "text": "x"},
            {"kind": "branch", "parts": [{"kind": "leaf", "text": ""}]},
        ],
        [{"kind": "branch", "parts": []}],
    )
    yield (
        {
            "$defs": {
                "even": any_of(NULL, obj({"odd": ref("odd")})),
                "odd": obj({"even": ref("even")}),
            },
            **ref("even"),
        },
        [None, {"odd": {"even": None}}],
        [{"odd": None}],
    )
    yield (
        {"$defs": {"json": {"type": ["object", "array", "string", "number", "boolean", "null"]}}}
        | arr(ref("json"), 1, 3),
        [[1, {"a": []}]],
        [[]],
    )
    nested_list = any_of(INT | {"minimum": 0, "maximum": 9}, arr(ref("l"), 0, 2))
    yield {"$defs": {"l": nested_list}, **ref("l")}, [1, [1, [2]]], ["x"]
    yield (
        obj(
            {"folder": ref("folder")},
        )
        | {
            "$defs": {
                "file": obj({"name": LINE, "size": INT | {"minimum": 0}}),
                "folder": obj(
                    {
                        "name": LINE,
                        "files": arr(ref("file"), 0, 2),
                        "folders": arr(ref("folder"), 0, 2),
                    }
                ),
            }
        },
        [{"folder": {"name": "a", "files": [], "folders": []}}],
        [{"folder": {}}],
    )
    shared = obj({f"line{n}": LINE for n in range(3)})
    yield (
        obj(
            {f"address{n}": ref("shared") for n in range(4)},
            "address1",
            "address2",
            "address3",
        )
        | {"$defs": {"shared": shared}},
        [{"address0": {f"line{n}": "x" for n in range(3)}}],
        [{}],
    )
    yield (
        {"$dynamicRef": "#node", "$defs": {"n": {"$dynamicAnchor": "node", "type": "integer"}}},
        [1],
        ["x"],
    )


@family
def unions() -> Iterator[Case]:
    yield any_of(INT, BOOL), [1, True], ["x"]
    yield any_of(INT | {"maximum": 0}, INT | {"minimum": 10}), [0, 10], [5]
    yield any_of(TEXT | {"maxLength": 2}, TEXT | {"pattern": "^long"}), ["ab", "longer"], ["abc"]
    yield any_of({"const": "a"}, {"const": "b"}, NULL), ["a", None], ["c"]
    yield any_of(obj({"a": INT}), obj({"b": BOOL})), [{"a": 1}, {"b": True}], [{"a": True}, {}]
    yield any_of(obj({"a": INT}), obj({"a": INT, "b": INT})), [{"a": 1}, {"a": 1, "b": 2}], [{}]
    yield any_of(arr(INT, 1, 2), arr(BOOL, 1, 2)), [[1], [True]], [[1, True], []]
    yield any_of(INT, any_of(NULL, any_of(BOOL, {"const": "x"}))), [1, None, "x"], ["y"]
    yield one_of(INT, TEXT), [1, "x"], [None]
    yield one_of(NULL, obj({"a": INT})), [None, {"a": 1}], [{}]
    yield one_of({"const": 1}, {"const": 2}), [1, 2], [3]
    yield one_of(INT | {"maximum": 0}, INT | {"minimum": 10}), [0, 10], [5]
    yield one_of(INT, NUM | {"minimum": 5}), [3, 5.5], [6, 1.5]
    yield one_of(INT | {"multipleOf": 3}, INT | {"multipleOf": 5}), [3, 5], [15, 1]
    yield one_of(TEXT | {"maxLength": 4}, TEXT | {"minLength": 3}), ["a", "abcde"], ["abc"]
    yield (
        one_of(obj({"a": INT}, closed=False), obj({"b": INT}, closed=False)),
        [{"a": 1}],
        [{"a": 1, "b": 2}],
    )
    for tag in ("kind", "type", "event"):
        shapes = [
            obj({tag: {"const": "circle"}, "radius": NUM | {"minimum": 0, "maximum": 100}}),
            obj({tag: {"const": "square"}, "side": NUM | {"minimum": 0, "maximum": 100}}),
            obj({tag: {"const": "none"}}),
        ]
        good = [{tag: "circle", "radius": 1.5}, {tag: "square", "side": 2}, {tag: "none"}]
        bad = [{tag: "circle", "side": 2}, {tag: "star"}]
        yield one_of(*shapes), good, bad
        yield any_of(*shapes), good, bad
        yield (
            obj({"shape": one_of(*shapes)}, discriminator={"propertyName": tag}),
            [{"shape": value} for value in good],
            [{"shape": value} for value in bad],
        )
    yield obj({"value": any_of(INT, TEXT | {"maxLength": 5}, NULL)}), [{"value": None}], [{}]
    yield (
        obj({"value": {"type": ["integer", "null"], "minimum": 3, "maximum": 9}}),
        [
            {"value": None},
            {"value": 5},
        ],
        [{"value": 2}],
    )
    yield (
        arr(one_of(INT | {"minimum": 0, "maximum": 9}, obj({"ref": LINE})), 1, 3),
        [[1, {"ref": "x"}]],
        [["x"]],
    )
    for count in (10, 40, 120):
        many = [obj({"op": {"const": f"op_{n}"}, f"arg_{n}": BOOL}) for n in range(count)]
        yield any_of(*many), [{"op": "op_7", "arg_7": True}], [{"op": "op_7", "arg_8": True}]
    yield (
        {
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            "type": "object",
            "properties": {"a": INT, "b": INT},
            "additionalProperties": False,
        },
        [
            {"a": 1},
            {"b": 1},
        ],
        [{}],
    )
    yield {"type": "integer", "anyOf": [{"maximum": 5}, {"minimum": 10}]}, [5, 10], [7]
    yield (
        {"type": "string", "oneOf": [{"const": "a", "title": "A"}, {"const": "b", "title": "B"}]},
        ["a"],
        ["c"],
    )


@family
def intersections() -> Iterator[Case]:
    yield {"allOf": [INT, {"minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6, "x"]
    yield {"allOf": [TEXT, {"minLength": 2}, {"maxLength": 3}]}, ["ab"], ["a", "abcd"]
    yield {"allOf": [{"pattern": "^a"}, {"pattern": "z$"}], "type": "string"}, ["az", "abz"], ["a"]
    yield (
        {"allOf": [obj({"a": INT}, closed=False), obj({"b": BOOL}, closed=False)]},
        [{"a": 1, "b": True}],
        [{"a": 1}],
    )
    base = {"$defs": {"base": obj({"id": INT | {"minimum": 1, "maximum": 99}}, closed=False)}}
    yield (
        base | {"allOf": [ref("base"), obj({"name": LINE}, closed=False)]},
        [{"id": 1, "name": "x"}],
        [{"id": 1}],
    )
    yield (
        base | {"allOf": [ref("base")], "properties": {"name": LINE}, "required": ["name"]},
        [{"id": 1, "name": "x"}],
        [{"name": "x"}],
    )
    yield {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}, [2, 3], [1, 4]
    yield {"allOf": [{"type": ["integer", "string"]}, {"type": ["integer", "null"]}]}, [1], ["x"]
    yield {"allOf": [any_of(INT, TEXT), any_of(TEXT, NULL)]}, ["x"], [1, None]
    yield {"allOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer"}, [6, 12], [2, 3]
    yield {"allOf": [arr(INT, 1), arr(INT | {"maximum": 5}, None, 3)]}, [[1, 5]], [[], [6]]
    yield {"allOf": [{"allOf": [INT]}, {"allOf": [{"maximum": 3}]}]}, [1], [4]
    yield INT | {"allOf": [True]}, [1], ["x"]
    yield obj({"a": {"allOf": [INT, {"minimum": 0, "maximum": 9}]}}), [{"a": 5}], [{"a": 10}]
    yield (
        {"allOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}
        | {"properties": {"a": BOOL, "b": BOOL}, "additionalProperties": False},
        [{"a": True, "b": False}],
        [{"a": True}],
    )
    yield {"allOf": [{"format": "date"}, {"type": "string"}]}, ["2026-01-01"], ["x", 5]
    yield {"allOf": [{"not": {"const": 3}}, INT]}, [4], [3]
    yield (
        {"allOf": [{"properties": {"a": {"minimum": 3}}}, {"properties": {"a": {"maximum": 5}}}]}
        | obj({"a": INT}),
        [{"a": 4}],
        [{"a": 6}],
    )


@family
def conditionals() -> Iterator[Case]:
    yield (
        obj({"country": {"enum": ["US", "DE"]}, "zip": TEXT | {"maxLength": 6}})
        | {
            "if": {"properties": {"country": {"const": "US"}}},
            "then": {"properties": {"zip": {"pattern": r"^\d{5}$"}}},
            "else": {"properties": {"zip": {"pattern": r"^\d{4,5}$"}}},
        },
        [{"country": "US", "zip": "12345"}],
        [{"country": "US", "zip": "1234"}],
    )
    yield (
        obj({"a": BOOL, "b": BOOL}, "b")
        | {
            "if": {"properties": {"a": {"const": True}}},
            "then": {"required": ["b"]},
        },
        [{"a": False}, {"a": True, "b": True}],
        [{"a": True}],
    )
    yield (
        obj({"a": BOOL, "b": BOOL}, "a", "b")
        | {"if": {"required": ["a"]}, "else": {"required": ["b"]}},
        [
            {"a": True},
            {"b": True},
        ],
        [{}],
    )
    yield {"if": INT, "then": {"minimum": 5}, "else": {"maxLength": 3}}, [5, "abc"], [4, "abcd"]
    yield {"if": True, "then": INT}, [1], ["x"]
    yield {"then": INT}, [1, "x"], []
    yield INT | {"if": {"minimum": 10}, "then": {"multipleOf": 10}}, [3, 20], [15]
    yield (
        obj({"card": LINE, "cvc": LINE}, "card", "cvc", dependentRequired={"card": ["cvc"]}),
        [
            {},
            {"card": "1", "cvc": "2"},
        ],
        [{"card": "1"}],
    )
    yield (
        obj({"a": INT, "b": INT, "c": INT}, "a", "b", "c", dependentRequired={"a": ["b", "c"]}),
        [{"b": 1}],
        [{"a": 1, "b": 2}],
    )
    yield (
        {"$schema": "http://json-schema.org/draft-07/schema#"}
        | obj({"a": INT, "b": INT}, "a", "b", dependencies={"a": ["b"]}),
        [{"b": 1}],
        [{"a": 1}],
    )
    yield (
        {"$schema": "http://json-schema.org/draft-07/schema#"}
        | obj({"a": INT, "b": INT}, "a", "b", dependencies={"a": {"required": ["b"]}}),
        [{"b": 1}],
        [{"a": 1}],
    )
    yield (
        obj({"a": BOOL, "b": BOOL}, "a", "b", dependentSchemas={"a": {"required": ["b"]}}),
        [{"b": True}],
        [{"a": True}],
    )
    for status in ("shipped", "paid", "failed"):
        yield (
            obj({"status": {"enum": ["new", status]}, "code": INT | {"maximum": 99}}, "code")
            | {
                "allOf": [
                    {
                        "if": {"properties": {"status": {"const": status}}},
                        "then": {"required": ["code"]},
                    }
                ]
            },
            [{"status": "new"}, {"status": status, "code": 1}],
            [{"status": status}],
        )
    yield (
        arr(
            obj({"n": INT | {"maximum": 20}})
            | {
                "if": {"properties": {"n": {"minimum": 9}}},
                "then": {"properties": {"n": {"multipleOf": 2}}},
            },
            1,
            2,
        ),
        [[{"n": 3}]],
        [[{"n": 11}]],
    )


@family
def negations() -> Iterator[Case]:
    yield {"not": TEXT}, [1, None], ["x"]
    yield INT | {"not": {"const": 0}}, [1], [0]
    yield TEXT | {"not": {"enum": ["a", "b"]}, "maxLength": 4}, ["c"], ["a"]
    yield TEXT | {"not": {"pattern": "bad"}, "maxLength": 8}, ["good"], ["so bad"]
    yield INT | {"not": {"multipleOf": 2}, "minimum": 0, "maximum": 99}, [3], [4]
    yield (
        obj({"a": BOOL, "b": BOOL}, "a", "b") | {"not": {"required": ["a", "b"]}},
        [{"a": True}],
        [{"a": True, "b": True}],
    )
    yield obj({"a": {"not": NULL}}), [{"a": 1}], [{"a": None}]
    yield {"not": {"not": INT}}, [1], ["x"]
    yield {"type": ["string", "integer"], "not": {"minimum": 5}}, [4], ["x", 5]
    yield (
        obj({"a": INT}, "a") | {"not": {"properties": {"a": {"const": 1}}, "required": ["a"]}},
        [
            {},
            {"a": 2},
        ],
        [{"a": 1}],
    )
    yield {"not": {"type": ["object", "array"]}}, [1, "x"], [{}, []]


@family
def collections() -> Iterator[Case]:
    yield arr(INT, 0, 5, uniqueItems=True), [[1, 2]], [[1, 1]]
    yield arr({"enum": ["a", "b", "c"]}, 1, 3, uniqueItems=True), [["a", "b"]], [["a", "a"]]
    yield arr(BOOL, 2, 2, uniqueItems=True), [[True, False]], [[True, True]]
    yield (
        arr(obj({"k": INT | {"maximum": 9}}), 0, 3, uniqueItems=True),
        [[{"k": 1}]],
        [[{"k": 1}, {"k": 1}]],
    )
    yield arr(INT, 0, 4, uniqueItems=False), [[1, 1]], [["x"]]
    yield arr(INT | {"minimum": 0, "maximum": 9}, 0, 5, contains={"const": 7}), [[1, 7]], [[1]]
    yield arr(BOOL, 0, 5, contains={"const": True}, minContains=2), [[True, True]], [[True]]
    yield arr(BOOL, 0, 5, contains={"const": True}, maxContains=1), [[True]], [[True, True]]
    yield arr(BOOL, 0, 3, contains={"const": True}, minContains=0), [[False]], [[1]]
    yield (
        {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]{1,4}$"},
            "additionalProperties": BOOL,
            "maxProperties": 3,
        },
        [{"ab": True}],
        [{"AB": True}],
    )
    yield (
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": BOOL},
        [{"x": True}],
        [{"z": True}],
    )
    yield (
        {
            "type": "object",
            "propertyNames": {"maxLength": 3},
            "additionalProperties": INT,
            "maxProperties": 2,
        },
        [{"abc": 1}],
        [{"abcd": 1}],
    )
    yield (
        {
            "allOf": [obj({"a": INT}, closed=False)],
            "properties": {"b": BOOL},
            "unevaluatedProperties": False,
        },
        [{"a": 1, "b": True}],
        [{"a": 1, "c": 1}],
    )
    yield (
        {"type": "object", "properties": {"a": INT}, "unevaluatedProperties": False},
        [{"a": 1}],
        [{"b": 1}],
    )
    yield {"type": "array", "prefixItems": [INT], "unevaluatedItems": False}, [[1]], [[1, 2]]
    yield (
        {"type": "array", "prefixItems": [INT], "unevaluatedItems": BOOL, "maxItems": 3},
        [[1, True]],
        [[1, 2]],
    )
    yield obj({"a": TEXT | {"contentEncoding": "base64", "maxLength": 8}}), [{"a": "YQ=="}], [{}]
    yield (
        obj({"a": TEXT | {"contentMediaType": "application/json", "maxLength": 8}}),
        [{"a": "{}"}],
        [{}],
    )
    yield obj({"n": {"type": "integer", "nullable": True}}), [{"n": 1}], [{"n": "x"}]


MONEY = NUM | {"minimum": 0, "maximum": 100000}
DATE = TEXT | {"format": "date"}
WORDS = arr(LINE, 0, 4)
PERCENT = NUM | {"minimum": 0, "maximum": 1}


@family
def extraction() -> Iterator[Case]:
    """What people ask of documents: invoices, CVs, addresses, notes, findings."""
    address = obj({"street": LINE, "city": LINE, "postcode": TEXT | {"pattern": r"^\d{5}$"}})
    yield (
        obj({"address": address}),
        [{"address": {"street": "Elm 1", "city": "Ulm", "postcode": "12345"}}],
        [{"address": {"street": "Elm 1"}}],
    )
    line = obj({"text": LINE, "quantity": INT | {"minimum": 1, "maximum": 99}, "price": MONEY})
    yield (
        obj(
            {
                "number": TEXT | {"pattern": r"^INV-\d{4,6}$"},
                "date": DATE,
                "currency": {"enum": ["EUR", "USD", "CHF"]},
                "lines": arr(line, 1, 3),
                "total": MONEY,
            }
        ),
        [
            {
                "number": "INV-0001",
                "date": "2026-01-31",
                "currency": "EUR",
                "lines": [{"text": "Nails", "quantity": 2, "price": 1.5}],
                "total": 3,
            }
        ],
        [{"number": "INV-1"}],
    )
    job = obj(
        {
            "title": LINE,
            "from": INT | {"minimum": 1950, "maximum": 2030},
            "to": any_of(INT | {"minimum": 1950, "maximum": 2030}, NULL),
        }
    )
    yield (
        obj(
            {
                "name": LINE,
                "email": any_of(TEXT | {"format": "email"}, NULL),
                "skills": WORDS,
                "jobs": arr(job, 0, 3),
            }
        ),
        [
            {
                "name": "A",
                "email": None,
                "skills": ["x"],
                "jobs": [{"title": "t", "from": 2000, "to": None}],
            }
        ],
        [{"name": "A", "email": "no", "skills": [], "jobs": []}],
    )
    yield (
        obj(
            {
                "title": LINE,
                "authors": arr(LINE, 1, 3),
                "year": INT | {"minimum": 1900, "maximum": 2030},
                "doi": TEXT | {"pattern": r"^10\.\d{4}/[a-z0-9.]{1,12}$"},
            }
        ),
        [{"title": "T", "authors": ["A"], "year": 2020, "doi": "10.1234/abc.1"}],
        [{"title": "T", "authors": [], "year": 2020, "doi": "10.1234/abc"}],
    )
    yield (
        obj(
            {
                "diagnosis": TEXT | {"pattern": r"^[A-TV-Z]\d{2}(\.\d{1,2})?$"},
                "side": {"enum": ["left", "right", "both", None]},
                "certain": BOOL,
            }
        ),
        [{"diagnosis": "J45.9", "side": None, "certain": True}],
        [{"diagnosis": "U07", "side": "left", "certain": True}],
    )
    yield (
        obj(
            {
                "medication": LINE,
                "dose_mg": NUM | {"exclusiveMinimum": 0, "maximum": 5000},
                "times": arr(TEXT | {"pattern": r"^([01]\d|2[0-3]):[0-5]\d$"}, 1, 4),
                "atc": TEXT | {"pattern": r"^[A-Z]\d{2}[A-Z]{2}\d{2}$"},
            }
        ),
        [{"medication": "x", "dose_mg": 5, "times": ["08:00"], "atc": "N02BE01"}],
        [{"medication": "x", "dose_mg": 0, "times": ["08:00"], "atc": "N02BE01"}],
    )
    yield (
        obj(
            {
                "systolic": INT | {"minimum": 50, "maximum": 250},
                "diastolic": INT | {"minimum": 30, "maximum": 150},
                "pulse": INT | {"minimum": 20, "maximum": 250},
            }
        ),
        [{"systolic": 120, "diastolic": 80, "pulse": 60}],
        [{"systolic": 20, "diastolic": 80, "pulse": 60}],
    )
    yield (
        obj(
            {
                "entities": arr(
                    obj(
                        {
                            "text": LINE,
                            "label": {"enum": ["PER", "ORG", "LOC", "MISC"]},
                            "start": INT | {"minimum": 0, "maximum": 999},
                        }
                    ),
                    0,
                    4,
                )
            }
        ),
        [{"entities": [{"text": "x", "label": "PER", "start": 0}]}],
        [{"entities": [{"text": "x", "label": "DATE", "start": 0}]}],
    )
    yield (
        obj(
            {
                "subject": LINE,
                "relation": {"enum": ["owns", "knows", "works_for"]},
                "object": LINE,
                "confidence": PERCENT,
            }
        ),
        [{"subject": "a", "relation": "owns", "object": "b", "confidence": 0.5}],
        [{"subject": "a", "relation": "owns", "object": "b", "confidence": 1.5}],
    )
    yield (
        obj(
            {
                "recipe": LINE,
                "servings": INT | {"minimum": 1, "maximum": 12},
                "ingredients": arr(
                    obj(
                        {
                            "name": LINE,
                            "amount": NUM | {"minimum": 0, "maximum": 999},
                            "unit": {"enum": ["g", "ml", "piece"]},
                        }
                    ),
                    1,
                    4,
                ),
                "steps": arr(LINE, 1, 4),
            }
        ),
        [
            {
                "recipe": "r",
                "servings": 2,
                "ingredients": [{"name": "n", "amount": 1, "unit": "g"}],
                "steps": ["s"],
            }
        ],
        [{"recipe": "r", "servings": 0, "ingredients": [], "steps": []}],
    )
    yield (
        obj(
            {
                "flight": TEXT | {"pattern": "^[A-Z]{2}[0-9]{2,4}$"},
                "from": TEXT | {"pattern": "^[A-Z]{3}$"},
                "to": TEXT | {"pattern": "^[A-Z]{3}$"},
                "departs": TEXT | {"format": "date-time"},
            }
        ),
        [{"flight": "LH123", "from": "FRA", "to": "JFK", "departs": "2026-01-01T10:00:00Z"}],
        [{"flight": "LH123", "from": "fra", "to": "JFK", "departs": "2026-01-01T10:00:00Z"}],
    )
    yield (
        obj(
            {
                "iban": TEXT | {"pattern": r"^[A-Z]{2}\d{2}[A-Z0-9]{10,16}$"},
                "amount": NUM | {"multipleOf": 0.01, "minimum": 0.01, "maximum": 9999},
                "reference": LINE,
            }
        ),
        [{"iban": "DE0212030000000020", "amount": 12.5, "reference": "r"}],
        [{"iban": "DE", "amount": 1, "reference": "r"}],
    )
    yield (
        obj(
            {
                "plaintiff": LINE,
                "defendant": LINE,
                "court": LINE,
                "articles": arr(TEXT | {"pattern": r"^§ ?\d{1,3}[a-z]?$"}, 0, 3),
                "outcome": {"enum": ["granted", "denied", "settled"]},
            }
        ),
        [
            {
                "plaintiff": "a",
                "defendant": "b",
                "court": "c",
                "articles": ["§ 12a"],
                "outcome": "denied",
            }
        ],
        [
            {
                "plaintiff": "a",
                "defendant": "b",
                "court": "c",
                "articles": ["12"],
                "outcome": "denied",
            }
        ],
    )
    yield (
        obj(
            {
                "姓名": LINE,
                "年齢": INT | {"minimum": 0, "maximum": 120},
                "都道府県": {"enum": ["東京都", "大阪府", "北海道"]},
            }
        ),
        [{"姓名": "山田", "年齢": 30, "都道府県": "東京都"}],
        [{"姓名": "山田", "年齢": 30, "都道府県": "京都"}],
    )
    yield (
        obj({"имя": LINE, "город": {"enum": ["Москва", "Казань"]}, "дата": DATE}),
        [{"имя": "Анна", "город": "Казань", "дата": "2026-01-01"}],
        [{"имя": "Анна", "город": "Киев", "дата": "2026-01-01"}],
    )
    yield (
        obj({"الاسم": LINE, "العمر": INT | {"minimum": 0, "maximum": 120}}),
        [{"الاسم": "ل", "العمر": 5}],
        [{}],
    )
    for language in ("en", "de", "fr", "es"):
        yield (
            obj(
                {
                    f"title_{language}": LINE,
                    f"summary_{language}": TEXT | {"maxLength": 60},
                    "language": {"const": language},
                }
            ),
            [{f"title_{language}": "t", f"summary_{language}": "s", "language": language}],
            [{"language": "xx"}],
        )
    yield obj({"summary": TEXT, "keywords": arr(TEXT)}), [{"summary": "s", "keywords": ["k"]}], [{}]
    yield (
        obj({"question": TEXT, "answer": TEXT, "sources": arr(TEXT | {"format": "uri"})}),
        [{"question": "q", "answer": "a", "sources": []}],
        [{"question": "q"}],
    )
    yield (
        obj({"steps": arr(obj({"thought": TEXT, "output": TEXT})), "final_answer": TEXT}),
        [{"steps": [], "final_answer": "x"}],
        [{"steps": [{}], "final_answer": "x"}],
    )


@family
def labels() -> Iterator[Case]:
    """Classification, moderation, scores and rubrics."""
    yield (
        obj({"sentiment": {"enum": ["positive", "neutral", "negative"]}}),
        [{"sentiment": "neutral"}],
        [{"sentiment": "mixed"}],
    )
    yield (
        obj({"sentiment": {"enum": ["positive", "negative"]}, "score": PERCENT}),
        [{"sentiment": "positive", "score": 0.9}],
        [{"sentiment": "positive", "score": 2}],
    )
    harms = ("hate", "violence", "self_harm", "sexual", "spam")
    yield obj(dict.fromkeys(harms, BOOL)), [dict.fromkeys(harms, False)], [{"hate": True}]
    yield (
        obj(dict.fromkeys(harms, PERCENT)),
        [dict.fromkeys(harms, 0.5)],
        [dict.fromkeys(harms, 5)],
    )
    yield (
        obj(
            {
                "flagged": BOOL,
                "categories": arr({"enum": list(harms)}, 0, 3),
                "reason": TEXT | {"maxLength": 80},
            }
        ),
        [{"flagged": False, "categories": [], "reason": ""}],
        [{"flagged": False, "categories": ["x"], "reason": ""}],
    )
    yield (
        obj({"flagged": BOOL, "action": {"enum": ["allow", "hide", "ban"]}})
        | {
            "if": {"properties": {"flagged": {"const": False}}},
            "then": {"properties": {"action": {"const": "allow"}}},
        },
        [{"flagged": False, "action": "allow"}],
        [{"flagged": False, "action": "ban"}],
    )
    yield (
        obj({"stars": INT | {"minimum": 1, "maximum": 5}}),
        [{"stars": 5}],
        [{"stars": 0}, {"stars": 55}],
    )
    yield (
        obj(
            {
                "topic": {"enum": [f"topic-{n}" for n in range(40)]},
                "subtopic": any_of({"enum": [f"sub-{n}" for n in range(60)]}, NULL),
            }
        ),
        [{"topic": "topic-7", "subtopic": None}],
        [{"topic": "topic-77", "subtopic": None}],
    )
    criteria = ("accuracy", "clarity", "tone")
    rubric = {
        name: obj({"score": INT | {"minimum": 1, "maximum": 10}, "why": LINE}) for name in criteria
    }
    yield (
        obj(rubric),
        [{name: {"score": 5, "why": "x"} for name in criteria}],
        [{name: {"score": 11, "why": "x"} for name in criteria}],
    )
    yield (
        obj({"winner": {"enum": ["A", "B", "tie"]}, "margin": INT | {"minimum": 0, "maximum": 3}}),
        [{"winner": "tie", "margin": 0}],
        [{"winner": "C", "margin": 0}],
    )
    yield {"enum": ["SPAM", "HAM"]}, ["HAM"], ["spam"]
    yield arr({"enum": ["a", "b", "c"]}, 10, 10), [list("abcabcabca")], [list("abc")]
    yield obj({"label": INT | {"enum": [0, 1]}}), [{"label": 1}], [{"label": 2}]
    yield (
        obj({"probabilities": arr(PERCENT, 4, 4)}),
        [{"probabilities": [0, 0.5, 0.25, 1]}],
        [{"probabilities": [0.5]}],
    )
    yield (
        obj({"language": TEXT | {"pattern": "^[a-z]{2}(-[A-Z]{2})?$"}, "confidence": PERCENT}),
        [{"language": "de-CH", "confidence": 1}],
        [{"language": "german", "confidence": 1}],
    )
    yield (
        obj(
            {
                "is_question": BOOL,
                "urgency": {"enum": [1, 2, 3]},
                "team": {"enum": ["billing", "tech", None]},
            }
        ),
        [{"is_question": True, "urgency": 2, "team": None}],
        [{"is_question": True, "urgency": 4, "team": None}],
    )


@family
def calls() -> Iterator[Case]:
    """Arguments of functions, and calls of one out of several."""
    yield (
        obj({"location": LINE, "unit": {"enum": ["celsius", "fahrenheit"]}}, "unit"),
        [
            {"location": "Rome"},
            {"location": "Rome", "unit": "celsius"},
        ],
        [{"unit": "celsius"}],
    )
    tools: dict[str, Schema] = {
        "get_weather": obj({"city": LINE}),
        "send_mail": obj({"to": TEXT | {"format": "email"}, "body": TEXT | {"maxLength": 60}}),
        "add": obj(
            {"a": NUM | {"minimum": 0, "maximum": 999}, "b": NUM | {"minimum": 0, "maximum": 999}}
        ),
        "noop": obj({}),
    }
    calls = {
        name: obj({"name": {"const": name}, "arguments": arguments})
        for name, arguments in tools.items()
    }
    for name, schema in calls.items():
        yield schema, [], [{"name": "other", "arguments": {}}, {"name": name}]
    yield (
        any_of(*calls.values()),
        [{"name": "noop", "arguments": {}}],
        [{"name": "get_weather", "arguments": {}}],
    )
    yield (
        one_of(*calls.values()),
        [{"name": "add", "arguments": {"a": 1, "b": 2}}],
        [{"name": "add", "arguments": {"a": 1}}],
    )
    yield arr(any_of(*calls.values()), 1, 2), [[{"name": "noop", "arguments": {}}]], [[]]
    yield (
        obj(
            {
                "tool_calls": arr(
                    obj(
                        {
                            "id": TEXT | {"pattern": "^call_[a-z0-9]{6}$"},
                            "function": any_of(*calls.values()),
                        }
                    ),
                    1,
                    2,
                )
            }
        ),
        [{"tool_calls": [{"id": "call_abc123", "function": {"name": "noop", "arguments": {}}}]}],
        [{"tool_calls": []}],
    )
    yield (
        obj({"sql": TEXT | {"pattern": r"^SELECT [a-z_, ]{1,20} FROM [a-z_]{1,12}$"}}),
        [{"sql": "SELECT a, b FROM t"}],
        [{"sql": "DROP TABLE t"}],
    )
    yield (
        obj(
            {
                "filter": obj(
                    {
                        "field": {"enum": ["price", "date"]},
                        "op": {"enum": ["<", ">", "=", "<="]},
                        "value": {
                            "type": ["number", "string"],
                            "maxLength": 8,
                            "maximum": 999,
                            "minimum": 0,
                        },
                    }
                )
            }
        ),
        [{"filter": {"field": "price", "op": "<", "value": 5}}],
        [{"filter": {"field": "price", "op": "~", "value": 5}}],
    )
    condition = any_of(
        obj({"field": {"enum": ["a", "b"]}, "equals": INT | {"minimum": 0, "maximum": 9}}),
        obj({"and": arr(ref("c"), 1, 2)}),
        obj({"not": ref("c")}),
    )
    yield (
        {"$defs": {"c": condition}, **ref("c")},
        [{"and": [{"field": "a", "equals": 1}, {"not": {"field": "b", "equals": 2}}]}],
        [{"and": []}],
    )
    for count in (1, 3, 8):
        names = [f"arg{n}" for n in range(count)]
        yield obj({name: any_of(LINE, NULL) for name in names}), [dict.fromkeys(names)], [{}]


@family
def documents() -> Iterator[Case]:
    """Formats of the world: GeoJSON, OpenAPI, settings, logs, feeds."""
    position = {
        "type": "array",
        "prefixItems": [
            NUM | {"minimum": -180, "maximum": 180},
            NUM | {"minimum": -90, "maximum": 90},
        ],
        "items": False,
        "minItems": 2,
    }
    point = obj({"type": {"const": "Point"}, "coordinates": position})
    line = obj({"type": {"const": "LineString"}, "coordinates": arr(position, 2, 4)})
    polygon = obj({"type": {"const": "Polygon"}, "coordinates": arr(arr(position, 4, 5), 1, 1)})
    yield (
        point,
        [{"type": "Point", "coordinates": [1.5, 2]}],
        [{"type": "Point", "coordinates": [1]}],
    )
    yield (
        line,
        [{"type": "LineString", "coordinates": [[1, 2], [3, 4]]}],
        [{"type": "LineString", "coordinates": [[1, 2]]}],
    )
    yield (
        polygon,
        [{"type": "Polygon", "coordinates": [[[1, 2]] * 4]}],
        [{"type": "Polygon", "coordinates": [[[1, 2]] * 3]}],
    )
    yield one_of(point, line, polygon), [{"type": "Point", "coordinates": [1, 2]}], [{"type": "X"}]
    yield (
        obj(
            {
                "type": {"const": "Feature"},
                "geometry": any_of(point, NULL),
                "properties": obj({"name": LINE}),
            }
        ),
        [{"type": "Feature", "geometry": None, "properties": {"name": "x"}}],
        [{"type": "Feature"}],
    )
    yield (
        obj(
            {
                "type": {"const": "FeatureCollection"},
                "features": arr(obj({"type": {"const": "Feature"}, "geometry": point}), 0, 2),
            }
        ),
        [{"type": "FeatureCollection", "features": []}],
        [{"type": "FeatureCollection", "features": [1]}],
    )
    yield (
        obj(
            {
                "server": obj(
                    {
                        "host": TEXT | {"format": "hostname"},
                        "port": INT | {"minimum": 1, "maximum": 65535},
                        "tls": BOOL,
                    }
                ),
                "log": obj({"level": {"enum": ["debug", "info", "error"]}}),
            }
        ),
        [{"server": {"host": "a.b", "port": 80, "tls": True}, "log": {"level": "info"}}],
        [{"server": {"host": "a.b", "port": 0, "tls": True}, "log": {"level": "info"}}],
    )
    yield (
        obj(
            {
                "services": {
                    "type": "object",
                    "patternProperties": {
                        "^[a-z]{1,8}$": obj(
                            {
                                "image": LINE,
                                "ports": arr(TEXT | {"pattern": r"^\d{2,5}:\d{2,5}$"}, 0, 2),
                            }
                        )
                    },
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 2,
                }
            }
        ),
        [{"services": {"web": {"image": "x", "ports": ["80:80"]}}}],
        [{"services": {"Web": {"image": "x", "ports": []}}}],
    )
    yield (
        obj(
            {
                "openapi": {"const": "3.1.0"},
                "path": TEXT | {"pattern": "^/[a-z/]{0,12}$"},
                "method": {"enum": ["get", "post", "put"]},
                "responses": {
                    "type": "object",
                    "patternProperties": {"^[1-5]\\d{2}$": obj({"description": LINE})},
                    "additionalProperties": False,
                    "maxProperties": 3,
                },
            }
        ),
        [
            {
                "openapi": "3.1.0",
                "path": "/a",
                "method": "get",
                "responses": {"200": {"description": "ok"}},
            }
        ],
        [{"openapi": "3.0.0"}],
    )
    yield (
        obj(
            {
                "ts": TEXT | {"format": "date-time"},
                "level": {"enum": ["INFO", "WARN"]},
                "event": LINE,
                "ms": INT | {"minimum": 0, "maximum": 60000},
            }
        ),
        [{"ts": "2026-01-01T00:00:00Z", "level": "INFO", "event": "x", "ms": 1}],
        [{"ts": "yesterday", "level": "INFO", "event": "x", "ms": 1}],
    )
    events = [
        obj({"event": {"const": "login"}, "user": LINE, "ip": TEXT | {"format": "ipv4"}}),
        obj(
            {
                "event": {"const": "purchase"},
                "user": LINE,
                "cents": INT | {"minimum": 1, "maximum": 99999},
            }
        ),
        obj({"event": {"const": "logout"}, "user": LINE}),
    ]
    yield (
        obj({"events": arr(one_of(*events), 1, 3)}),
        [{"events": [{"event": "logout", "user": "a"}]}],
        [{"events": [{"event": "login", "user": "a"}]}],
    )
    yield (
        obj(
            {
                "jsonrpc": {"const": "2.0"},
                "id": any_of(INT | {"minimum": 0, "maximum": 999}, NULL),
                "method": TEXT | {"pattern": "^[a-z]{1,10}$"},
            }
        ),
        [{"jsonrpc": "2.0", "id": None, "method": "x"}],
        [{"jsonrpc": "1.0", "id": None, "method": "x"}],
    )
    yield (
        obj(
            {
                "op": {"enum": ["add", "remove"]},
                "path": TEXT | {"pattern": "^(/[a-z0-9]{1,6}){1,3}$"},
                "value": {"type": ["string", "boolean"], "maxLength": 9},
            },
            "value",
        ),
        [{"op": "remove", "path": "/a/0"}],
        [{"op": "remove", "path": "a"}],
    )
    yield (
        obj(
            {
                "cron": TEXT
                | {"pattern": r"^(\*|[0-5]?\d) (\*|1?\d|2[0-3]) (\*|[1-9]) (\*|[1-9]) (\*|[0-6])$"}
            }
        ),
        [{"cron": "0 12 * * 1"}],
        [{"cron": "hourly"}],
    )
    yield (
        obj({"palette": arr(TEXT | {"pattern": "^#[0-9a-f]{6}$"}, 2, 5), "dark": BOOL}),
        [{"palette": ["#000000", "#ffffff"], "dark": True}],
        [{"palette": ["#000"], "dark": True}],
    )
    yield (
        obj(
            {
                "a11y": obj({"role": {"enum": ["button", "link"]}, "label": LINE}),
                "children": arr({"$ref": "#"}, 0, 2),
            },
            "children",
        ),
        [{"a11y": {"role": "link", "label": "x"}}],
        [{"a11y": {}}],
    )
    yield (
        obj(
            {
                "week": obj(
                    {
                        day: arr(TEXT | {"pattern": r"^\d{2}:00$"}, 0, 1)
                        for day in ("mon", "tue", "wed")
                    }
                )
            }
        ),
        [{"week": {"mon": ["08:00"], "tue": [], "wed": []}}],
        [{"week": {"mon": []}}],
    )
    yield (
        obj(
            {"board": arr(arr({"enum": ["X", "O", ""]}, 3, 3), 3, 3), "turn": {"enum": ["X", "O"]}}
        ),
        [{"board": [["X", "O", ""]] * 3, "turn": "X"}],
        [{"board": [], "turn": "X"}],
    )
    yield (
        obj(
            {
                "html": one_of(
                    obj({"tag": {"const": "br"}}), obj({"tag": {"enum": ["b", "i"]}, "text": LINE})
                )
            }
        ),
        [{"html": {"tag": "br"}}],
        [{"html": {"tag": "b"}}],
    )
    yield (
        obj(
            {
                "bibtex": obj(
                    {
                        "key": TEXT | {"pattern": "^[a-z]+[0-9]{4}$", "maxLength": 12},
                        "year": INT | {"minimum": 1900, "maximum": 2100},
                    }
                )
            }
        ),
        [{"bibtex": {"key": "knuth1984", "year": 1984}}],
        [{"bibtex": {"key": "1984", "year": 1984}}],
    )


_NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def compose(seed: int, leaves: list[Case]) -> Case:
    """Return an object of a few fields that each come from another family."""
    rng = random.Random(seed)
    chosen = rng.sample(leaves, rng.randint(2, 5))
    names = rng.sample(_NAMES, 5)
    fields = dict(zip(names, chosen, strict=False))
    optional = [name for name in fields if rng.random() < 0.25]
    schema = obj({name: case[0] for name, case in fields.items()}, *optional)
    good = [{name: rng.choice(case[1]) for name, case in fields.items()} for _ in range(2)]
    broken = next(name for name in fields if fields[name][2])
    bad = [good[0] | {broken: rng.choice(fields[broken][2])}]
    wrapping = rng.randrange(4)
    if wrapping == 0:
        return arr(schema, 1, 2), [[value] for value in good], [[value] for value in bad]
    if wrapping == 1:
        return any_of(schema, NULL), [*good, None], bad
    if wrapping == 2:
        return (
            obj({"status": {"enum": ["ok", "no"]}, "data": schema}),
            [{"status": "ok", "data": value} for value in good],
            [{"status": "ok", "data": value} for value in bad],
        )
    return schema, good, bad


@family
def composed() -> Iterator[Case]:
    sources = (bounds, patterns, formats, values, arrays, unions, intersections, objects, labels)
    leaves = [
        case
        for source in sources
        for case in source()
        if isinstance(case[0], dict)
        and case[1]
        and case[2]
        and "#" not in json.dumps(case[0]).replace("^#", "")
        and len(json.dumps(case[0])) < 400
    ]
    for seed in range(90):
        yield compose(seed, leaves)


@family
def unsatisfiable() -> Iterator[Case]:
    yield False, [], [1]
    yield {"not": {}}, [], [1]
    yield INT | {"minimum": 5, "maximum": 3}, [], [4]
    yield NUM | {"exclusiveMinimum": 1, "exclusiveMaximum": 1}, [], [1]
    yield TEXT | {"minLength": 5, "maxLength": 3}, [], ["abcd"]
    yield arr(INT, 3, 1), [], [[1, 2]]
    yield {"enum": []}, [], [1]
    yield {"allOf": [INT, TEXT]}, [], [1]
    yield {"allOf": [{"const": 1}, {"const": 2}]}, [], [1]
    yield INT | {"enum": ["a", "b"]}, [], ["a"]
    yield INT | {"minimum": 11, "maximum": 19, "multipleOf": 10}, [], [15]
    yield obj({"a": False}), [], [{"a": 1}]
    yield obj({"a": INT | {"minimum": 2, "maximum": 1}}), [], [{"a": 1}]
    yield {"type": "object", "required": ["a"], "additionalProperties": False}, [], [{"a": 1}]
    yield {"type": "object", "minProperties": 2, "maxProperties": 1}, [], [{"a": 1}]
    yield {"anyOf": [INT | {"minimum": 2, "maximum": 1}, False]}, [], [1]
    yield TEXT | {"pattern": "^a$", "minLength": 5}, [], ["a"]
    yield obj({"next": {"$ref": "#"}}), [], [{"next": 1}]
    yield {"$ref": "#"}, [], []
    yield arr({"$ref": "#"}, 1), [], [[]]


@family
def invalid() -> Iterator[Case]:
    wrong: list[Schema] = [
        {"type": "strin"},
        {"type": ["integer", "date"]},
        {"type": 5},
        {"type": None},
        {"type": []},
        {"properties": []},
        {"properties": {"a": 5}},
        {"properties": {"a": {"type": "text"}}},
        {"required": "name"},
        {"required": [1]},
        {"required": ["a", "a"]},
        {"items": "string"},
        {"enum": "a"},
        {"minimum": "5"},
        {"maxLength": -1},
        {"minItems": 1.5},
        {"multipleOf": 0},
        {"multipleOf": -2},
        {"anyOf": []},
        {"anyOf": {}},
        {"allOf": [5]},
        {"oneOf": "x"},
        {"not": 5},
        {"pattern": "("},
        {"pattern": "["},
        {"pattern": 5},
        {"pattern": "a{2,1}"},
        {"pattern": "*a"},
        {"patternProperties": {"(": {}}},
        {"additionalProperties": "no"},
        {"uniqueItems": "yes"},
        {"$ref": 5},
        {"$ref": "#/$defs/missing"},
        {"$ref": "#nowhere"},
        {"$defs": {"a": {"type": "nothing"}}, "$ref": "#/$defs/a"},
        {"dependentRequired": {"a": "b"}},
        {"prefixItems": {}},
        {"if": 5},
        {"$schema": "http://example.com/no-such-draft"},
        {"propertyNames": []},
        {"format": 5},
        5,
        "string",
        [],
    ]
    for schema in wrong:
        yield schema, [], []


@family
def elsewhere() -> Iterator[Case]:
    for target in (
        "http://example.com/schema.json",
        "https://json.schemastore.org/package.json",
        "file:///etc/passwd",
        "other.json#/a",
        "//example.com/x",
        "urn:example:thing",
        "ftp://example.com/a",
        "/etc/passwd",
    ):
        yield {"$ref": target}, [], []
        yield obj({"a": arr({"$ref": target})}), [], []
    yield {"$dynamicRef": "http://example.com/x"}, [], []
    yield {"allOf": [{"$ref": "https://example.com/a"}, INT]}, [], []


@family
def unsupported() -> Iterator[Case]:
    """Patterns that go back or look around: they cannot be checked in linear time."""
    for pattern in (
        r"^(?=.*\d)(?=.*[a-z]).{4,8}$",
        r"^(?!bad)",
        r"(?<=a)b",
        r"(?<!a)b",
        r"^(a+)\1$",
        r"^(?P<x>a)(?P=x)$",
        r"^(?>a+)b$",
    ):
        yield TEXT | {"pattern": pattern}, [], []
    yield {"type": "object", "patternProperties": {"^(?!x)": INT}}, [], []


def chain(keyword: str, links: int) -> Schema:
    """Return a schema of a few kilobytes that is followed 2 ** links times."""
    made: dict[str, Schema] = {f"a{links}": INT}
    for number in range(links):
        following = ref(f"a{number + 1}")
        made[f"a{number}"] = {keyword: [following, following]}
    return {"$defs": made, **ref("a0")}


@family
def bombs() -> Iterator[Case]:
    """What no schema needs: each costs its own line a refusal, in bounded time and memory."""
    for keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
        yield chain(keyword, 40), [], []
    yield {"enum": [f"v{number}" for number in range(6000)]}, [], []
    deep: Schema = BOOL
    for _ in range(60):
        deep = arr(deep)
    yield deep, [], []
    yield obj({f"p{number}": {} for number in range(11_000)}), [], []
    yield TEXT | {"pattern": "a" * 3000}, [], []
    yield TEXT | {"pattern": "^(a{1000}){1000}$"}, [], []
    yield TEXT | {"pattern": r"^(\w{1,900}){900}$"}, [], []
    yield TEXT | {"pattern": "^((((a{9}){99}){99}){99}){99}$"}, [], []
    yield {"description": "x" * 300_000}, [], []


@family
def heavy() -> Iterator[Case]:
    """Large numbers, but honest: what they ask for can be had."""
    yield arr(BOOL, 0, 1_000_000), [[], [True] * 50], [[1]]
    yield TEXT | {"maxLength": 1_000_000}, ["a"], [1]
    yield TEXT | {"pattern": "^(a|a|a|a)*$"}, ["aaa"], ["b"]
    yield TEXT | {"pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "maxLength": 12}, ["aaBb"], ["aa"]
    yield TEXT | {"pattern": "^[a-z]{0,200}$"}, ["abc"], ["A"]
    yield any_of(*[{"const": f"constant-{number}"} for number in range(300)]), ["constant-7"], ["x"]
    yield (
        obj({f"f{n}": any_of(*[{"const": c} for c in "abcdef"]) for n in range(25)}),
        [{f"f{n}": "a" for n in range(25)}],
        [{}],
    )
    big = obj({f"s{n}": TEXT | {"minLength": 2, "maxLength": 5} for n in range(25)})
    yield big, [{f"s{n}": "abc" for n in range(25)}], [{f"s{n}": "a" for n in range(25)}]
    yield obj({"x": INT | {"minimum": -(10**18), "maximum": 10**18}}), [{"x": 10**17}], [{"x": "1"}]
    yield (
        {
            "$defs": {f"d{n}": obj({"v": ref(f"d{n + 1}")}) for n in range(9)} | {"d9": BOOL},
            **ref("d0"),
        },
        [],
        [True],
    )
    yield (
        obj({"a": arr(arr(arr(arr(INT | {"minimum": 0, "maximum": 9}, 2, 2), 2, 2), 2, 2), 1, 1)}),
        [{"a": [[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]]}],
        [{"a": []}],
    )


def entries() -> Iterator[dict[str, Any]]:
    """Yield every schema once, under a name of its own."""
    seen: set[str] = set()
    for name, make in FAMILIES.items():
        number = 0
        for schema, good, bad in make():
            spelled = json.dumps(schema, sort_keys=True)
            if spelled in seen:
                continue
            seen.add(spelled)
            number += 1
            yield {"id": f"{name}-{number:03}", "schema": schema, "good": good, "bad": bad}
