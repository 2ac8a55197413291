"""Keeps what a step frees for the next one.

A step on a CPU makes tensors of a few hundred kilobytes and drops them. glibc's malloc takes such
pieces from the kernel one by one and gives them back at once, so that every step waits for its
pages to be found and wiped again.
"""

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's malloc.h."""
_PIECE_BYTES = 32 << 20
"""The largest piece that comes from the heap, which is where glibc's own adapting ends as well."""
_KEPT_BYTES = 256 << 20
"""What the heap may hold free at its end."""


def keep_freed() -> bool:
    """Have this process keep memory of the size of a step's tensors; False where it cannot be told.

    Only for a process that runs a model: what it keeps, others do not get.
    """
    try:
        adjust = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # another C library
    return bool(adjust(_MMAP_THRESHOLD, _PIECE_BYTES) and adjust(_TRIM_THRESHOLD, _KEPT_BYTES))


def give_back() -> None:
    """Give the kernel what the heap holds free, where it can be told to."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library
