"""What planning has to refuse, or to bear: no schemas, unsatisfiable, elsewhere, bombs."""

from collections.abc import Iterator

from tests.corpus.making import BOOL, INT, NUM, TEXT, Case, Schema, any_of, arr, obj, ref


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
