"""Batches whose lines are of several kinds: each line's own url says which one it is."""

import msgspec

from jobs.domain.errors import InvalidLine
from jobs.domain.request import CHAT, ENDPOINTS
from jobs.domain.sketch import Sketch, Sketcher

MIXED = "mixed"
"""The endpoint of a batch whose lines each have their own."""
BATCH_ENDPOINTS = (*ENDPOINTS, MIXED)


class _Head(msgspec.Struct):
    """What of a line says of which kind it is, if anything does."""

    url: object = None


_decode_head = msgspec.json.Decoder(_Head).decode


def endpoint_of(line: bytes, endpoint: str) -> str:
    """Return which of `ENDPOINTS` a line is for, in a batch of this endpoint.

    A line that cannot be read, or names none, is for chat: its parser says what is wrong with it.

    Raises:
        InvalidLine: its url is none that is served.
    """
    if endpoint != MIXED:
        return endpoint
    try:
        url = _decode_head(line).url
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return CHAT
    if url is None:
        return CHAT
    for known in ENDPOINTS:
        if url == known:
            return known
    raise InvalidLine(
        f"The url of this line is none that is served; use one of {', '.join(ENDPOINTS)}.",
        param="url",
        error_code="invalid_url",
    )


class MixedSketcher:
    """Reads lines of several kinds as planning does, each as a `Sketcher` of its own kind.

    Attributes:
        endpoint: of the line that was read last.
    """

    def __init__(self) -> None:
        """Begin without a line."""
        self.endpoint = CHAT
        self._sketchers: dict[str, Sketcher] = {}

    def sketch(self, line: bytes) -> Sketch:
        """Return what planning needs of `line`.

        Raises:
            InvalidLine: as `Sketcher.sketch` does.
        """
        endpoint = self.endpoint = endpoint_of(line, MIXED)
        sketcher = self._sketchers.get(endpoint)
        if sketcher is None:
            sketcher = self._sketchers[endpoint] = Sketcher(endpoint)
        return sketcher.sketch(line)


def open_sketcher(endpoint: str) -> Sketcher | MixedSketcher:
    """Return what reads the lines of a batch of one of `BATCH_ENDPOINTS`."""
    return MixedSketcher() if endpoint == MIXED else Sketcher(endpoint)
