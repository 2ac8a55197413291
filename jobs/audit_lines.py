"""What an audit sees of the lines of results, and of where they belong."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from jobs.domain.result import Usage
from jobs.domain.shard import Shard, count_bits, has_bit
from storage.jsonl import RequestLine


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _LineUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details = _Details()
    # What a response calls them.
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details = _Details()


class _Body(msgspec.Struct, frozen=True):
    usage: _LineUsage | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _Body


class Line(msgspec.Struct, frozen=True):
    """What an audit wants to know of a line of a results file."""

    custom_id: str
    response: _Response | None = None

    @property
    def usage(self) -> Usage | None:
        """The usage that the line shows; an error's line may have none."""
        told = self.response.body.usage if self.response is not None else None
        if told is None:
            return None
        return Usage(
            prompt_tokens=told.prompt_tokens + told.input_tokens,
            completion_tokens=told.completion_tokens + told.output_tokens,
            cached_tokens=told.prompt_tokens_details.cached_tokens
            + told.input_tokens_details.cached_tokens,
        )


decode_line = msgspec.json.Decoder(Line).decode


class Lines:
    """Where in a shard the lines of the input are that it answers for.

    Those of a byte range of the input follow from its row; a run-order blob has to be read.
    """

    def __init__(self, shard: Shard, found: Iterable[RequestLine] | None) -> None:
        self._first = shard.first_index
        self._num_lines = shard.num_lines
        self._places: dict[int, int] | None = None
        self._weights: dict[int, int] = {}
        if found is not None:
            self._places = {}
            for position, index, followers, _ in found:
                self._weights[position] = 1 + len(followers)
                self._places |= dict.fromkeys((index, *(n for n, _ in followers)), position)

    @property
    def indexes(self) -> Iterable[int]:
        """The indexes of all lines of the input that it answers for."""
        if self._places is None:
            return range(self._first, self._first + self._num_lines)
        return self._places

    def place_of(self, index: int) -> int | None:
        """Return the position that answers for a line of the input."""
        if self._places is not None:
            return self._places.get(index)
        position = index - self._first
        return position if 0 <= position < self._num_lines else None

    def count(self, done: bytes) -> int:
        """Return how many lines of the input have their answer when these positions are done."""
        if self._places is None:
            return count_bits(done)
        return sum(weight for place, weight in self._weights.items() if has_bit(done, place))


@dataclass(slots=True)
class Recount:
    """What the lines of some results say of themselves, added up."""

    usage: Usage = field(default_factory=Usage)
    is_exact: bool = True

    def add(self, line: Line) -> None:
        """Count what one line shows."""
        usage = line.usage
        if usage is None:
            self.is_exact = False
        else:
            self.usage += usage

    def agrees(self, told: Usage) -> bool:
        """Return whether `told` may be the usage; lines that show none may have had some."""
        if self.is_exact:
            return told == self.usage
        return all(
            getattr(told, name) >= getattr(self.usage, name)
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
        )


class Head:
    """The first line of a published file that was not taken yet."""

    def __init__(self, lines: Iterator[Line | None]) -> None:
        self._lines = lines
        self.num_lines = 0
        self.recount = Recount()
        self._custom_id = self._next()

    def _next(self) -> str | None:
        for line in self._lines:
            self.num_lines += 1
            if line is not None:
                self.recount.add(line)
                return line.custom_id
        return None

    def take(self, custom_id: str) -> int:
        """Return how many lines of this custom_id come next, and pass them."""
        taken = 0
        while self._custom_id == custom_id:
            taken += 1
            self._custom_id = self._next()
        return taken

    def drain(self) -> int:
        """Return how many lines are left, and pass them."""
        left = 0
        while self._custom_id is not None:
            left += 1
            self._custom_id = self._next()
        return left
