"""The run order of a batch: duplicates folded, prefixes grouped, long answers first.

    line ─► 37 bytes of columns ─► fold: who runs for whom ─► order: who runs when

Pure: columns in, ranks out. Groups run one after the other, which is right for engines that share
a block from the moment it is scheduled, and for those that let siblings wait for it. Where nothing
is gained the order is that of the file, and nobody has to write it down.

Source: the measurements of the performance notes, sections 2.1 and 2.2.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import xxhash

from jobs.domain.mixed import MIXED
from jobs.domain.request import CHAT
from jobs.domain.responses import RESPONSES

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFIX_BYTES = (256, 512, 1024, 2048)
"""Two prompts share a prefix as far as their lines are equal from the first message on."""
MAX_FOLLOWERS = 255
"""A line runs for so many others at most, so that a result stays small; the next one runs again."""
MIN_SHARED = 0.1
"""Share of the prompts' bytes that must be repeated before grouping is worth another order."""
_MIN_STEM_BYTES = 64
_MIN_SPREAD = 2
"""Answers are told apart by length when the longest third is so many doublings above the rest."""
_PIECE = 1 << 16
"""Lines that are looked at together, so that what it takes is a fraction of what is kept."""
_PART = 1 << 18
"""Lines that are sorted at once."""
_LOW = 0xFFFFFFFF
_COLUMNS = np.dtype(
    [("low", "<u8"), ("high", "<u8"), ("prefixes", "<u4", (5,)), ("doublings", "u1")]
)
_WIDE_NUMBERS = 8
_WIDE_ROW_BYTES = 8 * _WIDE_NUMBERS
"""The same with whole hashes and eight bytes for the last, so that all numbers are aligned."""
_WIDE_LINES = 1024
_WIDE_BYTES = _WIDE_LINES * _WIDE_ROW_BYTES
_NO_KEY = bytes(16)
_NOTHING = bytes(8)
_FIRST_BYTES = PREFIX_BYTES[0]
_NOTHING_DEEPER = bytes(8 * (len(PREFIX_BYTES) - 1))
_ROLE = b'"role"'
_NUMBERS = [number.to_bytes(8, "little") for number in range(256)]
_digest = xxhash.xxh3_64_digest
_PIECE_BYTES = _PIECE * _COLUMNS.itemsize

Fold = Literal["determined", "all", "none"]
"""Which equal requests run once: those whose answer is determined (greedy or seeded), or all."""


_PROMPT_KEYS = {CHAT: b'"messages"', MIXED: b'"messages"', RESPONSES: b'"body"'}
"""Where in a line what models read begins; a response has it in two places."""


class Spill(Protocol):
    """Where columns go when there are many; see storage.spill."""

    def append(self, data: bytes | bytearray) -> None:
        """Write behind what is there."""

    def read(self, num_bytes: int) -> Iterator[bytes]:
        """Yield all that was written, from the start, in pieces of so many bytes."""

    def replace(self, at: int, data: bytes | bytearray) -> None:
        """Write over what is there, also while it is read."""


