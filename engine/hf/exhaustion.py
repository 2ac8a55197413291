"""Which errors say that memory ran out, on whichever device."""

import gc

import torch

from engine.hf import heap

_TOLD = (
    "out of memory",  # CUDA's driver and MPS
    "DefaultCPUAllocator",
    "not enough memory",
    "bad_alloc",
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "could not create a memory",  # oneDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of a step or of an allocation means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TOLD)


def release(device: torch.device) -> None:
    """Give memory that nobody uses any more back to the device.

    Not from within an `except`: the error holds on to what its frames hold.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        heap.give_back()
