"""Families that combine schemas: references, unions, conditions, collections."""

from collections.abc import Iterator

from tests.corpus.making import (
    BOOL,
    INT,
    LINE,
    NULL,
    NUM,
    TEXT,
    Case,
    any_of,
    arr,
    obj,
    one_of,
    ref,
)


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
