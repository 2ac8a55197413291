"""Shifts the wall clock of a Python process, from its first line on, by WRONG_CLOCK_SECONDS.

The monotonic clock stays: it is what a machine whose date is wrong has right.
"""

import ctypes
import datetime as dt
import gc
import os
import time
from typing import Any

_SECONDS = float(os.environ.get("WRONG_CLOCK_SECONDS", "0"))
_time, _time_ns = time.time, time.time_ns
_now, _utcnow = dt.datetime.now, dt.datetime.utcnow
_SHIFT = dt.timedelta(seconds=_SECONDS)


def _wrong_now(_kind: object, tz: dt.tzinfo | None = None) -> dt.datetime:
    return _now(tz) + _SHIFT


def _wrong_utcnow(_kind: object) -> dt.datetime:
    return _utcnow() + _SHIFT


def _shift() -> None:
    time.time = lambda: _time() + _SECONDS
    time.time_ns = lambda: _time_ns() + int(_SECONDS * 1e9)
    # The type itself: a subclass would not be what C code makes and compares with.
    names: dict[str, Any] = gc.get_referents(dt.datetime.__dict__)[0]
    names["now"] = classmethod(_wrong_now)
    names["utcnow"] = classmethod(_wrong_utcnow)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(dt.datetime))


_shift()
