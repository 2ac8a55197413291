"""One line of an input file, and the request an engine can serve that it stands for.

The fast path is one typed decode, whose types leave no room for deep nesting. Only a line that
fails it is looked at a second time, slowly, to find out what is wrong or that what it asks for
changes nothing (`"tools": null`).

What planning needs of a line is read in `jobs.domain.sketch`, with the checks that stand here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec

from jobs.domain.errors import InvalidLine
from jobs.domain.images import Image
from jobs.domain.pooling import (
    EMBEDDINGS,
    POOLING_BODIES,
    POOLING_ENDPOINTS,
    RERANK,
    SCORE,
    Pooling,
    read_pooling,
)
from jobs.domain.responses import RESPONSES, Translated, in_its_words, translate
from jobs.domain.schema_text import is_given, schema_text
from jobs.domain.slow import parse_slowly
from jobs.domain.tools import ToolCall, Tools, forced_schema, read_tools
from jobs.domain.turns import check_turns, content_of, parts_of
from jobs.domain.wire import (
    ABSENT,
    Body,
    ChatBody,
    ChatLine,
    CompletionBody,
    CompletionLine,
    EmbeddingsLine,
    JsonObject,
    JsonSchema,
    RerankLine,
    ResponsesBody,
    ResponsesLine,
    Role,
    ScoreLine,
    StructuredOutputs,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
CHAT_ENDPOINTS = (CHAT, RESPONSES)
"""Both ask for the answer to a conversation: whoever serves one serves the other."""
TEXT_ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES)
ENDPOINTS = (*TEXT_ENDPOINTS, *POOLING_ENDPOINTS)

MAX_CUSTOM_ID_BYTES = 512
_TOKEN_DIGITS = 11

ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
CONSTRAINT_KINDS: tuple[ConstraintKind, ...] = (
    "json_schema",
    "json_object",
    "regex",
    "choice",
    "grammar",
)


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """What an answer must look like.

    `spec` is the JSON text of the schema, the regular expression, the JSON text of the list of
    choices, the grammar (Lark, or EBNF as llguidance and xgrammar spell it), or empty for
    "json_object".
    """

    kind: ConstraintKind
    spec: str = ""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """One turn of a conversation; content parts are already joined.

    `tool_calls` is what an assistant's turn wanted called, `tool_call_id` says which of them a
    tool's turn answers. `parts` are texts and images in their order, of a turn that shows any.
    """

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    parts: tuple[str | Image, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        """What it shows."""
        return tuple([part for part in self.parts if isinstance(part, Image)])


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens; None means that the line leaves it to the model's defaults.

    `temperature` 0 is greedy; `top_k` 0 or -1 is off. `logprobs` is how many of the likeliest
    tokens are told at each place beside the one that was chosen; None: not even that. `n` answers
    are asked for one by one, so an engine sees 1.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine is asked: a conversation, a prompt or texts to pool; exactly one of them.

    A prompt is a text, or token ids.
    `id` is unique in the life of the process that feeds the engine; never a caller's value.
    """

    id: int
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: SamplingParams = SamplingParams()
    constraint: Constraint | None = None
    tools: Tools | None = None
    pooling: Pooling | None = None


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a model on an engine can do, as planning needs it; computed without torch.

    Attributes:
        model: the name clients use.
        engine: "hf", "simulated", ...
        context_tokens: prompt and answer together.
        parameters: names of the body's fields that the engine obeys.
        constraint_backend: which library keeps constraints while generating.
        refuses_unenforceable: whether a schema that cannot be kept while generating is refused,
            and not only validated after.
        fingerprint: changes whenever answers could change.
        num_slots: requests that it works on at once; 0: unknown.
        cache_tokens: tokens that its cache holds; 0: unknown.
        quantization: of its weights, such as "none" or "nf4"; empty: unknown.
        tokenizer_hash: of its tokenizer's file; empty: unknown.
        is_greedy: whether a line that says nothing of it gets the likeliest answer.
        revision: tells apart what has one fingerprint, as far as the machine that has the model
            can see: its weight files as they are there, and the engine's version.
        takes_images: whether messages may show images.
    """

    model: str
    engine: str
    endpoints: tuple[str, ...] = TEXT_ENDPOINTS
    context_tokens: int = 2048
    constraints: tuple[ConstraintKind, ...] = CONSTRAINT_KINDS
    parameters: tuple[str, ...] = ()
    constraint_backend: Literal["llguidance", "outlines_core"] = "llguidance"
    refuses_unenforceable: bool = False
    fingerprint: str = ""
    num_slots: int = 0
    cache_tokens: int = 0
    quantization: str = ""
    tokenizer_hash: str = ""
    is_greedy: bool = False
    revision: str = ""
    takes_images: bool = False

    @property
    def identity(self) -> str:
        """Whose answers these are: two models with one identity give the same; empty: unknown."""
        return f"{self.fingerprint}/{self.revision}" if self.fingerprint else ""

    @property
    def serves_everything(self) -> bool:
        """Whether no parameter or constraint that is understood has to be refused."""
        return self.parameters == PARAMETERS and self.constraints == CONSTRAINT_KINDS


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One good line: whose it is, which model it names, and what to ask."""

    custom_id: str
    model: str | None
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: SamplingParams = SamplingParams()
    constraint: Constraint | None = None
    tools: Tools | None = None
    pooling: Pooling | None = None

    def to_request(self, request_id: int) -> Request:
        """Return what to ask an engine."""
        return Request(
            id=request_id,
            messages=self.messages,
            prompt=self.prompt,
            sampling=self.sampling,
            constraint=self.constraint,
            tools=self.tools,
            pooling=self.pooling,
        )


