"""One step of all running sequences, over the paged cache and the scheduler of transformers.

Stands on private parts of transformers, which is why its version is pinned exactly.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import psutil
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.utils import stream_context

from engine.config import HfConfig
from engine.constraints import Mask
from engine.hf import rows
from engine.hf.weights import Loaded
from jobs.domain.errors import EngineOutOfMemory

_CACHE_SHARE_OF_CPU_MEMORY = 0.25


class Batch(msgspec.Struct, frozen=True):
    """What the next step computes: the sequences that get a token, in the order of their rows."""

    choosers: list[str]


class Stepper:
    """Holds the sequences on the device and moves all of them on by a step."""

    def __init__(self, loaded: Loaded, config: HfConfig) -> None:
        """Set up the cache.

        Raises:
            EngineOutOfMemory: there is no room for one.
        """
        self._model: Any = loaded.model
        try:
            manager = self._model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=config.page_tokens,
                    num_blocks=config.num_blocks or count_blocks(loaded, config),
                    max_batch_tokens=max(config.batch_tokens, config.slots),
                    max_requests_per_batch=config.slots,
                    use_async_batching=False,
                    use_cuda_graph=False,
                    max_memory_percent=0.9,
                    auto_switch_to_flash=False,
                ),
            )
            self._processor: ContinuousBatchProcessor = manager._create_batch_processor()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise EngineOutOfMemory(
                "There is no memory left for the cache; lower slots, batch_tokens or num_blocks."
            ) from error
        # Requests reach the scheduler from this thread; the processor's queues are not used.
        self._processor.input_queue = None
        self._processor.cancel_queue = None
        self.max_sequence_tokens = infer_max_single_request_tokens(self._processor.cache)
        self._cached: dict[str, int] = {}
        self._batch: list[Any] = []

    def add(self, key: str, prompt: list[int]) -> None:
        """Queue a sequence."""
        state = RequestState(request_id=key, initial_tokens=prompt, max_new_tokens=None)
        self._processor.scheduler.add_waiting_request(state)

    def cancel(self, key: str) -> None:
        """Drop a sequence, running or queued, before the next step."""
        self._processor.scheduler.set_request_cancellation(key)
        self._cached.pop(key, None)

    def end(self, key: str) -> None:
        """Free the cache of a sequence that has said everything."""
        state = self._processor.scheduler.active_requests.get(key)
        if state is not None:
            state.status = RequestStatus.FINISHED
        self._processor.scheduler.finish_request(key)
        self._processor.scheduler.block_new_requests = False

    def cached_tokens(self, key: str) -> int:
        """Return how many tokens of an ended sequence's prompt were found in the cache."""
        return self._cached.pop(key, 0)

    def reset(self) -> None:
        """Forget every sequence."""
        self._processor.reset()
        self._cached.clear()

    @torch.inference_mode()
    def prepare(self) -> Batch | None:
        """Choose who takes part in the next step, or return None if nobody can."""
        if not self._processor.prepare_next_batch():
            return None
        self._batch = self._processor.inputs_and_outputs.requests_in_batch
        return Batch([f.state.request_id for f in self._batch if f.has_new_token])

    @torch.inference_mode()
    def forward(self, choosers: Sequence[rows.Row], mask: Mask) -> list[int]:
        """Run the model and return the token that each row chose."""
        ios = self._processor.inputs_and_outputs
        runner = self._processor.model_runner
        data: Any = ios.get_model_kwargs(use_padding=False)
        if runner.supports_logits_to_keep(self._model):
            data["logits_to_keep"] = data["logits_indices"]
        with stream_context(ios.compute_stream):
            logits = self._model(**data).logits[0]
            if "logits_to_keep" not in data:
                logits = logits[data["logits_indices"]]
            if not choosers:
                return []
            chosen = rows.choose(logits[: len(choosers)].float(), choosers, mask)
            return chosen.tolist()

    def finish(self, chosen: list[int]) -> list[int]:
        """Hand every sequence its token; return them."""
        cache = self._processor.cache
        following = iter(chosen)
        for future in self._batch:
            state = future.state
            if future.has_new_token:
                token = next(following)
                state.status = RequestStatus.DECODING
                state.generated_tokens.append(token)
                state.tokens_to_process = [token]
            cache.mark_complete_blocks(state, future.complete_blocks)
        return chosen


def count_blocks(loaded: Loaded, config: HfConfig) -> int:
    """Return how many blocks of the cache to make.

    Never more than all slots at full context need. One block is a tensor of the model's dtype,
    [2 (key, value), num_layers, page_tokens, num_kv_heads, head_dim].

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
    if loaded.device.type == "cuda":
        free_bytes = int(torch.cuda.mem_get_info(loaded.device)[0] * 0.8)
    elif loaded.device.type == "mps":
        free_bytes = int(
            (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()) * 0.5
        )
    else:
        free_bytes = int(psutil.virtual_memory().available * _CACHE_SHARE_OF_CPU_MEMORY)
    fitting = free_bytes // block_bytes
    if fitting < 2:  # noqa: PLR2004 -- one to write and one to spare
        raise EngineOutOfMemory(
            f"The cache has room for {fitting} blocks of {config.page_tokens} tokens; use "
            "quantization nf4, a smaller model or a larger device."
        )
    per_sequence = -(-loaded.context_tokens // config.page_tokens) + 1
    return int(min(fitting, config.slots * per_sequence))
