"""One step of all running sequences, over the paged cache and the scheduler of transformers.

Stands on private parts of transformers, which is why its version is pinned exactly.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import psutil
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
    compute_block_hash,
)
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import stream_context
from typing_extensions import override

from engine.config import HfConfig
from engine.hf import paged, pictures, rows
from engine.hf.exhaustion import is_out_of_memory, release
from engine.hf.weights import Loaded
from engine.matching import Masks
from engine.running import Row
from engine.tuning import DeviceKind, Part, Room, Start, Tuner, choose_hf
from jobs.domain.errors import EngineMisconfigured, EngineOutOfMemory

_CACHE_SHARE_OF_CPU_MEMORY = 0.25
_LEAST_CACHE_TOKENS = 128
"""A smaller cache is none: few requests would find room in it."""


class _Scheduler(FIFOScheduler):
    """Lets requests that begin alike wait for the first of them; notes what the cache held.

    A block can be shared once the step that computes it has ended, so of siblings admitted in one
    step each would compute the same blocks. All but one stay queued until the blocks they share
    are there; others take their places meanwhile.

    Attributes:
        limit: how many sequences may be on their way at once; those that are stay.
        part: who takes part in the next step.
        batch_tokens: the next step's token budget.
        num_queued: sequences that were queued since somebody set it to nothing.
    """

    limit: int
    part: Part = "all"
    batch_tokens: int
    num_queued = 0

    @override
    def reset(self) -> None:
        super().reset()
        self._cached_tokens: dict[str, int] = {}
        self._hashes: dict[str, list[int]] = {}

    def forget(self, key: str) -> int:
        """Drop what is known of a sequence; return how much of its prompt was found cached."""
        self._hashes.pop(key, None)
        return self._cached_tokens.pop(key, 0)

    @override
    def _infer_request_tokens(
        self, state: RequestState, request_ids_to_remove_from_waiting: set[str]
    ) -> list[int]:
        was_pending = state.status == RequestStatus.PENDING
        tokens = super()._infer_request_tokens(state, request_ids_to_remove_from_waiting)
        # A sequence that lost its blocks comes back with its answer as part of the prompt.
        if was_pending and state.position_offset and not state._true_initial_tokens:  # noqa: SLF001
            self._cached_tokens[state.request_id] = state.position_offset
        return tokens

    @override
    def _schedule_request(
        self,
        state: RequestState,
        request_tokens: list[int],
        token_budget: int,
        request_ids_to_remove_from_waiting: set[str],
    ) -> None:
        if state.status == RequestStatus.DECODING and len(request_tokens) > token_budget:
            # A known piece of an answer that goes in parts, as a long prompt does. Left as it is,
            # the first part would be computed again and again.
            state.status = RequestStatus.PREFILLING
        super()._schedule_request(
            state, request_tokens, token_budget, request_ids_to_remove_from_waiting
        )

    @override
    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        return super().schedule_batch(self.batch_tokens, cache_budget)

    @override
    def add_waiting_request(self, state: RequestState) -> None:
        super().add_waiting_request(state)
        self.num_queued += 1

    def requeue(self, state: RequestState) -> None:
        """Queue a sequence that was on its way, before all others."""
        key = state.request_id
        self._hashes.pop(key, None)  # its answer is a part of its prompt now
        self.waiting_requests[key] = state.create_equivalent_initial_request()
        self.waiting_requests_order.appendleft(key)

    @override
    def _process_candidates(
        self,
        candidates: Iterable[RequestState],
        token_budget: int,
        cache_budget: int,
        request_ids_to_remove_from_waiting: set[str],
    ) -> tuple[list[FutureRequestState], bool, bool, int, int]:
        candidates = self._choose(candidates)
        if self.cache.use_prefix_sharing:
            candidates = self._hold_back(candidates)
        # They are gone through once, each before the next is asked for.
        return super()._process_candidates(
            cast("list[RequestState]", candidates),
            token_budget,
            cache_budget,
            request_ids_to_remove_from_waiting,
        )

    def _choose(self, candidates: Iterable[RequestState]) -> Iterator[RequestState]:
        """Leave out who is not of the step's part, and who would be one too many."""
        if self.part != "all":
            decoding = [state for state in candidates if state.status == RequestStatus.DECODING]
            yield from decoding[self.part == "odd" :: 1 if self.part == "decoding" else 2]
            return
        for state in candidates:
            # Those that wait come last, and one that was let in is active before the next.
            if (
                state.request_id not in self.active_requests
                and len(self.active_requests) >= self.limit
            ):
                return
            yield state

    def _hold_back(self, candidates: Iterable[RequestState]) -> Iterator[RequestState]:
        """Leave out who needs a block next that another one is about to compute.

        Whoever comes behind takes the place only where the cache has room for both: else the
        shared blocks would be gone when their turn comes.
        """
        (allocator,) = self.cache.cache_allocators.values()
        cached = allocator.ledger.hash_to_block
        page = allocator.tokens_per_page
        num_blocks = allocator.pool.count_free_blocks(allocator.index)
        num_blocks += len(self.cache.pool.free_sectors) * allocator.blocks_per_sector
        num_blocks += len(allocator.ledger.cached_blocks)  # given up when somebody needs them
        reserved = 0
        coming: set[int] = set()
        for state in candidates:
            if state.status == RequestStatus.DECODING:
                yield state
                continue
            hashes = self._hashes.get(state.request_id)
            if hashes is None:
                hashes = self._hashes[state.request_id] = _hash_blocks(state.initial_tokens, page)
            missing = [one for one in hashes if one not in cached]
            needed = len(missing) + 1
            if state.status == RequestStatus.PENDING and not state.is_cpu_offloaded:
                if missing and missing[0] in coming:
                    reserved += needed - sum(one in coming for one in missing)
                    continue
                if reserved and needed > num_blocks - reserved:
                    return
            yield state
            if state.request_id in self.active_requests:
                coming.update(missing)
                num_blocks -= needed


