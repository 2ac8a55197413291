"""What families of schemas are made of."""

from typing import Any

Schema = Any
Case = tuple[Schema, list[Any], list[Any]]
"""A schema, answers that keep it, answers that break it."""

TEXT = {"type": "string"}
INT = {"type": "integer"}
NUM = {"type": "number"}
BOOL = {"type": "boolean"}
NULL = {"type": "null"}
LINE = {"type": "string", "maxLength": 24}
"""A string that a toy model ends."""


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
