"""What llguidance's formats let through and no validator does, said in patterns that it keeps.

It knows days of the month but not leap years, has a leap second in every minute, and knows no
limits of a host name or the first part of an e-mail address, which a model that rambles exceeds.
"""

from collections.abc import Mapping
from typing import Any

_LEAP_YEARS = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = r"(?:\d{4}-(?:0[13-9]|1[0-2])-\d\d|\d{4}-02-(?:[01]\d|2[0-8])|" + _LEAP_YEARS + "-02-29)"
_TIME = r"\d\d:\d\d:[0-5]\d"
_LABELS = r"(?:[^.@]{1,63}\.)*[^.@]{1,63}$"

_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}",
    "date-time": f"^{_DATE}[Tt]{_TIME}",
    "hostname": f"^{_LABELS}",
    "email": f"^[^@]{{1,64}}@{_LABELS}",
}
_LENGTHS = {"hostname": 253, "email": 254}
"""Sources: RFC 3339 (dates), RFC 1123 (labels), RFC 5321 4.5.3.1 (the parts of an address)."""

_HOLD_SCHEMAS = frozenset(
    {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
)
_HOLD_ANYTHING = frozenset({"const", "default", "enum", "examples"})


def tightened(schema: Any) -> Any:  # noqa: ANN401 -- any JSON
    """Return a schema that says of its formats what the library does not know of them."""
    if isinstance(schema, list):
        return [tightened(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {keyword: _inside(keyword, value) for keyword, value in schema.items()}
    name = made.get("format")
    if not isinstance(name, str) or name not in _PATTERNS or not _is_text(made):
        return made
    if "pattern" in made:
        made["allOf"] = [*made.get("allOf", ()), {"pattern": _PATTERNS[name]}]
    else:
        made["pattern"] = _PATTERNS[name]
    if name in _LENGTHS:
        made["maxLength"] = min(made.get("maxLength", _LENGTHS[name]), _LENGTHS[name])
    return made


def _inside(keyword: str, value: Any) -> Any:  # noqa: ANN401
    if keyword in _HOLD_ANYTHING:
        return value
    if keyword in _HOLD_SCHEMAS and isinstance(value, dict):
        return {name: tightened(part) for name, part in value.items()}
    return tightened(value)


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Return whether strings fit the schema at all, and are not written out in it."""
    kinds = schema.get("type", "string")
    return "string" in kinds and not {"const", "enum"}.intersection(schema)
