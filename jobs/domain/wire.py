"""How a line is written: types with only the fields that are obeyed, or ignored by definition.

They leave no room for deep nesting, and one typed decode is all that most lines take. Those that
are made by the million are not tracked by the garbage collector: what was read from JSON has no
cycles.
"""

from typing import Annotated, Any, Literal

import msgspec

from jobs.domain.images import ImageFilePart, ImageUrlPart, InputImagePart
from jobs.domain.pooling import EmbeddingsBody, RerankBody, ScoreBody
from jobs.domain.tools import WireCall, WireChoice, WireTool

MAX_STOP_STRINGS = 16
MAX_ANSWERS = 128
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_MODEL_CHARS = 512

Role = Literal["system", "developer", "user", "assistant", "tool"]

ABSENT = msgspec.Raw()
_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
_TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
_TopK = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
_Stop = Annotated[str, msgspec.Meta(min_length=1)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
_Token = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
SchemaName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
_Stops = Annotated[list[_Stop], msgspec.Meta(max_length=MAX_STOP_STRINGS)]


class TextPart(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True, gc=False):
    """Text among the parts of a message."""

    text: str


Part = TextPart | ImageUrlPart | ImageFilePart | InputImagePart


class WireMessage(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """One turn of a conversation."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[WireCall] | None = None
    tool_call_id: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    # What an answer of a model holds beside that, which goes into the next turn's history as it is.
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class PlainText(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A `response_format` that asks for none."""


class JsonObject(msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """A `response_format`: any JSON object."""


class NamedSchema(msgspec.Struct, forbid_unknown_fields=True):
    """A schema, as OpenAI wraps it."""

    name: SchemaName
    schema: msgspec.Raw = ABSENT
    description: str | None = None
    strict: bool | None = None


class JsonSchema(msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """A `response_format`: what a schema allows."""

    json_schema: NamedSchema


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's way to say what an answer must look like."""

    json: msgspec.Raw = ABSENT
    regex: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    choice: Annotated[list[str], msgspec.Meta(min_length=1)] | None = None
    grammar: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    json_object: bool | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, gc=False):
    """What chat and completions have in common."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_MODEL_CHARS)] | None = None
    max_tokens: _Positive | None = None
    temperature: _Temperature | None = None
    top_p: _TopP | None = None
    top_k: _TopK | None = None
    seed: _Seed | None = None
    stop: _Stop | _Stops | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    # The older names of vLLM for the same thing.
    guided_json: msgspec.Raw = ABSENT
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_ANSWERS)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    logit_bias: Annotated[dict[str, _Bias], msgspec.Meta(max_length=MAX_BIASES)] | None = None
    stop_token_ids: Annotated[list[_Token], msgspec.Meta(max_length=MAX_STOP_STRINGS)] | None = None
    bad_words: Annotated[list[_Stop], msgspec.Meta(max_length=MAX_BAD_WORDS)] | None = None
    # Accepted because clients send it; false asks for nothing.
    stream: bool | None = None
    user: str | None = None


class ChatBody(Body, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The body of a chat."""

    messages: Annotated[list[WireMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: _Positive | None = None
    response_format: PlainText | JsonObject | JsonSchema | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[WireTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | WireChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(Body, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The body of a completion."""

    prompt: str | list[Any]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: PlainText | JsonObject | JsonSchema | None = None


class FlatSchema(msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """A `text.format` of a response: what a schema allows."""

    name: SchemaName
    schema: msgspec.Raw = ABSENT
    description: str | None = None
    strict: bool | None = None


class TextForm(msgspec.Struct, forbid_unknown_fields=True):
    """What the text of a response has to look like."""

    format: PlainText | JsonObject | FlatSchema | None = None
    verbosity: str | None = None


class ResponsesBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a response; see jobs.domain.responses for what is made of it.

    The items and tools have many types, most of which nothing here can serve: they are looked at
    one by one, so that the refusal names the type.
    """

    input: str | list[dict[str, Any]]
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_MODEL_CHARS)] | None = None
    instructions: str | None = None
    max_output_tokens: _Positive | None = None
    temperature: _Temperature | None = None
    top_p: _TopP | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextForm | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    stream: bool | None = None
    user: str | None = None
    # What vLLM takes beside OpenAI's names, as in a chat.
    top_k: _TopK | None = None
    seed: _Seed | None = None
    stop: _Stop | _Stops | None = None
    ignore_eos: bool | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    # Refused with a reason of their own, whatever they hold but the defaults.
    background: Any = None
    conversation: Any = None
    max_tool_calls: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    truncation: Any = None


class ChatLine(msgspec.Struct, gc=False):
    """A line of a batch of chats."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions"]
    body: ChatBody


class CompletionLine(msgspec.Struct, gc=False):
    """A line of a batch of completions."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/completions"]
    body: CompletionBody


class ResponsesLine(msgspec.Struct):
    """A line of a batch of responses."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/responses"]
    body: ResponsesBody


class EmbeddingsLine(msgspec.Struct):
    """A line of a batch of embeddings."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/embeddings"]
    body: EmbeddingsBody


class RerankLine(msgspec.Struct):
    """A line of a batch of rankings."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/rerank"]
    body: RerankBody


class ScoreLine(msgspec.Struct):
    """A line of a batch of scores."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/score"]
    body: ScoreBody