def _hash_blocks(prompt: list[int], page: int) -> list[int]:
    """Return the hashes that the cache will know the whole blocks of a prompt by."""
    hashes: list[int] = []
    for start in range(0, len(prompt) - page + 1, page):
        parent = hashes[-1] if hashes else None
        hashes.append(compute_block_hash(parent, prompt[start : start + page]))
    return hashes


class Stepper:
    """Holds the sequences on the device and moves all of them on by a step."""

    def __init__(self, loaded: Loaded, config: HfConfig) -> None:
        """Set up the cache.

        Raises:
            EngineOutOfMemory: there is no room for one.
        """
        self._model: Any = loaded.model
        self._batch: list[Any] = []
        self._shown: dict[str, pictures.Shown] = {}
        self._device = loaded.device
        kinds = group_layers_by_attn_type(self._model.config.get_text_config())
        self._uses_own_attention = not config.flash_attention and paged.suits(
            loaded.model, list(kinds)
        )
        self._plain_attention: str = self._model.config._attn_implementation  # noqa: SLF001
        start = self._open(loaded, config)
        self.max_slots = start.max_slots
        self.tuner = Tuner(start, is_live=config.tune)
        self._clock = _clock_of(loaded)
        self._began_at = 0.0
        self._num_evicted = 0
        cache = self._processor.cache
        self._paged: paged.PagedInputs | None = None
        if self._uses_own_attention:
            self._paged = paged.PagedInputs(cache, device=loaded.device)
            self._processor.inputs_and_outputs = self._paged
        self.max_sequence_tokens = infer_max_single_request_tokens(cache)

    def _open(self, loaded: Loaded, config: HfConfig) -> Start:
        """Make the largest cache that there is memory for, and return what to begin with.

        Half of it is tried where the device says no, and so on.

        Raises:
            EngineOutOfMemory: there is no room for one.
        """
        masks_cache = not (self._uses_own_attention or config.flash_attention)
        most: int | None = None
        while True:
            start, num_blocks = choose_start(
                loaded, config, masks_cache=masks_cache, most_blocks=most
            )
            why: BaseException | None = None
            try:
                try:
                    self._processor = self._make(config, start, num_blocks)
                except MemoryError:
                    # transformers reckons with copies that this attention does not make; where
                    # it says no, let it choose.
                    self._processor = self._make(config, start, None)
            except (MemoryError, ValueError, RuntimeError) as error:
                if not isinstance(error, ValueError) and not is_out_of_memory(error):
                    raise
                why = error.with_traceback(None)
            if why is None:
                return start
            release(loaded.device)
            most = num_blocks // 2
            least = min(loaded.context_tokens, _LEAST_CACHE_TOKENS) // config.page_tokens + 1
            if isinstance(why, ValueError) or most < max(2, least):
                raise EngineOutOfMemory(
                    "There is no memory left for the cache; lower slots, batch_tokens or "
                    "num_blocks."
                ) from why

    def _make(self, config: HfConfig, start: Start, num_blocks: int | None) -> Any:  # noqa: ANN401
        if self._uses_own_attention:
            # What an attempt that failed left behind is none that transformers begins with.
            self._model.set_attn_implementation(self._plain_attention)
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=config.page_tokens,
                num_blocks=num_blocks,
                # What its own inputs have room for, a mask of all the cache for each among them;
                # this attention has inputs of its own, and the scheduler a budget of its own.
                max_batch_tokens=start.max_slots
                if self._uses_own_attention
                else start.max_batch_tokens,
                max_requests_per_batch=start.max_slots,
                max_memory_percent=0.9,
                scheduler_type="batchctl",
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        if self._uses_own_attention:
            self._model.set_attn_implementation(paged.IMPLEMENTATION)
        return manager._create_batch_processor()  # noqa: SLF001 -- the manager's thread is not used

    @property
    def _scheduler(self) -> _Scheduler:
        scheduler: _Scheduler = self._processor.scheduler
        return scheduler

    def add(self, key: str, prompt: list[int], shown: pictures.Shown | None = None) -> None:
        """Queue a sequence; `shown` are the images of its prompt.

        Raises:
            EngineMisconfigured: this attention takes no images.
        """
        if shown is not None:
            if self._paged is None:
                raise EngineMisconfigured(
                    "The attention of this model's language model takes no images here; serve it "
                    "with vLLM."
                )
            self._shown[key] = shown
        self._scheduler.add_waiting_request(
            RequestState(request_id=key, initial_tokens=prompt, max_new_tokens=None)
        )

    def cancel(self, key: str) -> None:
        """Drop a sequence, running or queued, before the next step."""
        self._scheduler.set_request_cancellation(key)
        self._shown.pop(key, None)
        self._scheduler.forget(key)
        # Offloading blocks new sequences until one ends; this one may have been the last to.
        self._scheduler.block_new_requests = False

    def end(self, key: str, *, is_tainted: bool = False) -> int:
        """Free the cache of a sequence; return how much of its prompt was found there.

        Args:
            is_tainted: its cache holds what is not a number, so it must not be used again.
        """
        scheduler = self._scheduler
        self._shown.pop(key, None)
        if is_tainted and self._paged is not None:
            self._paged.purge(key)
        state = scheduler.active_requests.get(key)
        if state is not None:
            state.status = RequestStatus.FINISHED
        scheduler.finish_request(key)
        if is_tainted:
            self._processor.cache.evict_cached_blocks()
        scheduler.block_new_requests = False
        return scheduler.forget(key)

    def reset(self) -> None:
        """Forget every sequence."""
        self._shown.clear()
        self._processor.reset()

    @torch.inference_mode()
    def prepare(self) -> list[str] | None:
        """Choose who takes part in the next step.

        Returns:
            the sequences that will get a token, in the order of their rows; None if there is
            nothing that can be computed.
        """
        scheduler, tuner = self._scheduler, self.tuner
        scheduler.part, scheduler.limit = tuner.next_part(), tuner.limit
        scheduler.batch_tokens, scheduler.num_queued = tuner.batch_tokens, 0
        self._began_at, self._batch = self._clock(), []
        if not self._processor.prepare_next_batch():
            tuner.skip()
            return None
        # Who was queued meanwhile gave its blocks to others.
        self._num_evicted = scheduler.num_queued
        self._batch = self._processor.inputs_and_outputs.requests_in_batch
        return [f.state.request_id for f in self._batch if f.has_new_token]

    @torch.inference_mode()
    def forward(self, choosers: Sequence[Row], masks: Masks) -> list[int]:
        """Run the model and return the token that each row chose."""
        rows.begin_masks(choosers, masks)
        inputs = self._processor.inputs_and_outputs
        keeps_logits = self._processor.model_runner.supports_logits_to_keep(self._model)
        with stream_context(inputs.compute_stream):
            if self._paged is None:
                data = inputs.get_model_kwargs(use_padding=False)
                last = data["logits_indices"][: len(choosers)]
            else:
                data = {
                    "input_ids": inputs.tokens,
                    "position_ids": inputs.positions,
                    "plan": inputs.plan,
                    "use_cache": False,
                }
                last = inputs.last_places
                if self._shown:
                    self._show(data)
            if keeps_logits:
                data["logits_to_keep"] = last
            logits = self._model(**data).logits[0]
            if not keeps_logits:
                logits = logits[last]
            if not choosers:
                return []
            chosen: list[int] = rows.choose(logits.float(), choosers, masks).tolist()
        for row in choosers:
            row.drawn = None
        return chosen

    def shrink(self) -> str | None:
        """Make the steps smaller, after one for which there was no memory.

        Every sequence is queued again, the oldest first. What the cache holds of them is found
        there again, so those that are let in before others need their blocks lose a page at most.

        Returns:
            the sequence of that step, if there was only one and a smaller step cannot be made.
        """
        scheduler = self._scheduler
        # Where the inputs of the step were too much, these are those that they were made of.
        batch = self._batch or self._processor.inputs_and_outputs.requests_in_batch
        batch = [one for one in batch if one.state.request_id in scheduler.active_requests]
        self._batch = []
        keys: list[str] = [one.state.request_id for one in batch]
        keys = keys or list(scheduler.active_requests)
        num_tokens = sum(future.query_length for future in batch) or self.tuner.batch_tokens
        self._processor.inputs_and_outputs.reset()
        for key, state in reversed(scheduler.active_requests.items()):
            self._processor.cache.free_blocks(key)
            scheduler.requeue(state)
        scheduler.active_requests.clear()
        scheduler.block_new_requests = False
        release(self._device)
        if self.tuner.shrink(num_rows=len(keys), num_tokens=num_tokens):
            return None
        if not keys:
            raise EngineOutOfMemory("The device has no memory left for a step of anything.")
        return keys[0]

    def _show(self, data: dict[str, Any]) -> None:
        """Give the model the images of a step, if it holds any, in the tokens' places."""
        embedded = pictures.embed(
            self._model.get_input_embeddings(), data["input_ids"], self._batch, self._shown
        )
        if embedded is not None:
            data["inputs_embeds"] = embedded
            del data["input_ids"]

    def finish(self, chosen: list[int]) -> None:
        """Hand every sequence its token."""
        cache = self._processor.cache
        following = iter(chosen)
        num_tokens = num_cached = 0
        for future in self._batch:
            state = future.state
            num_tokens += future.query_length
            num_cached += state.position_offset
            if future.has_new_token:
                token = next(following)
                state.status = RequestStatus.DECODING
                state.generated_tokens.append(token)
                state.tokens_to_process = [token]
            if future.complete_blocks:
                cache.mark_complete_blocks(state, future.complete_blocks)
        self.tuner.note(
            num_rows=len(chosen),
            num_tokens=num_tokens,
            num_cached=num_cached,
            num_waiting=len(self._scheduler.waiting_requests),
            num_evicted=self._num_evicted,
            seconds=self._clock() - self._began_at,
        )

    def append(self, key: str, tokens: Sequence[int]) -> None:
        """Give a sequence that has just got its token more of them, which are known already.

        They are computed with the next step, all at once.
        """
        state = self._scheduler.active_requests[key]
        state.generated_tokens.extend(tokens)
        state.tokens_to_process = [*state.tokens_to_process, *tokens]


