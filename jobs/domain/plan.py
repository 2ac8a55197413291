"""The run order of a batch: duplicates folded, prefixes grouped, long answers first.

    line ─► 37 bytes of columns ─► fold: who runs for whom ─► order: who runs when

Pure: columns in, ranks out. Groups run one after the other, which is right for engines that share
a block from the moment it is scheduled, and for those that let siblings wait for it. Where nothing
is gained the order is that of the file, and nobody has to write it down.

Source: the measurements of the performance notes, sections 2.1 and 2.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from jobs.domain.request import CHAT

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
_PARTS = 16
_COLUMNS = np.dtype(
    [("low", "<u8"), ("high", "<u8"), ("prefixes", "<u4", (5,)), ("doublings", "u1")]
)
_WIDE = np.dtype([("low", "<u8"), ("high", "<u8"), ("prefixes", "<u8", (5,)), ("doublings", "u1")])
_WIDE_BYTES = 1024 * _WIDE.itemsize
_NO_KEY = bytes(16)
_NOTHING = bytes(8)
_ROLE = b'"role"'
_BYTES = [bytes((number,)) for number in range(256)]
_digest = xxhash.xxh3_64_digest

Fold = Literal["determined", "all", "none"]
"""Which equal requests run once: those whose answer is determined (greedy or seeded), or all."""


class Columns:
    """What planning remembers of each line: 37 bytes, whatever the line's size."""

    def __init__(self, endpoint: str = CHAT) -> None:
        """Begin without a line; those to come are of one endpoint."""
        self._prompt_key = b'"messages"' if endpoint == CHAT else b'"prompt"'
        self._rows = bytearray()
        self._new = bytearray()
        self.num_bytes = 0

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._rows) // _COLUMNS.itemsize + len(self._new) // _WIDE.itemsize

    def add(
        self, content: bytes, *, num_first_chars: int = 0, key: bytes | None, max_tokens: int
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
        second, third, fourth, end = PREFIX_BYTES
        one = two = three = four = rest = _NOTHING
        if size > second:
            one = _digest(content[start : start + second])
            if size > third:
                two = _digest(content[start + second : start + third])
                if size > fourth:
                    three = _digest(content[start + third : start + fourth])
                    if size > end:
                        four = _digest(content[start + fourth : start + end])
        if num_first_chars:
            # To the last message: what stands before it is no shorter than it reads.
            stem = content.find(_ROLE, start + num_first_chars)
            if stem - start >= _MIN_STEM_BYTES:
                rest = _digest(content[start:stem])
        doublings = _BYTES[max_tokens.bit_length()]
        self._new += b"".join((key or _NO_KEY, one, two, three, four, rest, doublings))
        if len(self._new) >= _WIDE_BYTES:
            self._narrow()

    def rows(self) -> "NDArray[Any]":
        """Return the columns of all lines, without a copy."""
        self._narrow()
        return np.frombuffer(self._rows, dtype=_COLUMNS)

    def templates(self) -> "NDArray[np.uint32]":
        """Return for each line what tells its template: lines of one template have one number.

        That is everything before the last message, or without that how the only one begins;
        0: the line is too short for either.
        """
        return _templates(self.rows())

    def _narrow(self) -> None:
        """Keep half of each hash; taking it line by line costs more than hashing."""
        wide = np.frombuffer(self._new, dtype=_WIDE)
        rows = np.empty(len(wide), dtype=_COLUMNS)
        for name in ("low", "high", "prefixes", "doublings"):
            rows[name] = wide[name]  # a cast keeps the lower half
        del wide
        self._rows += rows.tobytes()
        self._new = bytearray()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrder:
    """Who runs, and when.

    Attributes:
        rank: for each line, the place at which it runs, or at which its leader does;
            None: as in the file.
        is_follower: for each line, whether another one runs for it; None: none does.
        num_leaders: lines that run.
        num_groups: groups that share a prefix; 0 where the order is not by prefix.
        shared: share of the prompts' bytes that is repeated by them.
    """

    rank: "NDArray[np.uint32] | None"
    is_follower: "NDArray[np.bool_] | None"
    num_leaders: int
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
) -> RunOrder:
    """Return the run order of a batch.

    Args:
        cache_tokens: what the engine's cache holds; 0: unknown.
        by_prefix: whether lines may be grouped by how they begin.
        by_length: whether long answers go first.
        learned: tokens of an answer to templates, by what `Columns.templates` calls them.
    """
    rows = columns.rows()
    leader = _fold(rows)
    if leader is None:
        leaders = np.arange(len(rows), dtype=np.uint32)
    else:
        leaders = np.flatnonzero(leader == np.arange(len(rows), dtype=np.uint32)).astype(np.uint32)
    buckets = _buckets(_predict(rows, learned)[leaders]) if by_length else None
    groups = None
    shared = 0.0
    if by_prefix:
        groups = _Groups(rows["prefixes"], leaders)
        shared = groups.repeated_bytes / max(1, columns.num_bytes)
        # A token is a byte at least, and what is shared goes on for up to as long again behind
        # the longest beginning that was compared.
        fits = 0 < 2 * groups.distinct_bytes < cache_tokens
        if shared < MIN_SHARED or fits:
            groups = None
    places = _arrange(leaders, groups, buckets)
    num_groups = groups.num_groups if groups is not None and places is not None else 0
    if places is None and leader is None:
        return RunOrder(rank=None, is_follower=None, num_leaders=len(leaders), shared=shared)
    rank = np.zeros(len(rows), dtype=np.uint32)
    ordered = leaders if places is None else leaders[places]
    rank[ordered] = np.arange(len(ordered), dtype=np.uint32)
    is_follower = None
    if leader is not None:
        is_follower = leader != np.arange(len(rows), dtype=np.uint32)
        rank = rank[leader]
    return RunOrder(
        rank=rank,
        is_follower=is_follower,
        num_leaders=len(leaders),
        num_groups=num_groups,
        shared=shared,
    )