_response_decoder = msgspec.json.Decoder(ResponsesLine)


class _ReadLine(NamedTuple):
    custom_id: str
    body: Translated


def _read_response(line: bytes) -> _ReadLine:
    wire = _response_decoder.decode(line)
    return _ReadLine(wire.custom_id, translate(wire.body))


DECODERS: dict[str, Callable[[bytes], Any]] = {
    CHAT: msgspec.json.Decoder(ChatLine).decode,
    COMPLETIONS: msgspec.json.Decoder(CompletionLine).decode,
    RESPONSES: _read_response,
    EMBEDDINGS: msgspec.json.Decoder(EmbeddingsLine).decode,
    RERANK: msgspec.json.Decoder(RerankLine).decode,
    SCORE: msgspec.json.Decoder(ScoreLine).decode,
}
_BODY_TYPES: dict[str, type[msgspec.Struct]] = {
    CHAT: ChatBody,
    COMPLETIONS: CompletionBody,
    RESPONSES: ResponsesBody,
    **POOLING_BODIES,
}

PARAMETERS = tuple(
    sorted(
        ({*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__})
        - {"model", "messages", "prompt"}
    )
)
"""Names of the body's fields that are understood."""
TOOL_PARAMETERS = ("tools",)
"""Those of them that only a model which is shown tools obeys."""


def parse_line(line: bytes, *, endpoint: str, capabilities: Capabilities | None = None) -> Line:
    """Return the request that `line` stands for.

    Args:
        endpoint: the batch's endpoint, one of `ENDPOINTS`; the line's url must equal it.
        capabilities: of the model that would serve it; None checks the form only.

    Raises:
        InvalidLine: the line cannot be run; `error_code` and `param` are the Batch API's.
    """
    try:
        wire = DECODERS[endpoint](line)
        body, custom_id = wire.body, wire.custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        custom_id, body = read_slowly(line, endpoint)
    check_custom_id(custom_id)
    if endpoint in POOLING_ENDPOINTS:
        return Line(custom_id=custom_id, model=body.model, pooling=read_pooling(body))
    constraint, tools = check_body(body, capabilities)
    if endpoint in CHAT_ENDPOINTS:
        check_turns(body.messages)
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    if endpoint in CHAT_ENDPOINTS:
        messages = tuple(
            [
                Message(
                    m.role,
                    m.content if type(m.content) is str else content_of(m, body.messages),
                    m.name,
                    tuple([call.to_call() for call in m.tool_calls]) if m.tool_calls else (),
                    m.tool_call_id,
                    () if type(m.content) is str else parts_of(m, body.messages),
                )
                for m in body.messages
            ]
        )
        if capabilities is not None and any(message.parts for message in messages):
            check_takes_images(capabilities)
    else:
        prompt = prompt_of(body.prompt)
    return Line(
        custom_id=custom_id,
        model=body.model,
        messages=messages,
        prompt=prompt,
        sampling=sampling_of(body),
        constraint=constraint,
        tools=tools,
    )


