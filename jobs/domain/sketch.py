"""What planning needs of one line.

That is less than an engine needs, so a `Sketcher` stops half way: the checks of `parse_line`, and
no request built.
"""

from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from jobs.domain.errors import InvalidLine
from jobs.domain.images import Image
from jobs.domain.pooling import POOLING_ENDPOINTS, read_pooling
from jobs.domain.request import (
    CHAT_ENDPOINTS,
    DECODERS,
    MAX_CUSTOM_ID_BYTES,
    Capabilities,
    Constraint,
    check_asked,
    check_body,
    check_custom_id,
    prompt_of,
    read_slowly,
    sampling_of,
)
from jobs.domain.responses import Translated, in_its_words
from jobs.domain.tools import Tools, schemas_of
from jobs.domain.turns import check_turns, flatten
from jobs.domain.wire import Body, ChatBody, CompletionBody

_SURE_CHARS = MAX_CUSTOM_ID_BYTES // 4
"""So many characters have no more bytes than that."""

_encode = msgspec.msgpack.Encoder().encode


class Terms(msgspec.Struct, frozen=True, eq=False):
    """What a line asks for beside its prompt; one object for lines in a row that ask the same.

    Attributes:
        max_tokens: the longest answer; None: as long as the model likes.
        encoded: equal where what is asked for is, the model aside.
        body: without its prompt, for this module only.
        digest_seed: a hash of `encoded`.
    """

    model: str | None
    max_tokens: int | None
    temperature: float | None
    seed: int | None
    constraint: Constraint | None
    tools: Tools | None
    encoded: bytes
    body: Any
    digest_seed: int = 0

    def __post_init__(self) -> None:
        """Hash what is asked for, once for all lines that ask it."""
        msgspec.structs.force_setattr(self, "digest_seed", xxh3_64_intdigest(self.encoded))

    def list_schemas(self) -> list[tuple[Constraint, str]]:
        """Return every constraint to be tried before the line may run, and where it stands."""
        found: list[tuple[Constraint, str]] = []
        if self.tools is not None:
            found += [
                (Constraint("json_schema", msgspec.json.encode(schema).decode()), "tools")
                for schema in schemas_of(self.tools).values()
            ]
        if self.constraint is not None:
            is_json = self.constraint.kind.startswith("json")
            where = "response_format" if is_json else "structured_outputs"
            if is_json and isinstance(self.body, Translated):
                where = "text.format"
            found.append((self.constraint, "tool_choice" if self.tools is not None else where))
        return found

    def check(self, capabilities: Capabilities) -> None:
        """Do nothing if a model can serve the line.

        Raises:
            InvalidLine: what `parse_line` says with these capabilities.
        """
        if not isinstance(self.body, Body):
            return
        try:
            check_asked(self.body, self.constraint, capabilities)
        except InvalidLine as error:
            raise (in_its_words(error) if isinstance(self.body, Translated) else error) from None


class Sketch(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What planning needs of one good line.

    Attributes:
        asked: its prompt, as its body has it.
        num_first_chars: of all messages but the last.
        images: that its messages show.
    """

    custom_id: str
    terms: Terms
    asked: Any
    num_first_chars: int
    images: tuple[Image, ...] = ()

    def digest(self, model: bytes = b"") -> bytes:
        """Return 16 bytes that are equal where requests are, however their lines are written.

        Args:
            model: what tells apart the models of a batch that has several.
        """
        # As a seed: what the lines in a row ask for is the same, and need not be copied for each.
        return xxh3_128_digest(_encode(self.asked) + model, self.terms.digest_seed)

    def request(self) -> bytes:
        """Return all that is asked: equal bytes where requests are equal, the model aside."""
        return _encode(self.asked) + self.terms.encoded


class Sketcher:
    """Reads lines as planning does: the checks of `parse_line`, and no request built.

    Lines of a file mostly ask for the same beside their prompts. What that is gets looked at once
    for all such lines in a row: one comparison takes the place of a dozen checks.
    """

    def __init__(self, endpoint: str) -> None:
        """Prepare for lines of one of `ENDPOINTS`."""
        self.endpoint = endpoint
        self._is_chat = endpoint in CHAT_ENDPOINTS
        self._is_pooling = endpoint in POOLING_ENDPOINTS
        self._decode = DECODERS[endpoint]
        self._body: Body | None = None
        self._terms: Terms  # of that body

    def sketch(self, line: bytes) -> Sketch:
        """Return what planning needs of `line`.

        Raises:
            InvalidLine: as `parse_line` would, without capabilities.
        """
        try:
            wire = self._decode(line)
            body, custom_id = wire.body, wire.custom_id
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            custom_id, body = read_slowly(line, self.endpoint)
        if not 0 < len(custom_id) <= _SURE_CHARS:
            check_custom_id(custom_id)
        if self._is_pooling:
            # There is nothing to choose by chance, so equal lines have equal answers.
            asks = Terms(body.model, None, 0.0, None, None, None, self.endpoint.encode(), body)
            return Sketch(custom_id, asks, read_pooling(body), 0)
        if not self._is_chat:
            asked, body.prompt = body.prompt, None
            body.user = None
            terms = self._terms if body == self._body else self._look(body)
            return Sketch(custom_id, terms, prompt_of(asked), 0)
        asked, body.messages = body.messages, None
        body.user = None
        terms = self._terms if body == self._body else self._look(body)
        num_chars = num_last = 0
        images: list[Image] | None = None
        has_tools = False
        for message in asked:
            content = message.content
            if message.tool_calls or message.tool_call_id or message.role == "tool":
                has_tools = True
            if type(content) is not str:
                images = images or []
                content = flatten(message, asked, images)
            num_last = len(content)
            num_chars += num_last
        if has_tools:
            check_turns(asked)
        return Sketch(custom_id, terms, asked, num_chars - num_last, tuple(images or ()))

    def _look(self, body: ChatBody | CompletionBody) -> Terms:
        """Return what a body without its prompt asks for, and expect the next line to ask it too.

        Raises:
            InvalidLine: it asks for what is not supported.
        """
        constraint, tools = check_body(body, None)
        sampling = sampling_of(body)
        terms = Terms(
            body.model,
            sampling.max_tokens,
            body.temperature,
            body.seed,
            constraint,
            tools,
            _encode((sampling, constraint, tools)),
            body,
        )
        self._terms, self._body = terms, body
        return terms
