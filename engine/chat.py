"""Messages and a model's own chat template to prompt tokens, which content can never forge.

A special token that appears in what somebody wrote is text like any other. The template's own
special tokens are counted on a rendering with harmless contents; a prompt with any other number
of them is encoded again with each forged one cut in two, and refused if that does not help.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jinja2
import msgspec
import xxhash

from engine.tools import takes_tools
from jobs.domain.errors import InvalidLine
from jobs.domain.images import Image
from jobs.domain.request import Message, Request
from jobs.domain.tools import ToolCall, Tools

_LOOKS_LIKE_CONTROL = re.compile(r"[<\[\uff5c|].*[>\]\uff5c|]", re.DOTALL)
_MAX_REMEMBERED_SHAPES = 4096


_Shape = tuple[bytes, tuple[tuple[str, bool, bool, int, tuple[bool | None, ...]], ...]]
"""What decides how many special tokens a template writes: the tools, and of each turn its role,
whether it says anything, whether it has a name, how many calls it makes, and of a turn that shows
images, which of its parts are images (None) or say anything."""


class TextCodec(Protocol):
    """Text to token ids and back, as `tokenizers.Tokenizer` has it."""

    def no_truncation(self) -> None:
        """Cut nothing off."""

    def no_padding(self) -> None:
        """Add nothing to fill up."""

    def encode_batch_fast(self, input: Any, *, add_special_tokens: bool = True) -> Any:  # noqa: A002, ANN401
        """Return for each text what has its tokens as `ids`; those it spells are read as such."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""


class ChatTokenizer(Protocol):
    """What a prompt is made with, as transformers' fast tokenizers have it."""

    @property
    def backend_tokenizer(self) -> TextCodec:
        """What encodes and decodes."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens beside the vocabulary of texts: their `content`, and whether `special`."""

    @property
    def chat_template(self) -> Any:  # noqa: ANN401
        """The model's own template; nothing where there is none."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:  # noqa: ANN401
        """Render messages with the template, in jinja's immutable sandbox."""


