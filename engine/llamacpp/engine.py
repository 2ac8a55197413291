"""The continuous-batching loop over llama.cpp, behind the Engine protocol.

It runs in the thread of whoever iterates `generate`, one step at a time, as that of the hf engine:
llama.cpp computes, and which tokens, what is chosen and what ends an answer is decided here.

    take -> encode -> [ plan -> step -> choose -> advance ] -> Result
                        one step, all running sequences
"""

import time
from collections.abc import Generator, Sequence

import msgspec
import numpy as np

from engine.adjusting import Adjustment
from engine.answers import refuse
from engine.base import Source
from engine.chat import PromptEncoder
from engine.closing import Closings
from engine.config import LlamacppConfig
from engine.gguf import Gguf, read
from engine.llamacpp import library, rows
from engine.llamacpp.describe import describe_gguf, read_defaults
from engine.llamacpp.schedule import Scheduler, Track
from engine.llamacpp.tokenizer import Vocabulary
from engine.matching import TokenizerConstraints
from engine.running import Answer, constrain, open_row
from engine.sampling import resolve_sampling
from engine.spelling import spell
from jobs.domain.errors import EngineDied, EngineMisconfigured, EngineOutOfMemory, InvalidLine
from jobs.domain.request import Capabilities, Request, SamplingParams
from jobs.domain.result import Result

_IDLE_SECONDS = 0.002
_ABORT_SECONDS = 0.25
_ADMIT_AT_ONCE = 8
_ALLOCATION_FAILED = -2


class _Answer(Answer):
    """One request on its way, and where it stands in the cache."""

    __slots__ = ("track",)

    track: Track


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
            result = self._advance(answer, answer.in_time(token))
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
        row = open_row(sampling, self._adjust(sampling, prompt))
        held = constrain(
            request,
            row,
            constraints=self._constraints,
            closings=self._closings,
            refuses=self._config.asking.on_unsupported_schema == "refuse",
        )
        if isinstance(held, Result):
            return held
        answer = _Answer(
            request,
            sampling,
            max_tokens=room,
            row=row,
            tokenizer=self._vocabulary,
            held=held,
        )
        answer.track = Track(prompt)
        return answer

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

    def _advance(self, answer: _Answer, token: int) -> Result | None:
        """Take a sequence's next token; return its result if that token was the last."""
        track = answer.track
        if token >= 0:
            track.tokens.append(token)
        ending = answer.take(token, self._eos)
        if ending is None:
            return None
        self._scheduler.end(track, is_tainted=ending.error is not None)
        return answer.render(
            ending,
            self._vocabulary,
            bytes_of=self._constraint_tokenizer.decode_bytes,
            num_prompt=track.num_prompt,
            cached_tokens=track.cached_tokens or 0,
        )
