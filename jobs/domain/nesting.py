"""How deeply JSON text is nested, found without parsing it, since parsing is what goes deep."""

import numpy as np

MAX_NESTING = 64
"""Of a request line, which is a few levels deep without its schema."""

_MARKS = b'{}[]"'
_OTHERS = bytes(set(range(256)) - set(_MARKS))
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"{[")] = 1
_STEPS[list(b"}]")] = -1


def is_nested_deeper(text: bytes, levels: int = MAX_NESTING) -> bool:
    """Return whether brackets outside of strings stand more than `levels` deep.

    Most lines have no more brackets than that, and are not looked at any closer.
    """
    if text.count(b"{") + text.count(b"[") <= levels:
        return False
    return nesting_of(text) > levels


def nesting_of(text: bytes) -> int:
    """Return how deep brackets outside of strings stand; of text that is no JSON, about that."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(text.translate(None, _OTHERS).split(b'"')[::2])
    if not outside:
        return 0
    steps = _STEPS[np.frombuffer(outside, dtype=np.uint8)]
    return max(0, int(np.cumsum(steps, dtype=np.int64).max()))
