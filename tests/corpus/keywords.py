"""Families of one keyword each: types, bounds, patterns, formats, objects, lists."""

from collections.abc import Iterator
from typing import Any

from tests.corpus.making import (
    BOOL,
    INT,
    LINE,
    NULL,
    NUM,
    TEXT,
    Case,
    Schema,
    any_of,
    arr,
    obj,
)
from tests.schemas import make_schema


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