class PromptEncoder:
    """Turns requests into token ids, for one tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer, *, vocab_size: int) -> None:
        """Take the tokenizer; `vocab_size` bounds prompts that are given as token ids."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocab_size = vocab_size
        control = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            # Added tokens that are not special can steer too (<think>, <tool_call>); those that
            # spell blanks or words cannot.
            if token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content)
        }
        self._control_ids = frozenset(control.values())
        longest_first = sorted((c for c in control if c), key=len, reverse=True)
        self._control = (
            re.compile("|".join(re.escape(content) for content in longest_first))
            if longest_first
            else None
        )
        self._num_control: dict[_Shape, int] = {}
        template = tokenizer.chat_template
        self.has_template = bool(template)
        self._takes_tools = takes_tools(str(template))
        self._knows_developer = self._wants_parts = False
        self._wants_parts = self.has_template and self._wants_text_in_parts()
        self._knows_developer = self.has_template and self._renders_developer(str(template))

    def encode(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt.

        Raises:
            InvalidLine: there is no chat template, it refuses these messages, or a token id is
                out of range.
        """
        if request.messages is not None:
            return self._encode_chat(request.messages, request.tools)
        prompt = request.prompt
        if prompt is None:
            raise InvalidLine("The request has no prompt.", error_code="invalid_value")
        if isinstance(prompt, str):
            ids = self._tokenize(prompt, add_special_tokens=True)
        else:
            ids = list(prompt)
            if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise InvalidLine(
                    f"A token id of the prompt is not in the vocabulary of {self._vocab_size}.",
                    param="body.prompt",
                    error_code="invalid_value",
                )
        if not ids:
            raise InvalidLine(
                "The prompt is empty.", param="body.prompt", error_code="invalid_value"
            )
        return ids

    def _encode_chat(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        if not self.has_template:
            raise InvalidLine(
                "This model has no chat template; use /v1/completions.",
                param="body.messages",
                error_code="unsupported_parameter",
            )
        offered: Any = self._read_tools(tools)
        ids = self._encode_text(self._render(messages, offered))
        shape = (
            xxhash.xxh3_128_digest(tools.spec.encode()) if tools is not None else b"",
            tuple(
                (
                    m.role,
                    bool(m.content.strip()),
                    m.name is not None,
                    len(m.tool_calls),
                    tuple([bool(p.strip()) if isinstance(p, str) else None for p in m.parts])
                    if m.parts
                    else (),
                )
                for m in messages
            ),
        )
        expected = self._num_control.get(shape)
        if expected is None:
            harmless = [_harmless(message) for message in messages]
            expected = self._count_control(self._encode_text(self._render(harmless, offered)))
            if len(self._num_control) >= _MAX_REMEMBERED_SHAPES:
                self._num_control.clear()
            self._num_control[shape] = expected
        if self._count_control(ids) == expected:
            return ids
        ids = self._encode_forged(messages, offered)
        if self._count_control(ids) != expected:
            raise InvalidLine(
                "The chat template cannot tell these messages from its own control tokens.",
                param="body.messages",
                error_code="invalid_messages",
            )
        return ids

    def _read_tools(self, tools: Tools | None) -> list[dict[str, Any]] | None:
        """Return the tools as a template takes them.

        Raises:
            InvalidLine: the model would not see them, or they spell its control tokens.
        """
        if tools is None:
            return None
        if not self._takes_tools:
            raise InvalidLine(
                "This model's chat template shows no tools, so it cannot call any.",
                param="body.tools",
                error_code="unsupported_parameter",
            )
        if self._control is not None and self._control.search(tools.spec):
            raise InvalidLine(
                "A tool's definition spells one of the model's control tokens.",
                param="body.tools",
                error_code="invalid_value",
            )
        return msgspec.json.decode(tools.spec, type=list[dict[str, Any]])

    def _encode_forged(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> list[int]:
        """Encode with every control token that somebody wrote cut after its first character.

        The cut is marked before rendering, so that the template still does to the contents what
        it does to all, and what it adds itself stays whole.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        marked = [
            Message(
                m.role,
                self._mark(m.content, mark),
                m.name and self._mark(m.name, mark),
                tuple(
                    ToolCall(
                        self._mark(call.name, mark),
                        self._mark(call.arguments, mark),
                        self._mark(call.id, mark),
                    )
                    for call in m.tool_calls
                ),
                m.tool_call_id and self._mark(m.tool_call_id, mark),
                tuple(self._mark(p, mark) if isinstance(p, str) else p for p in m.parts),
            )
            for m in messages
        ]
        pieces = self._render(marked, tools).split(mark)
        ids = [token for piece in pieces if piece for token in self._encode_text(piece)]
        whole = "".join(pieces)
        if self._decode(ids) != self._decode(self._encode_text(whole)):
            # A tokenizer that treats the start of a text in its own way would slip in a blank:
            # an invisible space breaks the control token just as well.
            ids = self._encode_text("\u200b".join(pieces))
        return ids

    def _mark(self, text: str, mark: str) -> str:
        if self._control is None:
            return text
        return self._control.sub(lambda found: found[0][0] + mark + found[0][1:], text)

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenize(text, add_special_tokens=False)

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `encode` keeps Python's lock to its end, 1.8 s for 1.5 million tokens; the same tokens
        # come of this one without it, in a fifth less time.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def _count_control(self, ids: list[int]) -> int:
        control = self._control_ids
        return sum(token in control for token in ids)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Any = None,  # noqa: ANN401 -- transformers takes functions as well
    ) -> str:
        turns: list[dict[str, Any]] = []
        for message in messages:
            role = message.role
            if role == "developer" and not self._knows_developer:
                role = "system"
            turn: dict[str, Any] = {"role": role, "content": message.content}
            if message.parts or self._wants_parts:
                turn["content"] = [_part(one) for one in message.parts or (message.content,)]
            if message.name is not None:
                turn["name"] = message.name
            if message.tool_calls:
                turn["tool_calls"] = [_written(call) for call in message.tool_calls]
            if message.tool_call_id is not None:
                turn["tool_call_id"] = message.tool_call_id
            turns.append(turn)
        try:
            # transformers renders in jinja's immutable sandbox; the template is the model's own.
            rendered = self._tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            reason = str(error) if type(error) is jinja2.TemplateError else "it does not render"
            raise InvalidLine(
                f"The model's chat template refuses these messages: {reason[:200]}.",
                param="body.messages",
                error_code="invalid_messages",
            ) from None
        except Exception as error:  # noqa: BLE001 -- a template may fail in any way
            raise InvalidLine(
                f"The model's chat template fails on these messages ({type(error).__name__}).",
                param="body.messages",
                error_code="invalid_messages",
            ) from None
        return str(rendered)

    def _wants_text_in_parts(self) -> bool:
        """Return whether the template shows a text only where it is a part of a message.

        Those of some vision models leave out any other, without a word.
        """
        shows: list[bool] = []
        for parts in ((), ("probe",)):
            try:
                shows.append("probe" in self._render([Message("user", "probe", parts=parts)]))
            except InvalidLine:
                shows.append(False)
        return shows == [False, True]

    def _renders_developer(self, template: str) -> bool:
        """Return whether the template knows the role: names it, and renders what it says."""
        if "developer" not in template:
            return False
        self._knows_developer = True
        try:
            rendered = self._render([Message("developer", "probe"), Message("user", "x")])
        except InvalidLine:
            return False
        return "probe" in rendered


def _harmless(message: Message) -> Message:
    """Return a turn of the same shape that spells no control token."""
    return Message(
        message.role,
        "x" if message.content.strip() else message.content,
        "x" if message.name else None,
        tuple(ToolCall("x", "{}", "x") for _ in message.tool_calls),
        "x" if message.tool_call_id else None,
        tuple("x" if isinstance(p, str) and p.strip() else p for p in message.parts),
    )


def _part(part: str | Image) -> dict[str, str]:
    """Return a part of a message as templates take it; of an image they see that it is one."""
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _written(call: ToolCall) -> dict[str, Any]:
    """Return an assistant's call as templates take it: with its arguments as an object."""
    try:
        arguments: Any = msgspec.json.decode(call.arguments)
    except (msgspec.MsgspecError, RecursionError):
        arguments = call.arguments  # what the model wrote then, good or not
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
