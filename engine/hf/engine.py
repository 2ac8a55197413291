"""The continuous-batching loop behind the Engine protocol.

transformers brings the paged cache, the scheduler and prefix sharing; the loop is ours. It runs
in the thread of whoever iterates `generate`, one step at a time, so a request ends at exactly the
token that ends it, errors arrive where they belong, and nothing is polled. Requests are encoded,
and their constraints compiled, in a thread beside it.

    take -> prepare -> start -> [ schedule -> forward -> choose -> update ] -> Result
            (ahead)               one step, all running sequences
"""

import queue
import time
from collections.abc import Generator

import msgspec
import torch

from engine.adjusting import Adjustment
from engine.ahead import Ahead, Failure, drain
from engine.answers import refuse
from engine.base import Source
from engine.chat import PromptEncoder
from engine.closing import Closings
from engine.config import HfConfig
from engine.hf import rows, steps, tokens, weights
from engine.hf.exhaustion import is_out_of_memory
from engine.hf.pictures import Seer, Shown
from engine.matching import Masks, TokenizerConstraints
from engine.registry import describe_model
from engine.running import Answer, constrain, open_row
from engine.sampling import read_model_defaults, resolve_sampling
from engine.spelling import spell
from engine.tuning import Tuner, Tuning
from jobs.domain.errors import EngineDied, EngineMisconfigured, EngineOutOfMemory, InvalidLine
from jobs.domain.request import Capabilities, Request, SamplingParams
from jobs.domain.result import LineError, Result, Usage

_IDLE_SECONDS = 0.002
_ABORT_SECONDS = 0.25


class _Sequence(Answer):
    """One request on its way."""

    __slots__ = ("key", "num_prompt", "shown")

    key: str
    num_prompt: int
    shown: Shown | None


_Prepared = tuple[_Sequence, list[int]] | Result
"""A sequence and the tokens of its prompt, or the result of a request that cannot run."""


