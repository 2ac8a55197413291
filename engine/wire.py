"""What the worker and its engine process say to each other: length-prefixed msgpack frames.

One frame is a little-endian 32-bit length and a list of messages, so that many results cost one
system call on either side.
"""

import socket
import struct
from collections.abc import Sequence

import msgspec

from engine.tuning import Tuning
from jobs.domain.request import Capabilities, Request
from jobs.domain.result import Result

_HEADER = struct.Struct("<I")


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """To the engine: load the model that this configuration (JSON) describes."""

    config: str
    model: str


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """To the engine: work."""

    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """To the engine: nobody waits for these any more."""

    request_ids: list[int]


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """To the engine: no more requests in this session; from it: every result has been sent."""


class Count(msgspec.Struct, frozen=True, array_like=True, tag="count"):
    """To the engine: how many prompt tokens has this; from it: so many."""

    request: Request | None = None
    num_tokens: int = 0


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """From the engine: the model is loaded."""

    capabilities: Capabilities
    num_slots: int
    tuning: Tuning | None = None


class Credit(msgspec.Struct, frozen=True, array_like=True, tag="credit"):
    """From the engine: it would take so many more requests."""

    n: int


class Started(msgspec.Struct, frozen=True, array_like=True, tag="started"):
    """From the engine: it holds these now; they are the suspects if it dies."""

    request_ids: list[int]


class Results(msgspec.Struct, frozen=True, array_like=True, tag="results"):
    """From the engine: these are finished."""

    results: list[Result]


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """From the engine, every second and before an end: a number that grows while it works.

    Attributes:
        tuning: what it works with now, where it chooses that.
    """

    count: int
    tuning: Tuning | None = None


class Fatal(msgspec.Struct, frozen=True, array_like=True, tag="fatal"):
    """From the engine: it cannot go on; `code` is that of an EngineError."""

    code: str
    message: str


ToEngine = Open | Submit | Abort | End | Count
FromEngine = Ready | Credit | Started | Results | Progress | End | Fatal | Count

_encode = msgspec.msgpack.Encoder().encode
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine = msgspec.msgpack.Decoder(list[FromEngine])


def encode_frame(messages: Sequence[ToEngine | FromEngine]) -> bytes:
    """Return the bytes of one frame."""
    content = _encode(messages)
    return _HEADER.pack(len(content)) + content


def read_frame(connection: socket.socket) -> list[ToEngine]:
    """Return the next frame sent to the engine; empty at the end of the stream. Blocks."""
    header = _read_exactly(connection, _HEADER.size)
    if not header:
        return []
    content = _read_exactly(connection, _HEADER.unpack(header)[0])
    return _to_engine.decode(content) if content else []


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        try:
            part = connection.recv(min(size, 1 << 20))
        except ConnectionError:
            return b""
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class FrameBuffer:
    """Puts together the frames that an engine sends, from whatever pieces arrive."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> list[FromEngine]:
        """Return the messages that `piece` completes."""
        self._bytes += piece
        messages: list[FromEngine] = []
        start = 0
        while len(self._bytes) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._bytes, start)
            end = start + _HEADER.size + size
            if len(self._bytes) < end:
                break
            messages += _from_engine.decode(memoryview(self._bytes)[start + _HEADER.size : end])
            start = end
        if start:
            del self._bytes[:start]
        return messages
