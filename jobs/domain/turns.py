"""The turns of a line's conversation: what each says and shows, and whether they fit together."""

from collections.abc import Sequence

from jobs.domain.errors import InvalidLine
from jobs.domain.images import Image, read_image
from jobs.domain.wire import TextPart, WireMessage


def content_of(message: WireMessage, messages: list[WireMessage]) -> str:
    """Return what a turn says, as one text.

    Raises:
        InvalidLine: it says nothing.
    """
    content = message.content
    if isinstance(content, str):
        return content
    if content is not None:
        return "\n".join([part.text for part in content if isinstance(part, TextPart)])
    if message.tool_calls:
        return ""
    raise InvalidLine(
        "Missing required parameter: 'content'.",
        param=f"body.messages[{messages.index(message)}].content",
        error_code="missing_required_parameter",
    )


def parts_of(message: WireMessage, messages: list[WireMessage]) -> tuple[str | Image, ...]:
    """Return what a turn says and shows, in its order; nothing where it shows no image.

    Raises:
        InvalidLine: an image is none, or of a turn that cannot show any.
    """
    content = message.content
    if not isinstance(content, list) or all(isinstance(part, TextPart) for part in content):
        return ()
    if message.role != "user":
        where = messages.index(message)
        raise _wrong_turn("Only a user's message shows images.", where, "content")
    parts: list[str | Image] = []
    for part in content:
        if isinstance(part, TextPart):
            parts.append(part.text)
            continue
        try:
            parts.append(read_image(part))
        except InvalidLine as error:
            where, number = messages.index(message), len(parts)
            error.param = f"body.messages[{where}].content[{number}].{error.param}"
            raise
    return tuple(parts)


def flatten(message: WireMessage, messages: list[WireMessage], images: list[Image]) -> str:
    """Return what a turn says, which becomes its content unless it shows images too.

    Args:
        images: where those are put.

    Raises:
        InvalidLine: it says nothing, or cannot show what it does.
    """
    text = content_of(message, messages)
    parts = parts_of(message, messages)
    if parts:
        images += [part for part in parts if isinstance(part, Image)]
    else:
        message.content = text
    return text


def check_turns(messages: Sequence[WireMessage]) -> None:
    """Hold turns against each other: who calls tools, and which calls tools answer.

    Raises:
        InvalidLine: a turn holds what turns of its role do not, or answers no call.
    """
    called: set[str] = set()
    for number, message in enumerate(messages):
        if message.tool_calls:
            if message.role != "assistant":
                raise _wrong_turn(
                    "Only an assistant's message has tool_calls.", number, "tool_calls"
                )
            called.update(call.id for call in message.tool_calls)
        if message.role == "tool":
            if message.tool_call_id not in called:
                raise _wrong_turn(
                    "A tool's message answers a call of an assistant's message before it; this "
                    "tool_call_id names none.",
                    number,
                    "tool_call_id",
                )
        elif message.tool_call_id:
            raise _wrong_turn("Only a tool's message has a tool_call_id.", number, "tool_call_id")


def _wrong_turn(what: str, number: int, name: str) -> InvalidLine:
    return InvalidLine(what, param=f"body.messages[{number}].{name}", error_code="invalid_messages")
