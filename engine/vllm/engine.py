"""vLLM's AsyncLLM behind the Engine protocol.

    the thread of `generate`         the thread "vllm-loop"           vLLM's own processes
    take, admit, decode  -- spawn -->  one task per request  -- ZMQ -->  scheduler, model
    Result  <------- queue -----------  final outputs only  <---------
                       ^---- what "engine-ahead" has encoded and constrained

vLLM keeps its queue; it is never given more than three times the sequences that it runs at once.
"""

import queue
import time
from collections import deque
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.hf
import msgspec
from vllm import SamplingParams as VllmSampling
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from engine.ahead import Ahead, Failure, drain
from engine.answers import refuse
from engine.base import Source
from engine.chat import PromptEncoder
from engine.config import VllmConfig
from engine.constraints import Enforcement
from engine.registry import describe_model, find_folder
from engine.sampling import read_model_defaults, resolve_sampling
from engine.tuning import Reason, Tuning
from engine.vllm import arguments
from engine.vllm.constraints import Constraints
from engine.vllm.hosting import Host
from engine.vllm.images import render
from engine.vllm.tokenizers import load_tokenizer
from jobs.domain.errors import InvalidLine
from jobs.domain.request import Capabilities, Request, SamplingParams
from jobs.domain.result import FinishReason, LineError, Result, TokenLogprob, Usage

if TYPE_CHECKING:
    import asyncio

_IDLE_SECONDS = 0.002
_STARVED_SECONDS = 0.01
_FULL_SECONDS = 0.05
_ABORT_SECONDS = 0.25
_SEED_BITS = 2**63 - 1
_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}


class _Running:
    """One request on its way through vLLM."""

    __slots__ = ("constraint", "num_prompt", "params", "prompt", "request", "task")

    def __init__(
        self,
        request: Request,
        num_prompt: int,
        prompt: Any,  # noqa: ANN401 -- vLLM's
        params: VllmSampling,
        constraint: Enforcement | None,
    ) -> None:
        self.request = request
        self.num_prompt = num_prompt
        self.prompt = prompt
        self.params = params
        self.constraint = constraint
        self.task: asyncio.Task[None] | None = None


_Output = tuple[_Running, Any]
_Prepared = _Running | Result
_Events = queue.SimpleQueue[_Output | _Prepared | Failure]