def _templates(rows: "NDArray[Any]") -> "NDArray[np.uint32]":
    prefixes = rows["prefixes"]
    found: NDArray[np.uint32] = np.where(prefixes[:, -1] != 0, prefixes[:, -1], prefixes[:, 0])
    return found


def _predict(rows: "NDArray[Any]", learned: Mapping[int, int]) -> "NDArray[np.uint8]":
    """Return how long answers will be, in doublings: as those of their template were before.

    No answer is longer than its line allows. Where fewer than half of the lines are of a template
    that is known, what the lines allow says more.
    """
    allowed: NDArray[np.uint8] = rows["doublings"]
    if not learned or not len(rows):
        return allowed
    known = np.array(sorted(learned), dtype=np.uint32)
    doublings = np.array([learned[int(one)].bit_length() for one in known], dtype=np.uint8)
    templates = _templates(rows)
    places = np.minimum(np.searchsorted(known, templates), len(known) - 1)
    is_known = known[places] == templates
    if 2 * np.count_nonzero(is_known) < len(rows):
        return allowed
    # The others may be as long as any.
    found = np.where(is_known, doublings[places], doublings[places[is_known]].max())
    return np.where(allowed > 0, np.minimum(found, allowed), found)


def _fold(rows: "NDArray[Any]") -> "NDArray[np.uint32] | None":
    """Return for each line the one that runs for it, itself or an earlier one; None: all run.

    In parts, so that what sorting needs stays a fraction of the columns.
    """
    low, high = rows["low"], rows["high"]
    leader = None
    if not _repeats(low):
        return None
    for part in range(_PARTS):
        lines = np.flatnonzero((low % _PARTS == part) & ((low != 0) | (high != 0)))
        if len(lines) < 2:  # noqa: PLR2004  one is nobody's duplicate
            continue
        if not _repeats(low[lines]):
            continue
        lines = lines[np.lexsort((high[lines], low[lines]))]
        is_new = np.ones(len(lines), dtype=np.bool_)
        is_new[1:] = (low[lines[1:]] != low[lines[:-1]]) | (high[lines[1:]] != high[lines[:-1]])
        if is_new.all():
            continue
        first = np.flatnonzero(is_new)
        place = np.arange(len(lines)) - np.repeat(first, np.diff(np.append(first, len(lines))))
        # Lexsort keeps equal ones in the order of the file, so a leader comes before its followers.
        leads = place % (MAX_FOLLOWERS + 1)
        if leader is None:
            leader = np.arange(len(rows), dtype=np.uint32)
        leader[lines] = lines[np.arange(len(lines)) - leads]
    return leader


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
        top: which leaders share the shortest prefix: one number each.
        leaf: which of them share everything that any two of them share; ordered as the tree is.
    """

    def __init__(self, prefixes: "NDArray[np.uint32]", leaders: "NDArray[np.uint32]") -> None:
        path = np.zeros(len(leaders), dtype=np.uint64)
        self.repeated_bytes = 0
        self.distinct_bytes = 0
        self.num_groups = 0
        self.top = np.arange(len(leaders))
        sizes = (*PREFIX_BYTES, PREFIX_BYTES[-1])
        before = 0
        is_shared = begin_alike = np.ones(len(leaders), dtype=np.bool_)
        for level, size in enumerate(sizes):
            step = prefixes[leaders, level].astype(np.uint64)
            # Whose beginnings differ share nothing that comes later. The last hash is that of the
            # stem, which may end before a piece does.
            step[~(begin_alike if level == len(PREFIX_BYTES) else is_shared)] = 0
            if not _repeats(step):
                is_shared = np.zeros(len(leaders), dtype=np.bool_)
                begin_alike = is_shared if level == 0 else begin_alike
                before = size
                continue
            _, node, counts = np.unique(
                path << np.uint64(32) | step, return_inverse=True, return_counts=True
            )
            is_shared = (counts > 1)[node] & (step != 0)
            nodes = int(np.count_nonzero(np.bincount(node[is_shared], minlength=1)))
            num_shared = int(np.count_nonzero(is_shared))
            self.repeated_bytes += (num_shared - nodes) * (size - before)
            self.distinct_bytes += nodes * (size - before)
            self.num_groups = max(self.num_groups, nodes)
            step[~is_shared] = 0
            path = np.unique(path << np.uint64(32) | step, return_inverse=True)[1].astype(np.uint64)
            if level == 0:
                begin_alike = is_shared
                alone = np.flatnonzero(~is_shared)
                self.top = path.astype(np.int64)
                self.top[alone] = int(self.top.max(initial=0)) + 1 + np.arange(len(alone))
            before = size
        self.leaf = path.astype(np.int64)


def _repeats(numbers: "NDArray[np.uint64]") -> bool:
    """Return whether one that is not 0 is there twice; much cheaper to see than which."""
    ordered = np.sort(numbers)
    return bool(((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)).any())


def _arrange(
    leaders: "NDArray[np.uint32]",
    groups: _Groups | None,
    buckets: "NDArray[np.int8] | None",
) -> "NDArray[np.int64] | None":
    """Return the order of the leaders, or None where it is the one they have."""
    num = len(leaders)
    if groups is None:
        if buckets is None:
            return None
        places = np.argsort(buckets, kind="stable")
    else:
        turn = _turns(groups.top, buckets)
        # Leaves in the order of their top groups, then of the tree, then of the file.
        places = np.lexsort((np.arange(num), groups.leaf, turn))
    return None if bool((places == np.arange(num)).all()) else places


def _turns(top: "NDArray[np.int64]", buckets: "NDArray[np.int8] | None") -> "NDArray[np.int64]":
    """Return for each leader the place of its top group: long answers first, then by arrival."""
    _, first, node = np.unique(top, return_index=True, return_inverse=True)
    if buckets is None:
        ranked = np.argsort(first, kind="stable")
    else:
        longest = np.full(len(first), 2, dtype=np.int8)
        np.minimum.at(longest, node, buckets)
        ranked = np.lexsort((first, longest))
    place = np.empty(len(first), dtype=np.int64)
    place[ranked] = np.arange(len(first))
    return place[node]