def read_slowly(line: bytes, endpoint: str) -> tuple[str, Any]:
    """Return custom_id and body of a line that the fast path does not read.

    Raises:
        InvalidLine: the line is at fault.
    """
    custom_id, body = parse_slowly(line, endpoint=endpoint, body_type=_BODY_TYPES[endpoint])
    return custom_id, translate(body) if endpoint == RESPONSES else body


def check_custom_id(custom_id: str) -> None:
    """Do nothing if a custom_id is neither empty nor too long.

    Raises:
        InvalidLine: it is.
    """
    num_bytes = len(custom_id) if custom_id.isascii() else len(custom_id.encode())
    if not 0 < num_bytes <= MAX_CUSTOM_ID_BYTES:
        raise InvalidLine(
            f"custom_id must have 1 to {MAX_CUSTOM_ID_BYTES} bytes; this one has {num_bytes}.",
            param="custom_id",
            error_code="invalid_value",
        )


def check_body(
    body: ChatBody | CompletionBody, capabilities: Capabilities | None
) -> tuple[Constraint | None, Tools | None]:
    """Return constraint and tools of a body, once nothing but its prompt is left to be looked at.

    Raises:
        InvalidLine: it asks for what is not supported.
    """
    try:
        return _find_asked(body, capabilities)
    except InvalidLine as error:
        raise (in_its_words(error) if isinstance(body, Translated) else error) from None


def _find_asked(
    body: ChatBody | CompletionBody, capabilities: Capabilities | None
) -> tuple[Constraint | None, Tools | None]:
    if body.stream:
        raise InvalidLine(
            "Streaming is not supported in a batch; leave `stream` out.",
            param="body.stream",
            error_code="streaming_unsupported",
        )
    constraint = _constraint(body)
    if isinstance(body, ChatBody) and (not body.tools or body.tool_choice == "none"):
        body.tools = None
    if capabilities is not None:
        check_asked(body, constraint, capabilities)
    if not isinstance(body, ChatBody):
        return constraint, None
    if body.top_logprobs and not body.logprobs:
        raise InvalidLine(
            "top_logprobs needs logprobs to be true.",
            param="body.top_logprobs",
            error_code="invalid_value",
        )
    if body.tools is None and body.tool_choice is None:
        return constraint, None
    return _with_tools(body, constraint)


def _with_tools(
    body: ChatBody, constraint: Constraint | None
) -> tuple[Constraint | None, Tools | None]:
    tools = read_tools(
        body.tools or (), body.tool_choice, is_parallel=body.parallel_tool_calls is not False
    )
    if tools is None:
        return constraint, None
    if constraint is not None:
        raise InvalidLine(
            "An answer cannot both call tools and have the form of a schema; leave `tools` or the "
            "format out, or set tool_choice to none.",
            param="body.tools",
            error_code="invalid_value",
        )
    if tools.is_forced:
        constraint = Constraint("json_schema", forced_schema(tools))
    return constraint, tools


def check_takes_images(capabilities: Capabilities) -> None:
    """Do nothing if a model takes images.

    Raises:
        InvalidLine: it does not.
    """
    if not capabilities.takes_images:
        raise InvalidLine(
            f"Model {capabilities.model} on engine {capabilities.engine} takes no images.",
            param="body.messages",
            error_code="unsupported_parameter",
        )


def sampling_of(body: ChatBody | CompletionBody) -> SamplingParams:
    """Return how a body wants tokens to be chosen.

    Raises:
        InvalidLine: a bias names no token.
    """
    if isinstance(body, ChatBody):
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        logprobs = body.logprobs
    return SamplingParams(
        max_tokens=_longest(body),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=_stops(body.stop),
        ignore_eos=body.ignore_eos or False,
        n=body.n or 1,
        logprobs=logprobs,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty,
        min_p=body.min_p,
        min_tokens=body.min_tokens or 0,
        logit_bias=_biases(body.logit_bias) if body.logit_bias else (),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        bad_words=tuple(body.bad_words or ()),
    )


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(
        token.isascii() and token.isdigit() and len(token) < _TOKEN_DIGITS for token in given
    ):
        raise InvalidLine(
            "logit_bias is an object from token ids to numbers.",
            param="body.logit_bias",
            error_code="invalid_value",
        )
    return tuple(sorted((int(token), bias) for token, bias in given.items()))


