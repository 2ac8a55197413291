"""Embeds and scores texts with a transformers encoder, many sequences of about one length at once.

    take -> encode -> sort by length -> [ forward -> pool -> normalize ] -> Result
                                          one batch of `batch_tokens`, padding included

Source: the files `modules.json` and `*_Pooling/config.json` of sentence-transformers.
"""

import inspect
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from engine.base import Source
from engine.config import HfConfig
from engine.encoders import PoolingMode, read_pooling_settings
from engine.hf import weights
from engine.hf.exhaustion import is_out_of_memory, release
from engine.pooled import Part, Parting, PoolingEngine
from engine.registry import describe_model, find_folder
from jobs.domain.errors import EngineDied, EngineMisconfigured
from jobs.domain.request import Capabilities
from jobs.domain.result import LineError, Result

_IDLE_SECONDS = 0.002
_AHEAD_BATCHES = 4
_SLOTS = 64
_CPU_TOKENS, _GPU_TOKENS = 2048, 32_768
"""In a batch, where nobody says: a processor is busy with few, a GPU wants many."""
_PADDING = 8
"""Sequences are padded to a multiple of so many tokens."""


class HfPoolingEngine(PoolingEngine):
    """A transformers encoder that embeds texts and scores pairs."""

    def __init__(self, config: HfConfig, *, model: str | None = None) -> None:
        """Load the model.

        Args:
            model: the name clients use; unset, the configuration's.

        Raises:
            EngineMisconfigured: the model cannot be loaded as configured.
            EngineOutOfMemory: it does not fit.
        """
        self._capabilities = describe_model(config, model or config.model)
        loaded = weights.load_encoder(config)
        self._model: Any = loaded.model
        self._pad = loaded.tokenizer.pad_token_id or 0
        backend = loaded.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._device = loaded.device
        self._scores = loaded.scores
        self._settings = read_pooling_settings(find_folder(config))
        context_tokens = self._capabilities.context_tokens
        self._parting = Parting(
            backend,
            scores=loaded.scores,
            context_tokens=context_tokens,
            vocab_size=loaded.vocab_size,
        )
        # A saved tokenizer need not name them, so the model is asked.
        self._takes_types = (
            "token_type_ids" in inspect.signature(self._model.forward).parameters
            and getattr(self._model.config, "type_vocab_size", 0) > 1
        )
        self._num_slots = config.slots or _SLOTS
        budget = config.batch_tokens or (_CPU_TOKENS if self._device.type == "cpu" else _GPU_TOKENS)
        self._batch_tokens = max(budget, context_tokens)
        self._num_done = 0

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""
        return self._capabilities

    @property
    def num_slots(self) -> int:
        """How many requests are worked on at once."""
        return self._num_slots

    def progress(self) -> int:
        """Return the number of batches so far; any thread may ask."""
        return self._num_done

    def close(self) -> None:
        """Free the model."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish."""
        if self._model is None:
            raise EngineMisconfigured("The engine is closed.")
        waiting: list[Part] = []
        is_open = True
        while is_open or waiting:
            if is_open and len(waiting) < _AHEAD_BATCHES * self._num_slots:
                taken = source.take(self._num_slots)
                is_open = taken is not None
                for request in taken or ():
                    parts = self._parting.encode(request)
                    if isinstance(parts, Result):
                        yield parts
                    else:
                        waiting += parts
                if is_open and not waiting:
                    time.sleep(_IDLE_SECONDS)
            waiting = [part for part in waiting if not source.is_aborted(part.held.request_id)]
            if waiting:
                yield from self._step(waiting)

    def _step(self, waiting: list[Part]) -> Iterator[Result]:
        """Run one batch, taken out of `waiting`; yield the requests that it completed."""
        batch = self._choose(waiting)
        vectors: torch.Tensor | None = None
        try:
            vectors = self._forward(batch)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise self._died(error, batch) from error
        if vectors is None:  # here, where the error holds no memory any more
            release(self._device)
            if len(batch) > 1:
                # As many sequences of this length as half of the batch had.
                width = _padded(max(len(part.ids) for part in batch))
                self._batch_tokens = width * (len(batch) // 2)
                return
            held = batch[0].held
            waiting[:] = [part for part in waiting if part.held is not held]
            self._num_done += 1
            yield Result(
                id=held.request_id,
                error=LineError(
                    code="out_of_memory",
                    message=f"The device has too little memory for a text of {len(batch[0].ids)} "
                    "tokens.",
                    status_code=500,
                ),
            )
            return
        chosen = {id(part) for part in batch}
        waiting[:] = [part for part in waiting if id(part) not in chosen]
        self._num_done += 1
        for part, vector in zip(batch, vectors, strict=True):
            if part.held.receive(part.number, vector.numpy()):
                yield self._parting.conclude(part.held)

    def _died(self, error: Exception, batch: Sequence[Part]) -> EngineDied:
        return EngineDied(
            f"A step failed ({type(error).__name__}) with {len(batch)} sequences in flight.",
            suspects=frozenset(part.held.request_id for part in batch),
        )

    def _choose(self, waiting: list[Part]) -> list[Part]:
        """Return the oldest sequence and those of about its length, as many as fit in a batch."""
        ordered = sorted(waiting, key=lambda part: len(part.ids))
        first = last = ordered.index(waiting[0])
        while True:
            room = self._batch_tokens // _padded(len(ordered[min(last + 1, len(ordered) - 1)].ids))
            if last + 1 < len(ordered) and last + 1 - first < room:
                last += 1
            elif first and last + 1 - first < self._batch_tokens // _padded(len(ordered[last].ids)):
                first -= 1
            else:
                return ordered[first : last + 1]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Part]) -> torch.Tensor:
        """Return what the model makes of each sequence: [len(batch), size] in float32."""
        width = _padded(max(len(part.ids) for part in batch))
        ids = torch.full((len(batch), width), self._pad, dtype=torch.int64)
        mask = torch.zeros((len(batch), width), dtype=torch.int64)
        types = torch.zeros((len(batch), width), dtype=torch.int64)
        for row, part in enumerate(batch):
            ids[row, : len(part.ids)] = torch.tensor(part.ids)
            types[row, : len(part.types)] = torch.tensor(part.types)
            mask[row, : len(part.ids)] = 1
        given = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            given["token_type_ids"] = types
        output = self._model(**{name: value.to(self._device) for name, value in given.items()})
        if self._scores:
            logits: torch.Tensor = output.logits.float().cpu()
            return logits
        hidden = output.last_hidden_state.float()
        pooled = pool(hidden, mask.to(self._device), self._settings.mode)
        if self._settings.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return pooled.cpu()


def pool(hidden: torch.Tensor, mask: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    """Return one vector for each sequence.

    Args:
        hidden: [sequences, tokens, size].
        mask: [sequences, tokens]; 0 where there is only padding, which stands behind the tokens.
    """
    if mode == "cls":
        return hidden[:, 0]
    if mode == "last":
        return hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]
    spread = mask.unsqueeze(-1)
    if mode == "max":
        return hidden.masked_fill(spread == 0, -torch.inf).amax(dim=1)
    return (hidden * spread).sum(dim=1) / spread.sum(dim=1)


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // _PADDING) * _PADDING
