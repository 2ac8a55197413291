"""The text of a JSON schema that a line holds, which stays raw when the line is decoded."""

from functools import lru_cache

import msgspec

from jobs.domain.errors import InvalidLine

_REMEMBERED_BYTES = 1 << 15
"""A schema of at most so many is looked at once, and then known by its text."""


def is_given(raw: msgspec.Raw) -> bool:
    """Return whether a field that stays raw is there, and not null."""
    return bytes(raw) not in {b"", b"null"}


def schema_text(raw: msgspec.Raw | str, param: str) -> str:
    """Return the JSON text of a schema given as an object, or as a string that holds one."""
    content = bytes(raw)  # type: ignore[arg-type]  # msgspec.Raw is bytes-like
    is_short = len(content) <= _REMEMBERED_BYTES
    text = _find_schema(content) if is_short else _find_schema.__wrapped__(content)
    if text is None:
        raise InvalidLine(
            "A JSON schema is an object (or true or false).",
            param=param,
            error_code="invalid_schema",
        )
    return text


# The lines of a file have few schemas among them.
@lru_cache(maxsize=64)
def _find_schema(content: bytes) -> str | None:
    try:
        text = content.decode()
    except UnicodeDecodeError:  # what stays raw has not been looked at before
        raise InvalidLine(
            "This line is not UTF-8; save the file as UTF-8.", error_code="invalid_utf8"
        ) from None
    try:
        schema = msgspec.json.decode(text)
        if isinstance(schema, str):
            text = schema
            schema = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return text if isinstance(schema, (dict, bool)) else None
