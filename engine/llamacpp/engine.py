"""The continuous-batching loop over llama.cpp, behind the Engine protocol.

It runs in the thread of whoever iterates `generate`, one step at a time, as that of the hf engine:
llama.cpp computes, and which tokens, what is chosen and what ends an answer is decided here.

    take -> encode -> [ plan -> step -> choose -> advance ] -> Result
                        one step, all running sequences
"""

import random
import time
from collections.abc import Generator, Sequence

import msgspec
import numpy as np

from engine.adjusting import Adjustment
from engine.answers import refuse, render_logprobs
from engine.base import Source
from engine.chat import PromptEncoder
from engine.closing import Closing, Closings
from engine.config import LlamacppConfig
from engine.constraints import ConstraintTooComplex, Enforcement, Matcher, TokenizerConstraints
from engine.gguf import Gguf, read
from engine.hf.tokens import StopStrings, decode, spell
from engine.llamacpp import library, rows
from engine.llamacpp.describe import describe_gguf, read_defaults
from engine.llamacpp.schedule import Scheduler, Track
from engine.llamacpp.tokenizer import Vocabulary
from engine.sampling import resolve_sampling
from jobs.domain.errors import EngineDied, EngineMisconfigured, EngineOutOfMemory, InvalidLine
from jobs.domain.request import Capabilities, Constraint, Request, SamplingParams
from jobs.domain.result import FinishReason, LineError, Result, Usage

_IDLE_SECONDS = 0.002
_ABORT_SECONDS = 0.25
_ADMIT_AT_ONCE = 8
_ALLOCATION_FAILED = -2


class _Answer:
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
        "track",
    )

    def __init__(
        self,
        *,
        request: Request,
        track: Track,
        max_tokens: int,
        row: rows.Row,
        constraint: Enforcement | None,
        closing: Closing | None,
        stops: StopStrings | None,
        ignores_eos: bool,
        stop_tokens: frozenset[int],
    ) -> None:
        self.id = request.id
        self.track = track
        self.max_tokens = max_tokens
        self.row = row
        self.constraint = constraint
        self.closing = closing
        self.stops = stops
        self.ignores_eos = ignores_eos
        self.stop_tokens = stop_tokens
        self.keeps_marks = request.tools is not None
        self.said: list[int] = []


