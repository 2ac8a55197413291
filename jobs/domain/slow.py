"""What is wrong with a line that the typed decoder refused, if anything is.

The slow path: it reads such a line a second time, since what it asks for may change nothing
(`"tools": null`).
"""

import re
from typing import Any

import msgspec

from jobs.domain.errors import InvalidLine
from jobs.domain.nesting import MAX_NESTING, is_nested_deeper

_MAX_QUOTED_CHARS = 64
"""Of what a line says, in a message about it."""

# Values that ask for nothing, of fields that are not obeyed (yet); None always asks for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "stream": (False,),
    "logprobs": (False,),
    "length_penalty": (1,),
    "stop": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "chat_template_kwargs": ({},),
}
# Fields that change no answer, whatever their value.
_IGNORED = frozenset(
    {
        "user",
        "safety_identifier",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "stream_options",
        "guided_decoding_backend",
        "priority",
        "request_id",
    }
)
_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_QUOTED = re.compile(r"'(.*)'", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


def parse_slowly(line: bytes, *, endpoint: str, body_type: type[msgspec.Struct]) -> tuple[str, Any]:
    """Return custom_id and body of a line whose only fault is fields that ask for nothing.

    Raises:
        InvalidLine: there is a real fault; it says which.
    """
    value = _parse_json(line)
    if not isinstance(value, dict):
        raise InvalidLine("This line is not a JSON object.", error_code="invalid_json_line")
    for name in ("custom_id", "method", "url", "body"):
        if value.get(name) is None:
            raise InvalidLine(
                f"Missing required parameter: '{name}'.",
                param=name,
                error_code="missing_required_parameter",
            )
    custom_id, body = value["custom_id"], value["body"]
    if not isinstance(custom_id, str):
        raise InvalidLine(
            "custom_id must be a string.", param="custom_id", error_code="invalid_type"
        )
    if value["method"] != "POST":
        raise InvalidLine(
            "The method of a batch line is POST.", param="method", error_code="invalid_method"
        )
    if value["url"] != endpoint:
        raise InvalidLine(
            f"The url of this line is not the batch's endpoint {endpoint}; use the endpoint "
            '"mixed" to run lines of several kinds.',
            param="url",
            error_code="invalid_url",
        )
    if not isinstance(body, dict):
        raise InvalidLine("body must be an object.", param="body", error_code="invalid_type")
    if body.get("stream") is True:
        raise InvalidLine(
            "Streaming is not supported in a batch; leave `stream` out.",
            param="body.stream",
            error_code="streaming_unsupported",
        )
    known = body_type.__struct_fields__
    kept = {
        name: part
        for name, part in body.items()
        if name not in _IGNORED
        and not (part is None and name in (*known, *_NEUTRAL))
        and not (name in _NEUTRAL and any(_same(part, neutral) for neutral in _NEUTRAL[name]))
        and not (name not in known and part is None)
    }
    try:
        # Through bytes once more: a schema is kept raw.
        return custom_id, msgspec.json.decode(msgspec.json.encode(kept), type=body_type)
    except msgspec.ValidationError as error:
        raise explain(error) from None


def _same(part: object, neutral: object) -> bool:
    return part == neutral and isinstance(part, bool) == isinstance(neutral, bool)


def _parse_json(line: bytes) -> object:
    if is_nested_deeper(line):
        raise InvalidLine(
            f"This line is nested more than {MAX_NESTING} levels deep.",
            error_code="nesting_too_deep",
        )
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidLine(
            f"This line is not UTF-8 (byte {error.start}); save the file as UTF-8.",
            error_code="invalid_utf8",
        ) from None
    try:
        return msgspec.json.decode(line)
    except msgspec.MsgspecError as error:
        detail = str(error).removeprefix("JSON is malformed: ")
        raise InvalidLine(
            f"This line is not parseable as valid JSON: {detail}.", error_code="invalid_json_line"
        ) from None


def quoted(text: str) -> str:
    """Return what a message may show of a word that a caller wrote: little, and nothing odd."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text[:_MAX_QUOTED_CHARS])
    return f"{shown}..." if len(text) > _MAX_QUOTED_CHARS else shown


def explain(error: msgspec.ValidationError, *, at: str = "body") -> InvalidLine:
    """Return what a decoder found wrong with the part of a line that is called `at`."""
    match = _AT.match(str(error))
    what, path = (match["what"], match["path"] or "") if match else (str(error), "")
    param = f"{at}{path}"
    if unknown := _UNKNOWN.match(what):
        name = quoted(unknown["name"])
        return InvalidLine(
            f"Unsupported parameter: '{name}'.",
            param=f"{param}.{name}",
            error_code="unsupported_parameter",
        )
    if missing := _MISSING.match(what):
        name = missing["name"]
        return InvalidLine(
            f"Missing required parameter: '{name}'.",
            param=f"{param}.{name}",
            error_code="missing_required_parameter",
        )
    what = _QUOTED.sub(lambda found: f"'{quoted(found[1])}'", what)
    wrong_type = re.fullmatch(r"Expected `[^`]*`, got `[^`]*`", what) is not None
    return InvalidLine(
        f"{what}.", param=param, error_code="invalid_type" if wrong_type else "invalid_value"
    )