class Columns:
    """What planning remembers of each line: 37 bytes, whatever the line's size.

    What lines say behind their first bytes matters only where these are shared. So it is hashed
    from where many lines in a row share them, and for those before that once it is needed.
    """

    def __init__(
        self,
        endpoint: str = CHAT,
        spill: Spill | None = None,
        read_again: Callable[[], Iterator[bytes]] | None = None,
    ) -> None:
        """Begin without a line.

        Args:
            endpoint: of the lines to come.
            spill: takes what would be in memory beyond some thousand lines; None: nothing does.
            read_again: yields all lines that were added; None: each is hashed when it is.
        """
        self._read_again = read_again
        self._is_deep = read_again is None
        self._num_shallow = 0
        self._prompt_key = _PROMPT_KEYS.get(endpoint, b'"prompt"')
        self._rows = bytearray()
        self._new = bytearray()
        self._spill = spill
        self._num_spilled = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        """Return the number of lines."""
        num_rows = len(self._rows) // _COLUMNS.itemsize + len(self._new) // _WIDE_ROW_BYTES
        return self._num_spilled + num_rows

    def add(
        self,
        content: bytes,
        num_first_chars: int = 0,
        key: bytes | None = None,
        max_tokens: int = 0,
    ) -> None:
        """Note the next line.

        Args:
            content: the line.
            num_first_chars: of all its messages but the last.
            key: 16 bytes that are equal exactly where the answers are; None: nobody's answer is
                sure to be the same.
            max_tokens: the longest answer; 0: unknown.
        """
        start = content.find(self._prompt_key)
        if start < 0:  # noqa: PLR1730  calling max costs as much as a hash
            start = 0  # the name is spelled with escapes
        size = len(content) - start
        self.num_bytes += size
        # One hash for each piece: those of a prefix are looked at together, from the first on.
        one = rest = _NOTHING
        deeper = _NOTHING_DEEPER
        if size > _FIRST_BYTES:
            one = _digest(content[start : start + _FIRST_BYTES])
            if self._is_deep:
                deeper = _hash_deeper(content, start, size)
        if num_first_chars:
            # To the last message: what stands before it is no shorter than it reads.
            stem = content.find(_ROLE, start + num_first_chars)
            if stem - start >= _MIN_STEM_BYTES:
                rest = _digest(content[start:stem])
        doublings = _NUMBERS[max_tokens.bit_length()]
        self._new += b"".join((key or _NO_KEY, one, deeper, rest, doublings))
        if len(self._new) >= _WIDE_BYTES:
            if not self._is_deep:
                self._num_shallow += _WIDE_LINES
                self._is_deep = self._share_beginnings()
            self._narrow()

    def complete(self) -> None:
        """Hash what the first bytes of lines are followed by, where that was put off."""
        if not self._is_deep:
            self._num_shallow = len(self)
            self._is_deep = True
        if not self._num_shallow or self._read_again is None:
            return
        left, self._num_shallow = self._num_shallow, 0
        contents = self._read_again()
        for at, rows in self.pieces():
            filled = rows.copy()
            num = min(left, len(rows))
            deeper = bytearray()
            for content in islice(contents, num):
                start = max(0, content.find(self._prompt_key))
                deeper += _hash_deeper(content, start, len(content) - start)
            filled["prefixes"][:num, 1:-1] = np.frombuffer(deeper, dtype="<u8").reshape(num, -1)
            self._replace(at, filled.tobytes())
            left -= num
            if not left:
                return

    def _share_beginnings(self) -> bool:
        """Return whether many of the newest lines begin alike."""
        first = np.frombuffer(self._new, dtype="<u8").reshape(-1, _WIDE_NUMBERS)[:, 2]
        first = np.sort(first[first != 0].astype("<u4"))
        return int(np.count_nonzero(first[1:] == first[:-1])) > MIN_SHARED * _WIDE_LINES

    def _replace(self, at: int, rows: bytes) -> None:
        """Write over the rows from a line on."""
        if at < self._num_spilled and self._spill is not None:
            self._spill.replace(at * _COLUMNS.itemsize, rows)
        else:
            start = (at - self._num_spilled) * _COLUMNS.itemsize
            self._rows[start : start + len(rows)] = rows

    def _narrow(self) -> None:
        """Keep half of each hash; taking it line by line costs more than hashing."""
        wide = np.frombuffer(self._new, dtype="<u8").reshape(-1, _WIDE_NUMBERS)
        narrow = wide[:, 2:-1].astype("<u4")  # a cast keeps the lower half
        rows = np.empty((len(wide), _COLUMNS.itemsize), dtype=np.uint8)
        # As bytes: numpy copies numbers that are not aligned one by one.
        rows[:, :16] = wide.view(np.uint8)[:, :16]
        rows[:, 16:-1] = narrow.view(np.uint8)
        rows[:, -1] = wide[:, -1]
        del wide
        self._rows += rows.data
        self._new = bytearray()
        if len(self._rows) >= _PIECE_BYTES and self._spill is not None:
            self._spill.append(self._rows)
            self._num_spilled += len(self._rows) // _COLUMNS.itemsize
            self._rows.clear()

    def pieces(self) -> "Iterator[tuple[int, NDArray[Any]]]":
        """Yield the columns of some lines after the other, with the number of the first."""
        self._narrow()
        at = 0
        if self._num_spilled and self._spill is not None:
            for piece in self._spill.read(_PIECE_BYTES):
                rows = np.frombuffer(piece, dtype=_COLUMNS)
                yield at, rows
                at += len(rows)
        for start in range(0, len(self._rows), _PIECE_BYTES):
            rows = np.frombuffer(self._rows[start : start + _PIECE_BYTES], dtype=_COLUMNS)
            yield at, rows
            at += len(rows)

    def shorts(self) -> "NDArray[np.uint32]":
        """Return a fourth of each key; 0: there is none."""
        found = np.empty(len(self), dtype=np.uint32)
        for at, rows in self.pieces():
            found[at : at + len(rows)] = rows["low"] & _LOW
        return found

    def prefixes(self, level: int) -> "NDArray[np.uint32]":
        """Return one of the hashes of how each line begins; 0: it is too short."""
        found = np.empty(len(self), dtype=np.uint32)
        for at, rows in self.pieces():
            found[at : at + len(rows)] = rows["prefixes"][:, level]
        return found

    def doublings(self) -> "NDArray[np.uint8]":
        """Return for each line how often its longest answer doubles; 0: unknown."""
        found = np.empty(len(self), dtype=np.uint8)
        for at, rows in self.pieces():
            found[at : at + len(rows)] = rows["doublings"]
        return found

    def templates(self) -> "NDArray[np.uint32]":
        """Return for each line what tells its template: lines of one template have one number.

        That is everything before the last message, or without that how the only one begins;
        0: the line is too short for either.
        """
        found = np.empty(len(self), dtype=np.uint32)
        for at, rows in self.pieces():
            stems = rows["prefixes"][:, -1]
            found[at : at + len(rows)] = np.where(stems != 0, stems, rows["prefixes"][:, 0])
        return found

    def keys(self, lines: "NDArray[np.uint32]") -> "tuple[NDArray[Any], NDArray[Any]]":
        """Return both halves of the keys of some lines, given in the order of the file."""
        low, high = (np.empty(len(lines), dtype=np.uint64) for _ in range(2))
        begin = 0
        for at, rows in self.pieces():
            end = begin + int(np.searchsorted(lines[begin:], at + len(rows)))
            inside = lines[begin:end] - np.uint32(at)
            low[begin:end], high[begin:end] = rows["low"][inside], rows["high"][inside]
            begin = end
        return low, high


