"""How much work a JSON schema can make for whoever checks an answer against it.

References make it: a schema of thirty definitions, each of which names the next one twice, is
followed a billion times, and one that names itself twice is followed so often for each level of
the answer. Nothing in the text's length or depth tells; following the references once does.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

MAX_LEVELS = 400
"""How deep a schema may go with its references followed; Python's own limit is not far above."""

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_HOLD_SCHEMAS = frozenset({"properties", "patternProperties", "dependentSchemas", "dependencies"})
_NEVER_FOLLOWED = frozenset({"$defs", "definitions", "const", "default", "enum", "examples"})
_ANCHORS = ("$anchor", "$dynamicAnchor", "$id", "id")
_COUNT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")
_MAX_PATTERN_STATES = 1 << 16
_MAX_STEPS = 10_000


class TooDeep(Exception):
    """The schema goes deeper than `MAX_LEVELS` when its references are followed."""


class Extent(NamedTuple):
    """What following every reference of a schema once comes to.

    Attributes:
        num_parts: subschemas, counted as often as they are named.
        num_returns: how often they name one that is being followed already.
        num_levels: how deep they go.
        num_patterns: regular expressions.
        num_states: of all of these, about.
    """

    num_parts: int = 0
    num_returns: int = 0
    num_levels: int = 0
    num_patterns: int = 0
    num_states: int = 0

    def beside(self, other: "Extent") -> "Extent":
        """Return the extent of both."""
        return Extent(
            self.num_parts + other.num_parts,
            self.num_returns + other.num_returns,
            max(self.num_levels, other.num_levels),
            self.num_patterns + other.num_patterns,
            self.num_states + other.num_states,
        )


def measure(schema: object) -> Extent:
    """Return how far a schema extends; takes time for each of its parts once.

    Raises:
        TooDeep: it goes too deep.
    """
    if not isinstance(schema, dict):  # true and false are schemas
        return Extent(num_parts=1)
    return _Measuring(schema).follow(schema, 1)


def is_endless(schema: object) -> bool:
    """Return whether every value of a schema would have to hold another one without end.

    Follows `$ref` through required properties and least items; False where that is not sure.
    """
    return isinstance(schema, dict) and not _Ending(schema).ends(schema)


def count_states(pattern: str) -> int:
    """Return about how many states a regular expression has, its repetitions written out."""
    states = len(pattern)
    for least, most in _COUNT.findall(pattern):
        states *= max(1, int(most or least))
        if states >= _MAX_PATTERN_STATES:
            return _MAX_PATTERN_STATES
    return states


class _Measuring:
    def __init__(self, root: dict[str, Any]) -> None:
        self._known: dict[int, Extent] = {}
        self._followed: set[int] = set()
        self._named: dict[str, list[dict[str, Any]]] = {}
        # A pointer begins at the resource that it stands in. With one resource that is the root;
        # with several, each of them is taken to be meant.
        self._resources = [root]
        for node in _objects(root):
            for keyword in _ANCHORS:
                name = node.get(keyword)
                if isinstance(name, str):
                    self._named.setdefault(name.removeprefix("#"), []).append(node)
                    if keyword in {"$id", "id"} and node is not root:
                        self._resources.append(node)

    def follow(self, schema: dict[str, Any], level: int) -> Extent:
        """Return the extent of a subschema `level` levels below the root.

        Raises:
            TooDeep: it is too many levels.
        """
        key = id(schema)
        known = self._known.get(key)
        if known is not None:
            if level + known.num_levels > MAX_LEVELS:
                raise TooDeep
            return known
        if level > MAX_LEVELS:
            raise TooDeep
        self._followed.add(key)
        patterns = _patterns(schema)
        found = Extent(
            num_parts=1, num_patterns=len(patterns), num_states=sum(map(count_states, patterns))
        )
        for part in _subschemas(schema):
            found = found.beside(self.follow(part, level + 1))
        for keyword in _REFERENCES:
            target = schema.get(keyword)
            if isinstance(target, str):
                found = found.beside(self._refer(target, level + 1))
        self._followed.remove(key)
        found = found._replace(num_levels=found.num_levels + 1)
        self._known[key] = found
        return found

    def _refer(self, target: str, level: int) -> Extent:
        found = Extent()
        for node in self.resolve(target.partition("#")[2]):
            found = found.beside(
                Extent(num_returns=1) if id(node) in self._followed else self.follow(node, level)
            )
        return found

    def resolve(self, fragment: str) -> list[dict[str, Any]]:
        """Return the subschemas that the fragment of a reference may mean."""
        if fragment and not fragment.startswith("/"):
            return self._named.get(fragment, [])
        parts = [
            unquote(part).replace("~1", "/").replace("~0", "~") for part in fragment.split("/")[1:]
        ]
        return [node for root in self._resources if (node := _at(root, parts)) is not None]


class _Ending:
    def __init__(self, root: dict[str, Any]) -> None:
        self._names = _Measuring(root)
        self._ending: set[int] = set()
        self._open: set[int] = set()
        self._num_steps = 0

    def ends(self, schema: object) -> bool:
        """Return whether a value may fit that holds none of what is being looked at."""
        if not isinstance(schema, dict) or id(schema) in self._ending:
            return True
        self._num_steps += 1
        if self._num_steps > _MAX_STEPS:
            return True
        if id(schema) in self._open:
            return False
        self._open.add(id(schema))
        found = self._has_end(schema)
        self._open.remove(id(schema))
        if found:
            self._ending.add(id(schema))
        return found

    def _has_end(self, schema: dict[str, Any]) -> bool:
        target = schema.get("$ref")
        if isinstance(target, str):
            named = self._names.resolve(target.partition("#")[2])
            if named and not any(map(self.ends, named)):
                return False
        if not all(map(self.ends, _listed(schema, "allOf"))):
            return False
        for keyword in ("anyOf", "oneOf"):
            if (choices := _listed(schema, keyword)) and not any(map(self.ends, choices)):
                return False
        if schema.get("type") == "object":
            parts = schema.get("properties")
            if isinstance(parts, dict):
                return all(self.ends(parts.get(name)) for name in _listed(schema, "required"))
        elif schema.get("type") == "array":
            least = schema.get("minItems", 0)
            if isinstance(least, int) and least > 0:
                first = _listed(schema, "prefixItems")[:least]
                rest = [schema.get("items")] if least > len(first) else []
                return all(map(self.ends, (*first, *rest)))
        return True


def _listed(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _at(node: Any, parts: list[str]) -> dict[str, Any] | None:  # noqa: ANN401 -- any JSON
    for part in parts:
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node if isinstance(node, dict) else None


def _objects(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _subschemas(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is checked with a schema; an unknown keyword's value may be a schema."""
    for keyword, value in schema.items():
        if keyword in _HOLD_SCHEMAS and isinstance(value, dict):
            yield from (part for part in value.values() if isinstance(part, dict))
        elif keyword in _NEVER_FOLLOWED:
            continue
        elif isinstance(value, dict):
            yield value
        elif isinstance(value, list):
            yield from (part for part in value if isinstance(part, dict))


def _patterns(schema: Mapping[str, Any]) -> list[str]:
    pattern, named = schema.get("pattern"), schema.get("patternProperties")
    found = [pattern, *(named if isinstance(named, dict) else ())]
    return [one for one in found if isinstance(one, str)]
