"""One model and its cache in llama.cpp's hands: loading, steps, and what went wrong in words."""

import ctypes
import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp
import numpy as np

from engine.config import CacheDtype, LlamacppConfig
from engine.devices import read_memory
from engine.gguf import Gguf
from engine.llamacpp.rows import Logits
from engine.llamacpp.schedule import Placed
from jobs.domain.errors import EngineMisconfigured, EngineOutOfMemory

_CACHE_SHARE_OF_MEMORY = 0.25
_USUAL_SEQUENCE_TOKENS = 1024
"""How much of the cache each slot gets where nothing says, if the context is longer."""
_CACHE_TYPES: dict[CacheDtype, int] = {"float32": 0, "float16": 1, "bfloat16": 30}
"""As ggml numbers them; see `gguf.TENSOR_TYPES`."""
_LOAD_MODES = {
    (False, False): llama_cpp.LLAMA_LOAD_MODE_NONE,
    (True, False): llama_cpp.LLAMA_LOAD_MODE_MMAP,
    (False, True): llama_cpp.LLAMA_LOAD_MODE_MLOCK,
    (True, True): llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK,
}
_ERROR, _CONTINUED = 4, 5
_NO_MEMORY = ("failed to allocate", "unable to allocate", "out of memory", "cannot allocate")

NO_ROOM = 1
"""`Model.step` found no place in the cache; nothing has changed."""


_complaints: deque[str] = deque(maxlen=20)
_level = [0]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama_cpp is not where mypy runs
def _listen(level: int, text: bytes, _data: object) -> None:
    """Keep what llama.cpp complains of; all else that it says goes nowhere."""
    if level != _CONTINUED:
        _level[0] = level
    if _level[0] == _ERROR:
        _complaints.append(text.decode("utf-8", "replace").strip())


def _reason() -> str:
    """Return what llama.cpp complained of last, as the end of a message."""
    said = [line for line in _complaints if line]
    return f": {' '.join(said)[:400]}" if said else ""