def _hash_deeper(content: bytes, start: int, size: int) -> bytes:
    """Return the hashes of the pieces behind the first, each of 8 bytes; 0: it is too short."""
    second, third, fourth, end = PREFIX_BYTES
    if size <= third:
        return _NOTHING_DEEPER
    two, three, four = _digest(content[start + second : start + third]), _NOTHING, _NOTHING
    if size > fourth:
        three = _digest(content[start + third : start + fourth])
        if size > end:
            four = _digest(content[start + fourth : start + end])
    return two + three + four


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrder:
    """Who runs, and when.

    Attributes:
        rank: for each line, the place at which it runs, or at which its leader does;
            None: as in the file.
        is_follower: for each line, whether another one runs for it; None: none does.
        num_leaders: lines that have a place of their own.
        num_reused: how many of them need not run; theirs are the last places.
        num_groups: groups that share a prefix; 0 where the order is not by prefix.
        shared: share of the prompts' bytes that is repeated by them.
    """

    rank: "NDArray[np.uint32] | None"
    is_follower: "NDArray[np.bool_] | None"
    num_leaders: int
    num_reused: int = 0
    num_groups: int = 0
    shared: float = 0.0

    @property
    def is_arrival(self) -> bool:
        """Whether every line runs, as they stand in the file."""
        return self.rank is None