class LlamacppEngine:
    """A GGUF model that works on `num_slots` sequences at once."""

    def __init__(self, config: LlamacppConfig, *, model: str | None = None) -> None:
        """Load the model.

        Args:
            model: the name clients use; unset, the configuration's.

        Raises:
            EngineMisconfigured: the model cannot be loaded as configured.
            EngineOutOfMemory: it does not fit.
        """
        self._config = config
        described: Gguf = read(config.model)
        capabilities = describe_gguf(config, described, model or config.model)
        self._model: library.Model | None = library.Model(config, described)
        vocabulary = Vocabulary(
            self._model.vocab, chat_template=described.text("tokenizer.chat_template") or None
        )
        self._vocabulary = vocabulary
        self._encoder = PromptEncoder(vocabulary, vocab_size=vocabulary.num_tokens)
        self._constraint_tokenizer = constraint_tokenizer = vocabulary.constraint_tokenizer()
        self._constraints = TokenizerConstraints(
            constraint_tokenizer, backend=config.asking.backend
        )
        is_closing = config.asking.close_early and config.asking.backend == "llguidance"
        self._closings = Closings(constraint_tokenizer) if is_closing else None
        self._model_defaults = read_defaults(described)
        self._eos = frozenset(vocabulary.end_tokens)
        self._scheduler = Scheduler(
            self._model, num_slots=config.slots, step_tokens=library.step_tokens(config)
        )
        self._mask = np.full(self._constraints.num_words, -1, dtype=np.int32)
        self._context_tokens = min(capabilities.context_tokens, self._model.cache_tokens)
        self._capabilities = msgspec.structs.replace(
            capabilities, cache_tokens=self._model.cache_tokens
        )
        self._num_done = 0

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""
        return self._capabilities

    @property
    def num_slots(self) -> int:
        """How many sequences are generated at once."""
        return self._config.slots

    @property
    def tuning(self) -> None:
        """Nothing: how much it works on is in its settings."""
        return

    def progress(self) -> int:
        """Return the number of tokens and prefill steps so far; any thread may ask."""
        return self._num_done

    def count_tokens(self, request: Request) -> int:
        """Return the exact number of prompt tokens of a request.

        Raises:
            InvalidLine: the request cannot be turned into a prompt.
        """
        return len(self._encoder.encode(request))

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters with every default filled in."""
        return resolve_sampling(request, self._config.defaults, self._model_defaults)

    def close(self) -> None:
        """Free the model and the cache."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish."""
        model = self._model
        if model is None:
            raise EngineMisconfigured("The engine is closed.")
        live: dict[Track, _Answer] = {}
        try:
            yield from self._run(source, model, live)
        except (RuntimeError, ValueError, IndexError, KeyError, MemoryError, OSError) as error:
            raise EngineDied(
                f"A step failed ({type(error).__name__}) with {len(live)} sequences in flight.",
                suspects=frozenset(answer.id for answer in live.values()),
            ) from error
        finally:
            if self._model is not None:
                self._scheduler.reset()

    def _run(
        self, source: Source, model: library.Model, live: dict[Track, _Answer]
    ) -> Generator[Result]:
        is_open = True
        next_abort_at = time.monotonic() + _ABORT_SECONDS
        while is_open or live:
            if is_open:
                taken = self._take(source, len(live))
                is_open = taken is not None
                for request in taken or ():
                    started = self._start(request)
                    if isinstance(started, Result):
                        yield started
                    else:
                        live[started.track] = started
                        self._scheduler.add(started.track)
            if time.monotonic() >= next_abort_at:
                next_abort_at = time.monotonic() + _ABORT_SECONDS
                for answer in [a for a in live.values() if source.is_aborted(a.id)]:
                    self._scheduler.end(answer.track)
                    del live[answer.track]
            if live:
                yield from self._step(model, live)
            elif is_open:
                time.sleep(_IDLE_SECONDS)

    def _take(self, source: Source, num_live: int) -> Sequence[Request] | None:
        """Ask for what keeps the slots full, and a queue behind them that is twice as long."""
        room = 3 * self._config.slots - num_live
        if room <= 0:
            return ()
        # Few at a time: encoding holds up the sequences that are already running.
        return source.take(min(room, max(self._config.slots - num_live, _ADMIT_AT_ONCE)))

    def _step(self, model: library.Model, live: dict[Track, _Answer]) -> list[Result]:
        """Move every running sequence on; return the results of those that ended."""
        asking = self._compute(model, live)
        self._num_done += max(1, len(asking))
        if not asking:
            return []
        answers = [live[track] for track in asking]
        chosen = rows.choose(
            model.logits(len(asking)), [answer.row for answer in answers], self._mask
        )
        results: list[Result] = []
        for answer, token in zip(answers, chosen, strict=True):
            result = self._advance(answer, _in_time(answer, token))
            if result is not None:
                del live[answer.track]
                results.append(result)
        return results

    def _compute(self, model: library.Model, live: dict[Track, _Answer]) -> list[Track]:
        """Run one step; return whose logits there are, in their order."""
        while True:
            placed, asking = self._scheduler.plan()
            verdict = model.step(placed)
            if verdict == 0:
                self._scheduler.finish()
                return asking
            if verdict != library.NO_ROOM:
                break
            if not self._scheduler.shrink():
                raise EngineOutOfMemory(
                    f"One sequence does not fit the cache of {model.cache_tokens:,} tokens; raise "
                    "cache_tokens."
                )
        if verdict == _ALLOCATION_FAILED:
            raise EngineOutOfMemory(
                f"llama.cpp ran out of memory with {len(live)} sequences{model.explain()}. Lower "
                "slots, batch_tokens or cache_tokens."
            )
        raise EngineDied(
            f"llama.cpp failed with {len(live)} sequences in flight (code {verdict})"
            f"{model.explain()}.",
            suspects=frozenset(answer.id for answer in live.values()),
        )

    def _start(self, request: Request) -> _Answer | Result:
        """Return what is to be computed, or the result of a request that cannot run."""
        where = "messages" if request.messages is not None else "prompt"
        try:
            prompt = self._encoder.encode(request)
        except InvalidLine as error:
            return refuse(request, error.error_code, error.message, param=where)
        room = self._context_tokens - len(prompt)
        if room < 1:
            return refuse(
                request,
                "context_length_exceeded",
                f"The prompt has {len(prompt)} tokens, which leaves no room for an answer: this "
                f"model's context holds {self._context_tokens} tokens.",
                param=where,
            )
        sampling = self.resolve_sampling(request)
        row = rows.Row(
            temperature=sampling.temperature or 0.0,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p or 0.0,
            adjustment=self._adjust(sampling, prompt),
            num_logprobs=sampling.logprobs,
        )
        if row.temperature > 0 and row.top_k != 1:
            row.rng = random.Random(sampling.seed)  # noqa: S311 -- not for secrets
        kept: Enforcement | None = None
        closing: Closing | None = None
        if request.constraint is not None:
            row.matcher, kept, complaint = self._match(request.constraint)
            if kept != "enforced" and self._config.asking.on_unsupported_schema == "refuse":
                return refuse(request, "schema_unsupported", complaint, param="response_format")
            # Of a token that was put in the model's place nobody knows how likely it was.
            is_told = sampling.logprobs is not None
            if self._closings is not None and row.matcher is not None and not is_told:
                closing = self._closings.open(request.constraint, kept)
        return _Answer(
            request=request,
            track=Track(prompt),
            max_tokens=min(room, sampling.max_tokens or room),
            row=row,
            constraint=kept,
            closing=closing,
            stops=StopStrings(self._vocabulary, sampling.stop) if sampling.stop else None,
            # A constraint says where the answer ends; its end is an end-of-sequence token.
            ignores_eos=sampling.ignore_eos and request.constraint is None,
            stop_tokens=frozenset(sampling.stop_token_ids),
        )

    def _adjust(self, sampling: SamplingParams, prompt: list[int]) -> Adjustment | None:
        """Return what changes the logits of an answer; None where nothing does."""
        if not Adjustment.is_needed(sampling):
            return None
        return Adjustment(
            sampling,
            prompt=prompt,
            ends=self._eos.union(sampling.stop_token_ids),
            bad_words=spell(self._vocabulary, sampling.bad_words),
            vocab_size=self._vocabulary.num_tokens,
        )

    def _match(self, constraint: Constraint) -> tuple[Matcher | None, Enforcement, str]:
        """Return a matcher if there can be one, how much it keeps, and what is wrong with it."""
        try:
            matcher, kept = self._constraints.matcher(constraint)
        except ConstraintTooComplex as error:
            return None, "validated", f"The constraint cannot be enforced: {error}."
        return matcher, kept, "The schema uses keywords that cannot be enforced while generating."

    def _advance(self, answer: _Answer, token: int) -> Result | None:
        """Take a sequence's next token; return its result if that token was the last."""
        if token < 0:
            return self._fail(answer, token)
        answer.said.append(token)
        answer.track.tokens.append(token)
        if answer.row.adjustment is not None:
            answer.row.adjustment.note(token)
        if token in self._eos and not answer.ignores_eos:
            return self._end(answer, "stop", said=answer.said[:-1])
        matcher = answer.row.matcher
        if matcher is not None:
            if not matcher.advance(token):
                # The library gave up on this state; the answer is validated in the end anyway.
                answer.row.matcher = None
                answer.constraint = "validated"
            elif matcher.is_finished() and matcher.is_accepting():
                # Nothing but the end can follow: no step is spent on it.
                return self._end(answer, "stop")
        stops = answer.stops
        if stops is not None and stops.found(answer.said):
            return self._end(answer, "stop", text=stops.text)
        is_stop = token in answer.stop_tokens
        if is_stop or len(answer.said) >= answer.max_tokens:
            return self._end(answer, "stop" if is_stop else "length")
        return None

    def _fail(self, answer: _Answer, token: int) -> Result:
        if token == rows.NO_CHOICE and answer.row.matcher is not None:
            # The constraint leads nowhere from here; its validation says what is missing.
            return self._end(answer, "stop")
        return self._end(
            answer,
            "stop",
            error=LineError(
                code="numerical_error",
                message="The model's logits are not numbers; the prompt may overflow this "
                "precision.",
                status_code=500,
            ),
        )

    def _end(
        self,
        answer: _Answer,
        reason: FinishReason,
        *,
        said: list[int] | None = None,
        text: str | None = None,
        error: LineError | None = None,
    ) -> Result:
        """Free a sequence's slot and return its result; `said` leaves out what is no text."""
        self._scheduler.end(answer.track, is_tainted=error is not None)
        if answer.closing is not None and answer.closing.has_cut:
            reason = "length"
        kept = answer.said if said is None else said
        if text is None:
            text = decode(self._vocabulary, kept, keeps_marks=answer.keeps_marks)
        return Result(
            id=answer.id,
            text=text,
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=answer.track.num_prompt,
                completion_tokens=len(answer.said),
                cached_tokens=answer.track.cached_tokens or 0,
            ),
            error=error,
            constraint=answer.constraint,
            logprobs=render_logprobs(
                answer.row.told[: len(kept)], self._constraint_tokenizer.decode_bytes
            ),
        )


def _in_time(answer: _Answer, token: int) -> int:
    """Return the token to take for the chosen one, so that the answer ends within its tokens."""
    if token < 0 or answer.closing is None or answer.row.matcher is None:
        return token
    said = answer.said
    return answer.closing.choose(said, token, num_left=answer.max_tokens - len(said))
