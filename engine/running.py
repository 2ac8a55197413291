"""An answer on its way, in the engines whose loop is ours.

How its tokens are chosen, what each one means for it, and what it becomes in the end.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from engine.adjusting import Adjustment
from engine.answers import Told, refuse, render_logprobs
from engine.chat import ChatTokenizer
from engine.closing import Closing, Closings
from engine.constraints import Enforcement
from engine.matching import ConstraintTooComplex, Matcher, TokenizerConstraints
from engine.spelling import StopStrings, decode
from jobs.domain.request import Request, SamplingParams
from jobs.domain.result import FinishReason, LineError, Result, Usage

BAD_LOGITS = -1
"""The choice in a row whose logits are not numbers."""
NO_CHOICE = -2
"""The choice in a row that rules out every token."""


class Row(msgspec.Struct):
    """How one sequence chooses its tokens.

    Attributes:
        adjustment: what changes its logits first.
        num_logprobs: how many of the likeliest tokens are told at each place; None: none, and not
            the chosen one either.
        told: what was told of each token that was chosen.
        drawn: its random number for the next token, where that is kept until there is one, so that
            a step that ran out of memory is done again with the same.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    rng: random.Random | None = None
    matcher: Matcher | None = None
    min_p: float = 0.0
    adjustment: Adjustment | None = None
    num_logprobs: int | None = None
    told: list[Told] = msgspec.field(default_factory=list)
    drawn: float | None = None


def open_row(sampling: SamplingParams, adjustment: Adjustment | None) -> Row:
    """Return how a request chooses its tokens, its constraint aside."""
    row = Row(
        temperature=sampling.temperature or 0.0,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p or 0.0,
        adjustment=adjustment,
        num_logprobs=sampling.logprobs,
    )
    if row.temperature > 0 and row.top_k != 1:
        row.rng = random.Random(sampling.seed)  # noqa: S311 -- not for secrets
    return row


class Held(NamedTuple):
    """How an answer is held to its constraint.

    Attributes:
        constraint: how much of it is kept; None without one.
        closing: what ends the answer in time.
    """

    constraint: Enforcement | None = None
    closing: Closing | None = None


def constrain(
    request: Request,
    row: Row,
    *,
    constraints: TokenizerConstraints,
    closings: Closings | None,
    refuses: bool,
) -> Held | Result:
    """Give a row the matcher of its request's constraint, where there can be one.

    Args:
        closings: what ends answers in time; None: nothing does.
        refuses: whether a constraint that is kept in part, or not at all, is refused.

    Returns:
        the result of a request that is refused.
    """
    if request.constraint is None:
        return Held()
    complaint = "The schema uses keywords that cannot be enforced while generating."
    kept: Enforcement
    try:
        row.matcher, kept = constraints.matcher(request.constraint)
    except ConstraintTooComplex as error:
        kept, complaint = "validated", f"The constraint cannot be enforced: {error}."
    if refuses and kept != "enforced":
        return refuse(request, "schema_unsupported", complaint, param="response_format")
    # Of a token that was put in the model's place nobody knows how likely it was.
    if closings is None or row.matcher is None or row.num_logprobs is not None:
        return Held(kept)
    return Held(kept, closings.open(request.constraint, kept))


class Ending(NamedTuple):
    """How an answer ended.

    Attributes:
        num_kept: how many of its tokens are text; None: all.
        text: where a stop string cut it off.
    """

    reason: FinishReason
    num_kept: int | None = None
    text: str | None = None
    error: LineError | None = None


class Answer:
    """One request on its way: how it chooses, what it has said, what ends it."""

    __slots__ = (
        "closing",
        "constraint",
        "id",
        "ignores_eos",
        "keeps_marks",
        "max_tokens",
        "row",
        "said",
        "stop_tokens",
        "stops",
    )

    def __init__(
        self,
        request: Request,
        sampling: SamplingParams,
        *,
        max_tokens: int,
        row: Row,
        tokenizer: ChatTokenizer,
        held: Held,
    ) -> None:
        """Begin.

        Args:
            sampling: the request's, with every default filled in.
            max_tokens: what there is room for.
            held: what `constrain` said of its row.
        """
        self.id = request.id
        self.max_tokens = min(max_tokens, sampling.max_tokens or max_tokens)
        self.row = row
        self.constraint, self.closing = held
        self.keeps_marks = request.tools is not None
        self.stops = (
            StopStrings(
                tokenizer,
                sampling.stop,
                min_tokens=sampling.min_tokens,
                keeps_marks=self.keeps_marks,
            )
            if sampling.stop
            else None
        )
        # A constraint says where the answer ends; its end is an end-of-sequence token.
        self.ignores_eos = sampling.ignore_eos and request.constraint is None
        self.stop_tokens = frozenset(sampling.stop_token_ids)
        self.said: list[int] = []

    def in_time(self, token: int) -> int:
        """Return the token to take for the chosen one, so that the answer ends in time."""
        if token < 0 or self.closing is None or self.row.matcher is None:
            return token
        said = self.said
        return self.closing.choose(said, token, num_left=self.max_tokens - len(said))

    def take(self, token: int, eos: frozenset[int]) -> Ending | None:
        """Take its next token, or one of `BAD_LOGITS` and `NO_CHOICE`; return whether it ended.

        Args:
            eos: the model's end-of-sequence tokens.
        """
        if token < 0:
            return self._fail(token)
        said = self.said
        said.append(token)
        row = self.row
        if row.adjustment is not None:
            row.adjustment.note(token)
        if token in eos and not self.ignores_eos:
            return Ending("stop", num_kept=len(said) - 1)
        matcher = row.matcher
        if matcher is not None:
            if not matcher.advance(token):
                # The library gave up on this state; the answer is validated in the end anyway.
                row.matcher = None
                self.constraint = "validated"
            elif matcher.is_finished() and matcher.is_accepting():
                # Nothing but the end can follow: no step is spent on it.
                return Ending("stop")
        if self.stops is not None and self.stops.found(said):
            return Ending("stop", text=self.stops.text)
        if token in self.stop_tokens:
            return Ending("stop", num_kept=len(said) - 1)  # it is no text, as in vLLM
        return Ending("length") if len(said) >= self.max_tokens else None

    def _fail(self, token: int) -> Ending:
        if token == NO_CHOICE and self.row.matcher is not None:
            # The constraint leads nowhere from here; its validation says what is missing.
            return Ending("stop")
        return Ending(
            "stop",
            error=LineError(
                code="numerical_error",
                message="The model's logits are not numbers; the prompt may overflow this "
                "precision.",
                status_code=500,
            ),
        )

    def render(
        self,
        ending: Ending,
        tokenizer: ChatTokenizer,
        *,
        bytes_of: Callable[[list[int]], bytes],
        num_prompt: int,
        cached_tokens: int,
    ) -> Result:
        """Return its result.

        Args:
            bytes_of: spells tokens.
            num_prompt: tokens of its prompt.
            cached_tokens: how many of them the cache held.
        """
        kept = self.said if ending.num_kept is None else self.said[: ending.num_kept]
        text = ending.text
        if text is None:
            text = decode(tokenizer, kept, keeps_marks=self.keeps_marks)
        return Result(
            id=self.id,
            text=text,
            finish_reason="length"
            if self.closing is not None and self.closing.has_cut
            else ending.reason,
            usage=Usage(
                prompt_tokens=num_prompt,
                completion_tokens=len(self.said),
                cached_tokens=cached_tokens,
            ),
            error=ending.error,
            constraint=self.constraint,
            logprobs=render_logprobs(self.row.told[: len(kept)], bytes_of),
        )