def order(
    columns: Columns,
    *,
    cache_tokens: int = 0,
    by_prefix: bool = True,
    by_length: bool = True,
    learned: Mapping[int, int] = MappingProxyType({}),
    reused: "NDArray[np.bool_] | None" = None,
) -> RunOrder:
    """Return the run order of a batch.

    Args:
        reused: which lines have their answer already; None: none does.
        cache_tokens: what the engine's cache holds; 0: unknown.
        by_prefix: whether lines may be grouped by how they begin.
        by_length: whether long answers go first.
        learned: tokens of an answer to templates, by what `Columns.templates` calls them.
    """
    num = num_leaders = len(columns)
    leader = _fold(columns, reused)
    leaders = is_follower = None
    if leader is not None or reused is not None:
        leaders = np.arange(num, dtype=np.uint32)
        runs = np.ones(num, dtype=np.bool_) if leader is None else leader == leaders
        is_follower = None if leader is None else ~runs
        if reused is not None:
            runs &= ~reused
        leaders = leaders[runs]
        num_leaders = len(leaders)
    buckets = _buckets(_of(_predict(columns, learned), leaders)) if by_length else None
    groups = None
    shared = 0.0
    if by_prefix:
        groups = _Groups(columns, leaders)
        shared = groups.repeated_bytes / max(1, columns.num_bytes)
        # A token is a byte at least, and what is shared goes on for up to as long again behind
        # the longest beginning that was compared.
        fits = 0 < 2 * groups.distinct_bytes < cache_tokens
        if shared < MIN_SHARED or fits:
            groups = None
    places = _arrange(groups, buckets)
    num_groups = groups.num_groups if groups is not None and places is not None else 0
    if places is None and leader is None and reused is None:
        return RunOrder(rank=None, is_follower=None, num_leaders=num_leaders, shared=shared)
    turns = np.arange(num_leaders, dtype=np.uint32)
    placed: NDArray[Any] = turns if places is None else places
    rank = np.zeros(num, dtype=np.uint32)
    rank[placed if leaders is None else leaders[placed]] = turns
    num_reused = 0
    if reused is not None:
        num_reused = int(np.count_nonzero(reused))
        rank[reused] = np.arange(num_leaders, num_leaders + num_reused, dtype=np.uint32)
    return RunOrder(
        rank=rank if leader is None else rank[leader],
        is_follower=is_follower,
        num_leaders=num_leaders + num_reused,
        num_reused=num_reused,
        num_groups=num_groups,
        shared=shared,
    )


def _of(values: "NDArray[Any]", leaders: "NDArray[np.uint32] | None") -> "NDArray[Any]":
    """Return what is known of the leaders; None: all lines are."""
    return values if leaders is None else values[leaders]


def _predict(columns: Columns, learned: Mapping[int, int]) -> "NDArray[np.uint8]":
    """Return how long answers will be, in doublings: as those of their template were before.

    No answer is longer than its line allows. Where fewer than half of the lines are of a template
    that is known, what the lines allow says more.
    """
    allowed = columns.doublings()
    if not learned or not len(allowed):
        return allowed
    known = np.array(sorted(learned), dtype=np.uint32)
    doublings = np.array([learned[int(one)].bit_length() for one in known], dtype=np.uint8)
    templates = columns.templates()
    places = np.minimum(np.searchsorted(known, templates), len(known) - 1)
    is_known = known[places] == templates
    if 2 * np.count_nonzero(is_known) < len(allowed):
        return allowed
    # The others may be as long as any.
    found = np.where(is_known, doublings[places], doublings[places[is_known]].max())
    return np.where(allowed > 0, np.minimum(found, allowed), found)