class Model:
    """Weights, vocabulary, and a cache that all sequences share."""

    def __init__(self, config: LlamacppConfig, described: Gguf) -> None:
        """Load the file and make the cache.

        Raises:
            EngineMisconfigured: llama.cpp cannot load the model, or it is not one that generates.
            EngineOutOfMemory: the weights or a cache for one sequence do not fit.
        """
        llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _complaints.clear()
        self._context: Any = None
        self._model: Any = _load(config, described)
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.num_tokens = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        try:
            self._check_kind(config)
            self._open_context(config, described)
        except BaseException:
            self.close()
            raise
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._batch: Any = llama_cpp.llama_batch_init(step_tokens(config), 0, 1)
        self.cache_tokens = int(llama_cpp.llama_n_ctx(self._context))

    @property
    def can_share(self) -> bool:
        """Whether a part of one sequence's cache can serve another.

        The state of a recurrent model is one lump, of the whole sequence.
        """
        return not (
            llama_cpp.llama_model_is_recurrent(self._model)
            or llama_cpp.llama_model_is_hybrid(self._model)
        )

    def _check_kind(self, config: LlamacppConfig) -> None:
        if llama_cpp.llama_model_has_encoder(self._model) or not llama_cpp.llama_model_has_decoder(
            self._model
        ):
            raise EngineMisconfigured(
                f"{config.model} is a model that encodes; the llamacpp engine runs models that "
                "generate text."
            )
        if self.num_tokens < 1:
            raise EngineMisconfigured(f"{config.model} holds no vocabulary; convert it again.")

    def _open_context(self, config: LlamacppConfig, described: Gguf) -> None:
        wanted, least = _cache_sizes(config, described)
        while True:
            _complaints.clear()
            self._context = llama_cpp.llama_init_from_model(
                self._model, _context_params(config, wanted)
            )
            if self._context:
                return
            if wanted <= least or config.cache_tokens is not None:
                raise EngineOutOfMemory(
                    f"There is no memory for a cache of {wanted:,} tokens{_reason()}. Lower "
                    "cache_tokens, context_tokens or batch_tokens."
                )
            # A GPU's memory is not known beforehand.
            wanted = max(least, wanted // 2)

    def step(self, placed: Sequence[Placed]) -> int:
        """Compute these tokens, whose logits `logits` then has; return llama.cpp's verdict.

        0 is success and NO_ROOM no failure; anything else is one.
        """
        _complaints.clear()
        batch = self._batch
        for at, one in enumerate(placed):
            batch.token[at] = one.token
            batch.pos[at] = one.position
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = one.sequence
            batch.logits[at] = one.is_asked
        batch.n_tokens = len(placed)
        return int(llama_cpp.llama_decode(self._context, batch))

    def logits(self, num_rows: int) -> Logits:
        """Return the logits that the last step was asked for, in its order; valid until the next.

        The array is llama.cpp's own memory: whoever reads it may also write there.
        """
        found: Logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._context), shape=(num_rows, self.num_tokens)
        )
        return found

    def explain(self) -> str:
        """Return why the last step failed, as the end of a message; empty: it did not say."""
        return _reason()

    def keep(self, sequence: int, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` of a sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, num_tokens, -1)

    def share(self, source: int, sequence: int, num_tokens: int) -> None:
        """Give a sequence the first `num_tokens` of another; they are kept once."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, sequence, 0, num_tokens)

    def forget(self, sequences: Iterable[int]) -> None:
        """Forget whole sequences."""
        for sequence in sequences:
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def close(self) -> None:
        """Give the memory back; may be called twice."""
        context, self._context = self._context, None
        model, self._model = self._model, None
        if context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(context)
        if model:
            llama_cpp.llama_model_free(model)


def _load(config: LlamacppConfig, described: Gguf) -> Any:  # noqa: ANN401 -- a pointer
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = config.gpu_layers
    params.load_mode = _LOAD_MODES[config.mmap, config.mlock]
    # Builds for one processor (-march=native) have died of SIGILL at the first step on quantized
    # weights that were rearranged for AMX.
    params.use_extra_bufts = config.repack
    model = llama_cpp.llama_model_load_from_file(os.fsencode(described.path), params)
    if model:
        return model
    reason = _reason()
    if any(words in reason.lower() for words in _NO_MEMORY):
        raise EngineOutOfMemory(
            f"{described.path} does not fit{reason}. Use a smaller quantization, or fewer "
            "gpu_layers."
        )
    raise EngineMisconfigured(f"llama.cpp cannot load {described.path}{reason}.")


def _cache_sizes(config: LlamacppConfig, described: Gguf) -> tuple[int, int]:
    """Return how many tokens the cache should hold, and how few it may."""
    context = config.context_tokens or described.context_tokens or _USUAL_SEQUENCE_TOKENS
    if config.cache_tokens is not None:
        return config.cache_tokens, config.cache_tokens
    wanted = max(context, config.slots * min(context, _USUAL_SEQUENCE_TOKENS))
    least = min(context, _USUAL_SEQUENCE_TOKENS)
    item_bytes = 4 if config.cache_dtype == "float32" else 2
    token_bytes = described.cache_values_per_token * item_bytes
    if not token_bytes or (config.gpu_layers and llama_cpp.llama_supports_gpu_offload()):
        return wanted, least
    fitting = int(read_memory().available_bytes * _CACHE_SHARE_OF_MEMORY) // token_bytes
    if fitting < least:
        raise EngineOutOfMemory(
            f"The free memory has room for a cache of {fitting:,} tokens, and one sequence may "
            f"have {context:,}. Lower context_tokens, or set cache_tokens."
        )
    return min(wanted, fitting), least


def _context_params(config: LlamacppConfig, cache_tokens: int) -> Any:  # noqa: ANN401 -- ctypes
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = cache_tokens
    params.n_batch = params.n_ubatch = step_tokens(config)
    params.n_seq_max = config.slots
    params.n_outputs_max = config.slots
    params.n_threads = params.n_threads_batch = config.threads or _count_cores()
    params.type_k = params.type_v = _CACHE_TYPES[config.cache_dtype]
    # One cache for all: a long answer may have what the short ones leave.
    params.kv_unified = True
    # Layers that look back less far keep all the same, so that beginnings can be shared.
    params.swa_full = True
    params.no_perf = True
    return params


def step_tokens(config: LlamacppConfig) -> int:
    """Return how many tokens a step may have: one for each sequence at least."""
    return max(config.batch_tokens, config.slots)


def _count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
