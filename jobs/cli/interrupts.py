"""Ctrl-C that cannot be lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a destructor or a weakref
callback it is printed and ignored, and the command would go on as if nothing had been said. So a
command that lasts also looks whether a signal came.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noticed(
    signals: Sequence[signal.Signals] = (signal.SIGINT,),
    *,
    at_once: bool = True,
    on_first: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt once one of `signals` has come.

    A second one ends the process.

    Args:
        at_once: whether to raise from the handler as well, to end what blocks.
        on_first: called with the first signal.
    """
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        seen.append(number)
        on_first()
        if at_once:
            raise KeyboardInterrupt

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