class VllmEngine:
    """A model in vLLM that works on `num_slots` sequences at once."""

    def __init__(self, config: VllmConfig, *, model: str | None = None) -> None:
        """Start vLLM and load the model.

        Args:
            model: the name clients use; unset, the configuration's.

        Raises:
            EngineMisconfigured: the model cannot be loaded as configured.
            EngineOutOfMemory: it does not fit.
            EngineDied: vLLM's processes did not find each other; a new start may do better.
        """
        self._config = config
        self._capabilities = describe_model(config, model or config.model)
        folder = find_folder(config)
        wanted = arguments.engine_arguments(config, folder)
        arguments.check_weights(config, wanted)
        self._tokenizer = tokenizer = load_tokenizer(config, folder)
        self._adapter = (
            LoRARequest(lora_name=self._capabilities.model, lora_int_id=1, lora_path=config.adapter)
            if config.adapter is not None
            else None
        )
        generation_config = arguments.read_object(folder / "generation_config.json")
        self._model_defaults = read_model_defaults(generation_config)
        ends = generation_config.get("eos_token_id")
        self._eos = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self._constraints = Constraints(config.asking)
        self._spelling: llguidance.LLTokenizer | None = None
        self._num_done = 0
        self._host = Host(wanted, model=config.model)
        described = self._host.llm.vllm_config
        self._context_tokens = int(described.model_config.max_model_len)
        self._is_gpu = described.device_config.device_type != "cpu"
        self._num_slots = int(described.scheduler_config.max_num_seqs)
        self._batch_tokens = int(described.scheduler_config.max_num_batched_tokens)
        cache = described.cache_config
        self._cache_tokens = int(cache.num_gpu_blocks or 0) * int(cache.block_size or 0)
        self._capabilities = msgspec.structs.replace(
            self._capabilities, num_slots=self._num_slots, cache_tokens=self._cache_tokens
        )
        self._encoder = PromptEncoder(
            tokenizer, vocab_size=int(described.model_config.get_vocab_size())
        )

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
        """How many sequences vLLM is given now; any thread may ask."""
        config = self._config
        bound = self._bound()
        slots_by: Reason = "memory" if self._is_gpu else "device"
        if config.slots is not None:
            slots_by = "asked"
        elif bound < self._num_slots:
            slots_by = "evictions"
        batch_tokens_by: Reason = "device" if self._is_gpu else "engine"
        return Tuning(
            slots=bound,
            max_slots=self._num_slots,
            slots_by=slots_by,
            batch_tokens=self._batch_tokens,
            batch_tokens_by="asked" if config.batch_tokens is not None else batch_tokens_by,
            cache_tokens=self._cache_tokens,
            num_evictions=self._host.steps.fitting.num_evictions
            if self._host.steps is not None
            else 0,
        )

    def _bound(self) -> int:
        """Return how many sequences the cache holds, as far as that is known and matters."""
        steps = self._host.steps
        if self._config.slots is not None or not self._config.tune or steps is None:
            return self._num_slots
        return steps.fitting.bound

    def _most_inside(self) -> int:
        """Return how many requests vLLM may have: a queue behind its slots, unless they thrash."""
        bound = self._bound()
        return 3 * bound if bound >= self._num_slots else bound

    def progress(self) -> int:
        """Return the number of vLLM's steps and of answers so far; any thread may ask."""
        return self._num_done + self._host.num_steps

    def count_tokens(self, request: Request) -> int:
        """Return the exact number of prompt tokens of a request.

        Raises:
            InvalidLine: the request cannot be turned into a prompt.
        """
        return len(self._encode(request)[0])

    def _encode(self, request: Request) -> tuple[list[int], Any]:
        """Return the tokens of a prompt, and the prompt as vLLM takes it.

        Raises:
            InvalidLine: the request cannot be turned into one.
            EngineMisconfigured: the engine is closed.
        """
        return render(self._host.llm, self._host.loop, request, self._encoder.encode(request))

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters with every default filled in."""
        return resolve_sampling(request, self._config.defaults, self._model_defaults)

    def close(self) -> None:
        """End vLLM's processes; may be called twice."""
        self._host.close()

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish.

        Raises:
            EngineDied: vLLM ended; `suspects` were in its hands.
            EngineOutOfMemory: it ended because memory ran out.
        """
        llm = self._host.llm
        live: dict[int, _Running] = {}
        events: _Events = queue.SimpleQueue()
        try:
            with self._host.watching(live):
                yield from self._run(source, llm, live, events)
        finally:
            self._abort(live.values())

    def _run(
        self, source: Source, llm: AsyncLLM, live: dict[int, _Running], events: _Events
    ) -> Generator[Result]:
        is_open = True
        next_abort_at = time.monotonic() + _ABORT_SECONDS
        ready: deque[_Running] = deque()
        with Ahead(self._prepare, events.put, num_slots=self._bound()) as ahead:
            while is_open or live or ready or ahead.pending:
                ahead.num_slots = self._bound()
                wait = _FULL_SECONDS
                if is_open and (room := ahead.room):
                    taken = source.take(room)
                    is_open = taken is not None
                    ahead.hand_over(taken or ())
                    if is_open and not taken:
                        wait = _STARVED_SECONDS if live else _IDLE_SECONDS
                if time.monotonic() >= next_abort_at:
                    next_abort_at = time.monotonic() + _ABORT_SECONDS
                    aborted = [r for r in live.values() if source.is_aborted(r.request.id)]
                    self._abort(aborted)
                    for running in aborted:
                        del live[running.request.id]
                        ahead.forget(running.request.id)
                happened = drain(events, wait)
                _receive(happened, ready, ahead)
                for result in self._finish(happened, live):
                    ahead.forget(result.id)
                    yield result
                started = self._admit(ready, source, live, ahead)
                if started:
                    self._host.loop.call_soon_threadsafe(self._spawn, started, llm, events)

    def _admit(
        self,
        ready: deque[_Running],
        source: Source,
        live: dict[int, _Running],
        ahead: Ahead[_Prepared],
    ) -> list[_Running]:
        """Take out of what is ready as much as vLLM may have."""
        started: list[_Running] = []
        most = self._most_inside()
        while ready and len(live) < most:
            running = ready.popleft()
            if source.is_aborted(running.request.id):
                ahead.forget(running.request.id)
            else:
                live[running.request.id] = running
                started.append(running)
        return started

    def _finish(
        self, happened: list[_Output | _Prepared | Failure], live: dict[int, _Running]
    ) -> Generator[Result]:
        """Yield the results of what ended, and of what cannot run."""
        for one in happened:
            if isinstance(one, Result):
                yield one
            elif isinstance(one, tuple):
                running, output = one
                if live.get(running.request.id) is running:
                    if isinstance(output, EngineDeadError):
                        raise output
                    del live[running.request.id]
                    self._num_done += 1
                    yield self._end(running, output)

    def _prepare(self, request: Request) -> _Prepared:
        """Return what vLLM is to be asked, or the result of a request that cannot run.

        In the thread beside the engine's.
        """
        where = "messages" if request.messages is not None else "prompt"
        try:
            prompt, given = self._encode(request)
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
        if len(prompt) >= self._cache_tokens:
            return refuse(
                request,
                "context_length_exceeded",
                f"The prompt has {len(prompt)} tokens, and the engine's cache holds "
                f"{self._cache_tokens}.",
                param=where,
            )
        sampling = self.resolve_sampling(request)
        kept: Enforcement | None = None
        structured = None
        if request.constraint is not None:
            structured, kept, complaint = self._constraints.prepare(request.constraint)
            if kept != "enforced" and self._config.asking.on_unsupported_schema == "refuse":
                return refuse(request, "schema_unsupported", complaint, param="response_format")
        most = min(room, sampling.max_tokens or room)
        params = VllmSampling(
            max_tokens=most,
            temperature=sampling.temperature or 0.0,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            top_k=sampling.top_k or 0,
            # vLLM reads -1 as no seed.
            seed=None if sampling.seed is None else sampling.seed & _SEED_BITS,
            stop=list(sampling.stop) or None,
            # A constraint says where the answer ends; its end is an end-of-sequence token.
            ignore_eos=sampling.ignore_eos and request.constraint is None,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            min_p=sampling.min_p or 0.0,
            min_tokens=min(sampling.min_tokens, most),  # more would be refused
            logit_bias=dict(sampling.logit_bias) or None,
            stop_token_ids=list(sampling.stop_token_ids) or None,
            bad_words=list(sampling.bad_words) or None,
            logprobs=sampling.logprobs,
            structured_outputs=structured,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Text is made once, in the end, unless it has to be watched for a stop string.
            detokenize=bool(sampling.stop),
            skip_special_tokens=request.tools is None,
            skip_clone=True,
        )
        return _Running(request, len(prompt), given, params, kept)

    def _decode(self, said: list[int], *, keeps_marks: bool) -> str:
        if keeps_marks and said and said[-1] in self._eos:
            del said[-1]
        text: str = self._tokenizer.backend_tokenizer.decode(
            said, skip_special_tokens=not keeps_marks
        )
        return text

    def _end(self, running: _Running, output: Any) -> Result:  # noqa: ANN401 -- vLLM's
        """Return the result of a request that vLLM has finished with."""
        request = running.request
        if isinstance(output, Exception):
            return Result(
                id=request.id,
                error=LineError(
                    code="engine_error",
                    message=f"vLLM refused the request ({type(output).__name__}).",
                    status_code=500,
                ),
                constraint=running.constraint,
            )
        answer = output.outputs[0]
        reason = _REASONS.get(answer.finish_reason)
        said = list(answer.token_ids)
        if isinstance(answer.stop_reason, int):
            del said[-1]  # it is no text, as where vLLM itself watches for a stop string
        return Result(
            id=request.id,
            text=answer.text
            if running.params.detokenize
            else self._decode(said, keeps_marks=request.tools is not None),
            finish_reason=reason or "stop",
            usage=Usage(
                prompt_tokens=running.num_prompt,
                completion_tokens=len(answer.token_ids),
                cached_tokens=max(0, output.num_cached_tokens or 0),
            ),
            error=None
            if reason is not None
            else LineError(
                code="engine_error",
                message=f"vLLM ended the request early ({answer.finish_reason}).",
                status_code=500,
            ),
            constraint=running.constraint,
            logprobs=self._spell(answer, running.params.logprobs),
        )

    def _spell(self, answer: Any, num_logprobs: int | None) -> tuple[TokenLogprob, ...]:  # noqa: ANN401
        """Return how likely each token of the answer's text was."""
        if num_logprobs is None or answer.logprobs is None:
            return ()
        if self._spelling is None:
            self._spelling = llguidance.hf.from_tokenizer(self._tokenizer)
        spelled = self._spelling.decode_bytes
        said = list(answer.token_ids)
        if said and said[-1] in self._eos:
            del said[-1]
        found: list[TokenLogprob] = []
        for token, known in zip(said, answer.logprobs, strict=False):
            # vLLM adds the chosen token to the likeliest where it is none of them.
            ranked = sorted(known, key=lambda one: -known[one].logprob)[:num_logprobs]
            likeliest = tuple((spelled([one]), float(known[one].logprob)) for one in ranked)
            found.append(TokenLogprob(spelled([token]), float(known[token].logprob), likeliest))
        return tuple(found)

    # --- in the loop's thread ---

    def _spawn(self, started: list[_Running], llm: AsyncLLM, events: _Events) -> None:
        for running in started:
            running.task = self._host.loop.create_task(self._serve(running, llm, events))

    async def _serve(self, running: _Running, llm: AsyncLLM, events: _Events) -> None:
        output: Any = None
        try:
            async for part in llm.generate(
                running.prompt,
                running.params,
                str(running.request.id),
                lora_request=self._adapter,
            ):
                output = part
        except VLLMValidationError as error:
            if self._give_up_constraint(running):
                await self._serve(running, llm, events)
                return
            output = error
        except Exception as error:  # noqa: BLE001 -- it becomes the request's result
            output = error
        events.put((running, output))

    def _give_up_constraint(self, running: _Running) -> bool:
        """Leave a constraint that vLLM refuses to validation; False where nothing can be left."""
        if (
            running.params.structured_outputs is None
            or self._config.asking.on_unsupported_schema == "refuse"
        ):
            return False
        running.params.structured_outputs = None
        running.constraint = "validated"
        return True

    def _abort(self, aborted: Iterable[_Running]) -> None:
        """Make vLLM drop requests, and wait until it knows."""
        self._host.cancel([running.task for running in aborted if running.task is not None])


def _receive(
    happened: list[_Output | _Prepared | Failure],
    ready: deque[_Running],
    ahead: Ahead[_Prepared],
) -> None:
    """Take what has been prepared; what cannot run stays for whoever yields results."""
    for one in happened:
        if isinstance(one, Failure):
            one.surface()
        if isinstance(one, Result):
            ahead.receive(one.id)
        elif isinstance(one, _Running):
            ahead.receive(one.request.id)
            ready.append(one)
