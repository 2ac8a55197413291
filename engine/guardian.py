"""Ends an engine's process group once its worker is gone, whatever state the engine is in.

    worker ── writing end of a pipe ──► guardian ── SIGKILL ──► the engine's process group

Run as `python -I -S guardian.py FD`, where FD is the pipe's reading end and the worker alone has
the other one. The worker says the engine's process id; then the guardian sleeps until the pipe
closes, which the kernel does for a worker that was killed, or until the engine's own process has
ended and may have left children behind. It is a process of its own, before and outside the
engine's group, because an engine that is stopped, or stuck in a driver, runs no code of ours. It
imports next to nothing: it is there as long as the engine.
"""

import os
import select
import signal
import sys

_MAX_PID_BYTES = 32


def _read_pid(pipe: int) -> int | None:
    said = b""
    while not said.endswith(b"\n"):
        piece = os.read(pipe, _MAX_PID_BYTES)
        if not piece:
            return None
        said += piece
    return int(said)


def main() -> None:
    """Wait for the end of the worker or of the engine, and end what is left of the engine."""
    # Whoever asks all processes of a service to end gives the worker time to finish its work.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pipe = int(sys.argv[1])
    group = _read_pid(pipe)
    if group is None:
        return  # the worker ended before it had an engine
    ends = select.poll()
    ends.register(pipe, select.POLLIN)
    if sys.platform == "linux":
        try:
            ends.register(os.pidfd_open(group), select.POLLIN)
        except ProcessLookupError:
            pass  # it has ended and been forgotten; its children are looked for at once
        else:
            ends.poll()
    else:
        ends.poll()
    try:  # noqa: SIM105  contextlib imports many things
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is left


if __name__ == "__main__":
    main()