def _longest(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, ChatBody):
        return body.max_completion_tokens or body.max_tokens
    return body.max_tokens or 16  # OpenAI's default for this endpoint


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _refused(name: str) -> InvalidLine:
    return InvalidLine(
        f"Parameter `{name}` is not supported with this value.",
        param=f"body.{name}",
        error_code="unsupported_parameter",
    )


def check_asked(body: Body, constraint: Constraint | None, capabilities: Capabilities) -> None:
    """Do nothing if a model can serve what a body asks for.

    Raises:
        InvalidLine: it cannot.
    """
    if capabilities.parameters != PARAMETERS:
        for name in _lacking(capabilities.parameters):
            value = getattr(body, name, None)
            if value is not None and value != ABSENT:
                raise InvalidLine(
                    f"Parameter `{name}` is not supported by engine {capabilities.engine}.",
                    param=f"body.{name}",
                    error_code="unsupported_parameter",
                )
    if constraint is not None and constraint.kind not in capabilities.constraints:
        raise InvalidLine(
            f"Engine {capabilities.engine} cannot keep a {constraint.kind} constraint.",
            param="body.structured_outputs",
            error_code="unsupported_parameter",
        )


@lru_cache(maxsize=16)
def _lacking(parameters: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in PARAMETERS if name not in parameters)


def prompt_of(prompt: str | list[Any]) -> str | tuple[int, ...]:
    """Return the one prompt of a body, a text or token ids.

    Raises:
        InvalidLine: it has none, or several.
    """
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # one prompt, written as a list of prompts
    if isinstance(prompt, str):
        return prompt
    if prompt and all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        return tuple(prompt)
    if any(isinstance(p, (str, list)) for p in prompt):
        raise InvalidLine(
            "A line holds one prompt; write one line for each.",
            param="body.prompt",
            error_code="unsupported_parameter",
        )
    raise InvalidLine(
        "prompt must be a string or a list of token ids, and not empty.",
        param="body.prompt",
        error_code="invalid_value",
    )


def _choices(choices: list[str]) -> Constraint:
    return Constraint("choice", msgspec.json.encode(choices).decode())


def _constraint(body: ChatBody | CompletionBody) -> Constraint | None:
    """Return what the body asks of the answer's form; `response_format` wins, as in vLLM."""
    form = body.response_format
    if isinstance(form, JsonObject):
        return Constraint("json_object")
    if isinstance(form, JsonSchema):
        schema = form.json_schema.schema
        if not is_given(schema):
            return Constraint("json_object")
        param = "body.response_format.json_schema.schema"
        return Constraint("json_schema", schema_text(schema, param))
    if body.structured_outputs is not None:
        return _structured_outputs(body.structured_outputs)
    return _guided(body)


def _structured_outputs(wanted: StructuredOutputs) -> Constraint:
    found: list[Constraint] = []
    if is_given(wanted.json):
        text = schema_text(wanted.json, "body.structured_outputs.json")
        found.append(Constraint("json_schema", text))
    if wanted.regex is not None:
        found.append(Constraint("regex", wanted.regex))
    if wanted.choice is not None:
        found.append(_choices(wanted.choice))
    if wanted.grammar is not None:
        found.append(Constraint("grammar", wanted.grammar))
    if wanted.json_object:
        found.append(Constraint("json_object"))
    if len(found) != 1:
        raise InvalidLine(
            "structured_outputs takes exactly one of json, regex, choice, grammar and "
            f"json_object; this one has {len(found)}.",
            param="body.structured_outputs",
            error_code="invalid_value",
        )
    return found[0]


def _guided(body: Body) -> Constraint | None:
    if is_given(body.guided_json):
        return Constraint("json_schema", schema_text(body.guided_json, "body.guided_json"))
    if body.guided_regex is not None:
        return Constraint("regex", body.guided_regex)
    if body.guided_choice:
        return _choices(body.guided_choice)
    if body.guided_grammar is not None:
        return Constraint("grammar", body.guided_grammar)
    return None


class _CustomId(msgspec.Struct):
    custom_id: str


_custom_id_decoder = msgspec.json.Decoder(_CustomId)


def custom_id_of(line: bytes) -> str:
    """Return only the custom_id of a line that was found good before."""
    return _custom_id_decoder.decode(line).custom_id