def _fold(columns: Columns, reused: "NDArray[np.bool_] | None") -> "NDArray[np.uint32] | None":
    """Return for each line the one that runs for it, itself or an earlier one; None: all run.

    One that has its answer runs for nobody, and nobody for it.

    Of most lines a fourth of the key tells that they are nobody's duplicate. The others are
    compared in parts, so that what that needs stays a fraction of the columns.
    """
    short = columns.shorts()
    if reused is not None:
        short[reused] = 0
    alike = _repeated(short)
    if not len(alike):
        return None
    lines = np.flatnonzero(_is_in(short, alike)).astype(np.uint32)
    num_parts = -(-len(lines) // _PART)
    part_of = short[lines] % num_parts
    leader = None
    for part in range(num_parts):
        members = lines[part_of == part]
        low, high = columns.keys(members)
        # Lexsort keeps equal ones in the order of the file, so a leader comes before its followers.
        ranked = np.lexsort((high, low))
        members, low, high = members[ranked], low[ranked], high[ranked]
        is_new = np.ones(len(members), dtype=np.bool_)
        is_new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
        if is_new.all():
            continue
        first = np.flatnonzero(is_new)
        place = np.arange(len(members)) - np.repeat(first, np.diff(np.append(first, len(members))))
        leads = place % (MAX_FOLLOWERS + 1)
        if leader is None:
            leader = np.arange(len(columns), dtype=np.uint32)
        leader[members] = members[np.arange(len(members)) - leads]
    return leader


def _repeated(values: "NDArray[Any]") -> "NDArray[Any]":
    """Return the values, but 0, that are there more than once: each once, sorted."""
    found = []
    most = int(values.max(initial=0))
    num_parts = 1 + len(values) // _PART
    for part in range(num_parts):
        # Of each range of values by itself, since sorting takes as much again as what is sorted.
        low, high = most * part // num_parts, most * (part + 1) // num_parts
        ranked = values[(values > low) & (values <= high)]
        ranked.sort()
        again = ranked[1:][ranked[1:] == ranked[:-1]]
        found.append(again[np.append(True, again[1:] != again[:-1])[: len(again)]])
    return np.concatenate(found)


def _is_in(values: "NDArray[Any]", wanted: "NDArray[Any]") -> "NDArray[np.bool_]":
    """Return which values are among some that are sorted."""
    found = np.zeros(len(values), dtype=np.bool_)
    if len(wanted):
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE]
            at = np.minimum(np.searchsorted(wanted, piece), len(wanted) - 1)
            found[start : start + _PIECE] = wanted[at] == piece
    return found