def _clock_of(loaded: Loaded) -> Callable[[], float]:
    """Return what steps are timed by: this thread's own time where it does all of the work.

    What else the machine does then changes nothing.
    """
    is_alone = loaded.device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if is_alone else time.perf_counter


def choose_start(
    loaded: Loaded, config: HfConfig, *, masks_cache: bool, most_blocks: int | None = None
) -> tuple[Start, int]:
    """Return what to begin with, and how many blocks of the cache to make.

    One block is a tensor of the model's dtype, [2 (key, value), num_layers, page_tokens,
    num_kv_heads, head_dim].

    Args:
        masks_cache: as in Room.
        most_blocks: what the device has memory for, as far as was found out by trying.

    Raises:
        EngineOutOfMemory: not even one sequence fits.
    """
    text: Any = loaded.model.config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    itemsize = loaded.model.dtype.itemsize
    block_bytes = 2 * int(text.num_hidden_layers) * config.page_tokens * kv_heads * head_dim
    block_bytes *= itemsize
    # Beside its own bytes, a cached token costs a place in the step's index tensors.
    kind = cast("DeviceKind", loaded.device.type)
    if kind == "cuda":
        free_bytes = int(torch.cuda.mem_get_info(loaded.device)[0])
        cache_bytes = int(free_bytes * 0.8)
    elif kind == "mps":
        free_bytes = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        cache_bytes = int(free_bytes * 0.5)
    else:
        free_bytes = psutil.virtual_memory().available
        cache_bytes = int(free_bytes * _CACHE_SHARE_OF_CPU_MEMORY)
    page = config.page_tokens
    fitting = config.num_blocks or cache_bytes // block_bytes
    is_lowered = most_blocks is not None and most_blocks < fitting
    if most_blocks is not None:
        fitting = min(fitting, most_blocks)
    if fitting < 2 and config.num_blocks is None:  # noqa: PLR2004 -- one to write, one to spare
        raise EngineOutOfMemory(
            f"The cache has room for {fitting} blocks of {page} tokens; use quantization nf4, a "
            "smaller model or a larger device."
        )
    intermediate = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    start = choose_hf(
        Room(
            device=kind,
            cache_tokens=fitting * page,
            # A sequence ends within a page, and the next token may begin one.
            context_tokens=(-(-loaded.context_tokens // page) + 1) * page,
            step_bytes=(6 * int(text.hidden_size) + 3 * intermediate) * itemsize,
            free_bytes=free_bytes,
            masks_cache=masks_cache,
        ),
        slots=config.slots,
        batch_tokens=config.batch_tokens,
        is_cache_set=config.num_blocks is not None,
    )
    if is_lowered:
        start = replace(start, cache_tokens_by="memory")
    return start, start.cache_tokens // page


SCHEDULER_MAPPING["batchctl"] = _Scheduler
paged.register()