class HfEngine:
    """A transformers model that works on `num_slots` sequences at once."""

    def __init__(self, config: HfConfig, *, model: str | None = None) -> None:
        """Load the model.

        Args:
            model: the name clients use; unset, the configuration's.

        Raises:
            EngineMisconfigured: the model cannot be loaded as configured.
            EngineOutOfMemory: it does not fit.
        """
        self._config = config
        self._capabilities = describe_model(config, model or config.model)
        loaded = weights.load(config)
        self._loaded = loaded
        self._encoder = PromptEncoder(loaded.tokenizer, vocab_size=loaded.vocab_size)
        self._seer = (
            Seer(loaded.vision, device=loaded.device) if loaded.vision is not None else None
        )
        self._vocabulary = vocabulary = tokens.constraint_tokenizer(
            loaded.tokenizer, vocab_size=loaded.vocab_size, eos_tokens=loaded.eos_tokens
        )
        self._constraints = TokenizerConstraints(vocabulary, backend=config.asking.backend)
        self._closings = (
            Closings(vocabulary)
            if config.asking.close_early and config.asking.backend == "llguidance"
            else None
        )
        self._model_defaults = read_model_defaults(loaded.generation_config)
        self._eos = frozenset(loaded.eos_tokens)
        self._stepper: steps.Stepper | None = steps.Stepper(loaded, config)
        self._tuner: Tuner = self._stepper.tuner
        self._num_slots = self._stepper.max_slots
        self._masks = Masks(
            self._num_slots,
            self._constraints.num_words,
            is_beside=loaded.device.type != "cpu",
        )
        self._context_tokens = min(loaded.context_tokens, self._stepper.max_sequence_tokens)
        self._capabilities = msgspec.structs.replace(
            self._capabilities,
            # One sequence may have all of the cache.
            cache_tokens=self._stepper.max_sequence_tokens,
            num_slots=self._num_slots,
        )
        self._num_done = 0

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""
        return self._capabilities

    @property
    def num_slots(self) -> int:
        """How many sequences are generated at once, at most."""
        return self._num_slots

    @property
    def tuning(self) -> Tuning:
        """How many sequences and tokens a step has now; any thread may ask."""
        return self._tuner.report(cache_tokens=self._capabilities.cache_tokens)

    def progress(self) -> int:
        """Return the number of tokens and prefill steps so far; any thread may ask."""
        return self._num_done

    def count_tokens(self, request: Request) -> int:
        """Return the exact number of prompt tokens of a request.

        Raises:
            InvalidLine: the request cannot be turned into a prompt.
        """
        return len(self._encode(request)[0])

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters with every default filled in."""
        return resolve_sampling(request, self._config.defaults, self._model_defaults)

    def close(self) -> None:
        """Free the model and the cache."""
        self._stepper = None
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish."""
        stepper = self._stepper
        if stepper is None:
            raise EngineMisconfigured("The engine is closed.")
        live: dict[str, _Sequence] = {}
        try:
            yield from self._run(source, stepper, live)
        except torch.OutOfMemoryError as error:
            raise EngineOutOfMemory(
                f"The device ran out of memory with {len(live)} sequences; lower slots, "
                "batch_tokens or num_blocks."
            ) from error
        except (RuntimeError, ValueError, IndexError, KeyError, MemoryError) as error:
            raise EngineDied(
                f"A step failed ({type(error).__name__}) with {len(live)} sequences in flight.",
                suspects=frozenset(sequence.id for sequence in live.values()),
            ) from error
        finally:
            stepper.reset()

    def _run(
        self, source: Source, stepper: steps.Stepper, live: dict[str, _Sequence]
    ) -> Generator[Result]:
        ready: queue.SimpleQueue[_Prepared | Failure] = queue.SimpleQueue()
        is_open = True
        next_abort_at = time.monotonic() + _ABORT_SECONDS
        with Ahead(self._prepare, ready.put, num_slots=self._tuner.limit) as ahead:
            while is_open or live or ahead.pending:
                ahead.num_slots = self._tuner.limit
                if is_open and (room := ahead.room):
                    taken = source.take(room)
                    is_open = taken is not None
                    ahead.hand_over(taken or ())
                # What runs waits for nobody; when nothing does, the next that is ready is awaited.
                for one in drain(ready, 0 if live else _IDLE_SECONDS):
                    result = self._start(one, source, stepper, live, ahead)
                    if result is not None:
                        ahead.forget(result.id)
                        yield result
                if time.monotonic() >= next_abort_at:
                    next_abort_at = time.monotonic() + _ABORT_SECONDS
                    for sequence in [s for s in live.values() if source.is_aborted(s.id)]:
                        stepper.cancel(sequence.key)
                        del live[sequence.key]
                        ahead.forget(sequence.id)
                results = self._step(stepper, live) if live else None
                for result in results or ():
                    ahead.forget(result.id)
                    yield result
                if results is None and live:
                    time.sleep(_IDLE_SECONDS)

    def _start(
        self,
        prepared: _Prepared | Failure,
        source: Source,
        stepper: steps.Stepper,
        live: dict[str, _Sequence],
        ahead: Ahead[_Prepared],
    ) -> Result | None:
        """Queue a sequence that is ready; return the result of a request that cannot run."""
        if isinstance(prepared, Failure):
            prepared.surface()
        if isinstance(prepared, Result):
            ahead.receive(prepared.id)
            return prepared
        sequence, prompt = prepared
        ahead.receive(sequence.id)
        if source.is_aborted(sequence.id):
            ahead.forget(sequence.id)
        else:
            live[sequence.key] = sequence
            stepper.add(sequence.key, prompt, sequence.shown)
        return None

    def _step(self, stepper: steps.Stepper, live: dict[str, _Sequence]) -> list[Result] | None:
        """Move every running sequence on; return the results of those that ended.

        None if there is nothing that can be computed.
        """
        choosers: list[_Sequence] = []
        chosen: list[int] | None = None
        try:
            keys = stepper.prepare()
            if keys is None:
                return None
            choosers = [live[key] for key in keys]
            chosen = stepper.forward([sequence.row for sequence in choosers], self._masks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if chosen is None:  # here, where the error holds no memory any more
            return self._shrink(stepper, live)
        chosen = [sequence.in_time(token) for sequence, token in zip(choosers, chosen, strict=True)]
        stepper.finish(chosen)
        self._num_done += max(1, len(choosers))
        results: list[Result] = []
        for sequence, token in zip(choosers, chosen, strict=True):
            result = self._advance(sequence, token, stepper)
            may_jump = self._config.forced_tokens and sequence.row.num_logprobs is None
            if result is None and may_jump:
                result = self._jump(sequence, stepper)
            if result is not None:
                del live[sequence.key]
                results.append(result)
        return results

    def _shrink(self, stepper: steps.Stepper, live: dict[str, _Sequence]) -> list[Result]:
        """Go on with smaller steps; return the result of a request that is too large by itself."""
        for sequence in live.values():
            del sequence.row.told[len(sequence.said) :]
        self._num_done += 1
        key = stepper.shrink()
        if key is None:
            return []
        sequence = live.pop(key)
        stepper.cancel(key)
        return [
            Result(
                id=sequence.id,
                finish_reason="stop",
                usage=Usage(
                    prompt_tokens=sequence.num_prompt, completion_tokens=len(sequence.said)
                ),
                error=LineError(
                    code="out_of_memory",
                    message="The device has too little memory for this request alone: its prompt "
                    f"has {sequence.num_prompt} tokens, and its answer has {len(sequence.said)} "
                    "so far.",
                    status_code=500,
                ),
                constraint=sequence.constraint,
            )
        ]

    def _prepare(self, request: Request) -> _Prepared:
        """Return a sequence that can be queued; in the thread beside the engine's."""
        where = "messages" if request.messages is not None else "prompt"
        try:
            prompt, told, shown = self._encode(request)
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
        ends = self._eos.union(sampling.stop_token_ids)
        row = open_row(sampling, self._adjust(sampling, prompt, ends))
        held = constrain(
            request,
            row,
            constraints=self._constraints,
            closings=self._closings,
            refuses=self._config.asking.on_unsupported_schema == "refuse",
        )
        if isinstance(held, Result):
            return held
        sequence = _Sequence(
            request,
            sampling,
            max_tokens=room,
            row=row,
            tokenizer=self._loaded.tokenizer,
            held=held,
        )
        sequence.key = str(request.id)
        sequence.num_prompt = len(prompt)
        sequence.shown = shown
        return sequence, told

    def _encode(self, request: Request) -> tuple[list[int], list[int], Shown | None]:
        """Return a prompt as the model knows it, as its cache knows it, and its images.

        Raises:
            InvalidLine: the request cannot be turned into a prompt.
        """
        if not any(message.parts for message in request.messages or ()):
            prompt = self._encoder.encode(request)
            return prompt, prompt, None
        if self._seer is None:
            raise InvalidLine(
                "This model takes no images.",
                param="messages",
                error_code="unsupported_parameter",
            )
        return self._seer.show(request, self._encoder.encode(request))

    def _adjust(
        self, sampling: SamplingParams, prompt: list[int], ends: frozenset[int]
    ) -> Adjustment | None:
        """Return what changes the logits of an answer; None where nothing does."""
        if not Adjustment.is_needed(sampling):
            return None
        return Adjustment(
            sampling,
            prompt=prompt,
            ends=ends,
            bad_words=spell(self._loaded.tokenizer, sampling.bad_words),
            vocab_size=self._loaded.vocab_size,
        )

    def _advance(self, sequence: _Sequence, token: int, stepper: steps.Stepper) -> Result | None:
        """Take a sequence's next token; return its result if that token was the last."""
        ending = sequence.take(token, self._eos)
        if ending is None:
            return None
        return sequence.render(
            ending,
            self._loaded.tokenizer,
            bytes_of=self._vocabulary.decode_bytes,
            num_prompt=sequence.num_prompt,
            cached_tokens=stepper.end(sequence.key, is_tainted=ending.error is not None),
        )

    def _jump(self, sequence: _Sequence, stepper: steps.Stepper) -> Result | None:
        """Take the tokens that a constraint leaves no choice about, without a step for each.

        Each counts, and ends the answer, as one that was chosen.
        """
        matcher = sequence.row.matcher
        taken: list[int] = []
        for token in matcher.forced() if matcher is not None else ():
            rows.skip(sequence.row)
            result = self._advance(sequence, token, stepper)
            if result is not None:
                return result
            taken.append(token)
            if sequence.row.matcher is None:
                break  # the library gave up: what follows is the model's choice
        if taken:
            self._num_done += len(taken)
            stepper.append(sequence.key, taken)
        return None