def _buckets(doublings: "NDArray[np.uint8]") -> "NDArray[np.int8] | None":
    """Return 0 for lines with long answers, 1 and 2 for shorter ones; None: they are alike.

    Source: three buckets come within a few percent of knowing every length (section 2.2).
    """
    known = doublings[doublings > 0]
    if 2 * len(known) < len(doublings) or not len(known):
        return None
    ranked = np.sort(known)
    third = max(1, len(ranked) // 3)
    low, high, top = (
        int(ranked[third - 1]),
        int(ranked[max(0, len(ranked) - third - 1)]),
        int(ranked[-1]),
    )
    if top - low < _MIN_SPREAD:
        return None
    buckets = np.ones(len(doublings), dtype=np.int8)
    buckets[(doublings > 0) & (doublings <= low)] = 2
    buckets[doublings > max(high, low)] = 0
    return buckets


class _Groups:
    """The leaders that share a beginning, as a tree whose nodes are counted by their bytes.

    Attributes:
        top: which leaders share the shortest prefix, from 1 on; 0: with nobody.
        leaf: which of them share everything that any two of them share; ordered as the tree is.
    """

    def __init__(self, columns: Columns, leaders: "NDArray[np.uint32] | None") -> None:
        num = len(columns) if leaders is None else len(leaders)
        self.top = self.leaf = np.zeros(num, dtype=np.uint32)
        self.repeated_bytes = 0
        self.distinct_bytes = 0
        self.num_groups = 0
        self._num_leaves = 1
        before = 0
        goes_on = np.ones(num, dtype=np.bool_)
        for level, size in enumerate((*PREFIX_BYTES, PREFIX_BYTES[-1])):
            step = _of(columns.prefixes(level), leaders)
            alike = _is_in(step, _repeated(step))
            if level < len(PREFIX_BYTES):
                # What is equal behind a piece that is not is no beginning. The last hash is of
                # all that comes before, and stands by itself.
                alike &= goes_on
            num_shared, num_nodes, goes_on = self._descend(step, alike)
            self.repeated_bytes += (num_shared - num_nodes) * (size - before)
            self.distinct_bytes += num_nodes * (size - before)
            self.num_groups = max(self.num_groups, num_nodes)
            if level == 0:
                # Chance alone makes a few hashes equal among millions.
                if num_shared * PREFIX_BYTES[-1] < MIN_SHARED * columns.num_bytes:
                    return
                self.top = self.leaf.copy()
                columns.complete()
            before = size
            del step, alike

    def _descend(
        self, step: "NDArray[np.uint32]", alike: "NDArray[np.bool_]"
    ) -> "tuple[int, int, NDArray[np.bool_]]":
        """Go one level down; return how many leaders share it, in how many nodes, and which do.

        Args:
            alike: those that may share it, because their hashes are not theirs alone.
        """
        path = self.leaf
        nodes = _repeated(_key_of(path[alike], step[alike]))
        if not len(nodes):
            return 0, 0, np.zeros(len(path), dtype=np.bool_)
        parents = np.arange(self._num_leaves, dtype=np.uint32)
        known = np.union1d(_key_of(parents, np.uint32(0)), nodes)
        is_shared = np.empty(len(path), dtype=np.bool_)
        for start in range(0, len(path), _PIECE):
            piece = slice(start, start + _PIECE)
            keys = _key_of(path[piece], step[piece])
            is_shared[piece] = alike[piece] & _is_in(keys, nodes)
            keys[~is_shared[piece]] &= np.uint64(_LOW << 32)
            path[piece] = np.searchsorted(known, keys)
        self._num_leaves = len(known)
        return int(np.count_nonzero(is_shared)), len(nodes), is_shared


def _key_of(path: "NDArray[np.uint32]", step: "NDArray[np.uint32] | np.uint32") -> "NDArray[Any]":
    keys: NDArray[Any] = path.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= step
    return keys


def _arrange(
    groups: _Groups | None, buckets: "NDArray[np.int8] | None"
) -> "NDArray[np.int64] | None":
    """Return the order of the leaders, or None where it is the one they have."""
    if groups is not None:
        # Leaves in the order of their top groups, then of the tree, then of the file.
        keys = _turns(groups.top, buckets)
        keys |= groups.leaf
        places = np.argsort(keys, kind="stable")
    elif buckets is not None:
        places = np.argsort(buckets, kind="stable")
    else:
        return None
    return None if bool((places[1:] > places[:-1]).all()) else places


def _turns(top: "NDArray[np.uint32]", buckets: "NDArray[np.int8] | None") -> "NDArray[np.uint64]":
    """Return for each leader the turn of its top group: long answers first, then by arrival.

    The bucket is in the two highest bits, the group's first leader in the thirty behind them.
    """
    num = len(top)
    first = np.arange(num, dtype=np.uint64)
    is_grouped = top != 0
    grouped = top[is_grouped]
    leads = np.zeros(int(top.max(initial=0)) + 1, dtype=np.uint64)
    leads[grouped[::-1]] = first[is_grouped][::-1]  # the last one written is the first in the file
    first[is_grouped] = leads[grouped]
    if buckets is not None:
        longest = np.full(len(leads), 2, dtype=np.int8)
        np.minimum.at(longest, grouped, buckets[is_grouped])
        rank = np.where(is_grouped, longest[top], buckets)
        first |= rank.astype(np.uint64) << np.uint64(30)
    first <<= np.uint64(32)
    return first
