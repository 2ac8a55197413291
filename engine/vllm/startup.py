"""What went wrong in a child process of vLLM, which says it on its standard error only."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

from engine.vllm.arguments import first_line
from jobs.domain.errors import EngineDied, EngineError, EngineMisconfigured, EngineOutOfMemory

_KEPT_BYTES = 256 * 1024
_REASON = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?(?:[\w.]*\.)?(\w*(?:Error|Exception))(?:: (.+))?$"
)
_NO_REASON = re.compile(r"initialization failed|See (?:stack trace|root cause)|died unexpectedly")
_EXIT = re.compile(r"Failed core proc\(s\): \{[^}]*: (-?\d+)\}")
_NO_MEETING = re.compile(r"Did not receive response from front-end")
_NO_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|DefaultCPUAllocator|No available memory for the cache|"
    r"larger than the available KV cache|Free memory on device|Available memory on node|"
    r"Cannot allocate memory|MemoryError"
)


class StandardError:
    """Copies what this process and its children write to standard error, and keeps the end of it.

    Children inherit the pipe, so it is read for as long as any of them lives.
    """

    def __init__(self) -> None:
        self._tail = bytearray()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Let children that are started in the block write here; this process goes back after."""
        read_end, write_end = os.pipe()
        real = os.dup(2)
        os.dup2(write_end, 2)
        os.close(write_end)
        threading.Thread(
            target=self._copy, args=(read_end, os.dup(real)), name="vllm-stderr", daemon=True
        ).start()
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)

    def text(self, *, wait_seconds: float = 0.0) -> str:
        """Return the end of what was written, once all writers have ended or the time is up."""
        self._ended.wait(wait_seconds)
        return self._tail.decode("utf-8", "replace")

    def _copy(self, read_end: int, real: int) -> None:
        while piece := os.read(read_end, 1 << 16):
            self._tail += piece
            del self._tail[:-_KEPT_BYTES]
            with contextlib.suppress(OSError):
                os.write(real, piece)
        os.close(read_end)
        os.close(real)
        self._ended.set()


def explain(error: Exception, said: str, *, model: str) -> EngineError:
    """Return what a failure to start means to whoever wrote the settings.

    Args:
        said: what the children wrote to standard error.
    """
    reason = first_line(error)
    if _NO_REASON.search(reason):
        reasons = _reasons(said)
        status = _EXIT.search(str(error))
        if reasons:
            reason = reasons[-1][:400]
        elif status is not None and int(status[1]) < 0:
            reason = f"its process was ended by signal {-int(status[1])}"
            if int(status[1]) == -9:  # noqa: PLR2004 -- SIGKILL
                return EngineOutOfMemory(
                    f"{model} cannot be loaded: its process was killed, as the kernel does when "
                    "memory runs out."
                )
    if _NO_MEMORY.search(reason):
        return EngineOutOfMemory(
            f"{model} does not fit: {reason} Lower context_tokens or slots, use a quantized "
            "model, or more GPUs."
        )
    if _NO_MEETING.search(reason):
        # No setting has a part in it: nothing of the model has been read by then.
        return EngineDied(f"vLLM's processes did not find each other to load {model}: {reason}")
    return EngineMisconfigured(f"vLLM cannot load {model}: {reason}")


def last_reason(said: str) -> str:
    """Return ": " and why a child ended, as it said itself; nothing where it said nothing."""
    reasons = _reasons(said)
    return f": {reasons[-1][:300]}" if reasons else ""


def _reasons(said: str) -> list[str]:
    found = [match for line in said.splitlines() if (match := _REASON.match(line.strip()))]
    said_so = [f"{match[1]}: {match[2]}" if match[2] else match[1] for match in found]
    return [reason for reason in said_so if not _NO_REASON.search(reason)]


def ran_out_of_memory(said: str) -> bool:
    """Return whether a child that ended said that memory ran out."""
    return _NO_MEMORY.search(said) is not None
