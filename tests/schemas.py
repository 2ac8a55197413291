"""Random JSON schemas that a grammar can enforce, of mixed difficulty; seeded."""

import random
from typing import Any

Schema = dict[str, Any]

_WORDS = tuple(
    word
    for line in (
        "name age city job total price count color status kind label score date email items notes",
        "first last street country code level active owner title amount unit width height ratio",
    )
    for word in line.split(" ")
)
_VALUES = (
    "red",
    "green",
    "blue",
    "low",
    "medium",
    "high",
    "open",
    "closed",
    "new",
    "used",
    "maybe",
)


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(_WORDS, count)


def _string(rng: random.Random) -> Schema:
    kind = rng.randrange(6)
    if kind == 0:
        return {"type": "string", "minLength": 1, "maxLength": rng.randint(3, 12)}
    if kind == 1:
        return {"type": "string", "pattern": rng.choice([r"^[A-Z]{2}-\d{3}$", r"^[a-z]{3,8}$"])}
    if kind == 2:
        return {"type": "string", "format": rng.choice(["date", "uuid", "time"])}
    if kind == 3:
        return {"const": rng.choice(_VALUES)}
    return {"enum": rng.sample(_VALUES, rng.randint(2, 6))}


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(1, 500)}
    if kind == 1:
        return {"type": "integer", "exclusiveMinimum": 0, "maximum": 100, "multipleOf": 5}
    if kind == 2:
        return {"type": "number", "minimum": low, "maximum": low + 100}
    return {"enum": rng.sample(range(100), 3)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = _words(rng, rng.randint(1, 5))
    required = [name for name in names if rng.random() < 0.8]
    return {
        "type": "object",
        "properties": {name: make_node(rng, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.2:
        parts = [make_node(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {
            "type": "array",
            "prefixItems": parts,
            "items": False,
            "minItems": len(parts),
            "maxItems": len(parts),
        }
    return {
        "type": "array",
        "items": make_node(rng, depth - 1),
        "minItems": rng.randint(0, 2),
        "maxItems": rng.randint(2, 4),
    }


def make_node(rng: random.Random, depth: int) -> Schema:
    """Return a schema nested at most `depth` deep."""
    kind = rng.randrange(10)
    if depth <= 0 or kind < 4:
        return rng.choice([_string, _number])(rng)
    if kind == 4:
        return {"type": "boolean"}
    if kind == 5:
        return {"anyOf": [_number(rng), {"type": "null"}]}
    if kind == 6:
        return {"type": ["boolean", "null"]}
    return _object(rng, depth) if kind < 9 else _array(rng, depth)


def make_schema(seed: int) -> Schema:
    """Return schema number `seed`; an object, and unlike every other by its title."""
    rng = random.Random(seed)
    schema = _object(rng, rng.choice([1, 1, 2, 2, 3]))
    schema["title"] = f"Answer{seed}"
    if rng.random() < 0.1:
        schema["$defs"] = {"point": _object(rng, 1)}
        schema["properties"]["point"] = {"$ref": "#/$defs/point"}
        schema["required"].append("point")
    return schema
