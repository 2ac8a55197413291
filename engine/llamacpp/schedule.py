"""Which tokens the next step computes: continuous batching over the sequences of one cache.

    waiting -> running, one slot each -> done; what a slot holds may serve those that begin alike

Every running sequence that answers gets one token of each step; what is left of the step's budget
goes to prompts, in pieces. The cache may be smaller than all running sequences can become: then
the youngest gives way, and is computed again later.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from engine.llamacpp.library import Model

_LEAST_SHARED = 16
"""Fewer tokens are computed sooner than they are looked for."""
_HEADROOM = 32
"""Tokens that each running sequence should still have room for when another one starts."""


class Placed(NamedTuple):
    """One token of a step: whose it is, where it stands, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int
    is_asked: bool


class Track:
    """What is computed for one request: its prompt and what has been said so far."""

    __slots__ = ("cached_tokens", "num_computed", "num_prompt", "slot", "tokens")

    def __init__(self, prompt: list[int]) -> None:
        self.tokens = prompt
        self.num_prompt = len(prompt)
        self.num_computed = 0
        self.slot = -1
        self.cached_tokens: int | None = None
        """How much of the prompt was there already, when it was first looked for."""


class Scheduler:
    """Hands out slots, and the places of a cache that `model` keeps."""

    def __init__(self, model: "Model", *, num_slots: int, step_tokens: int) -> None:
        self._model = model
        self._num_slots = num_slots
        self._step_tokens = step_tokens
        self._waiting: deque[Track] = deque()
        self._running: list[Track] = []
        self._free = list(range(num_slots))
        # What ended sequences left in their slots, the one that was used longest ago first.
        self._resting: OrderedDict[int, list[int]] = OrderedDict()

    def add(self, track: Track) -> None:
        """Queue a sequence."""
        self._waiting.append(track)

    def end(self, track: Track, *, is_tainted: bool = False) -> None:
        """Take a sequence out, wherever it is; what it computed stays as long as there is room.

        Args:
            is_tainted: what it computed is not numbers, so nobody may use it.
        """
        if track.slot < 0:
            if track in self._waiting:
                self._waiting.remove(track)
            return
        self._running.remove(track)
        if is_tainted:
            # Its beginning may have come from any of them.
            self._drop_resting()
        if is_tainted or not self._model.can_share:
            self._clear(track)
        else:
            self._resting[track.slot] = track.tokens[: track.num_computed]
            track.slot = -1

    def reset(self) -> None:
        """Forget every sequence."""
        self._waiting.clear()
        for track in list(self._running):
            self.end(track)
        self._drop_resting()

    def plan(self) -> tuple[list[Placed], list[Track]]:
        """Return what the next step computes, and who gets a token of it, in this order."""
        self._admit()
        while self._count_needed() > self._model.cache_tokens and self._shrink():
            pass
        placed: list[Placed] = []
        asking: list[Track] = []
        for track, num_tokens in self._shares():
            start, end = track.num_computed, track.num_computed + num_tokens
            is_last = end == len(track.tokens)
            placed += [
                Placed(track.tokens[at], at, track.slot, is_last and at == end - 1)
                for at in range(start, end)
            ]
            if is_last:
                asking.append(track)
        return placed, asking

    def finish(self) -> None:
        """Note that what `plan` said last has been computed."""
        for track, num_tokens in list(self._shares()):
            track.num_computed += num_tokens

    def shrink(self) -> bool:
        """Free a part of the cache; return whether there was any that can be had."""
        return self._shrink()

    def _shares(self) -> Iterator[tuple[Track, int]]:
        """Yield how many tokens each running sequence has of the next step."""
        left = self._step_tokens
        # Those that answer first: there is a token for each of them.
        for track in sorted(self._running, key=lambda one: len(one.tokens) - one.num_computed > 1):
            num_tokens = min(len(track.tokens) - track.num_computed, left)
            if num_tokens:
                left -= num_tokens
                yield track, num_tokens

    def _count_needed(self) -> int:
        """Return how full the cache will be at most; what is shared is counted for each."""
        kept = sum(track.num_computed for track in self._running)
        kept += sum(map(len, self._resting.values()))
        return kept + sum(num_tokens for _, num_tokens in self._shares())

    def _shrink(self) -> bool:
        if self._resting:
            slot, _ = self._resting.popitem(last=False)
            self._model.forget([slot])
            self._free.append(slot)
            return True
        if len(self._running) < 2:  # noqa: PLR2004 -- nobody else to give way
            return False
        track = self._running.pop()
        self._clear(track)
        self._waiting.appendleft(track)
        return True

    def _clear(self, track: Track) -> None:
        self._model.forget([track.slot])
        self._free.append(track.slot)
        track.slot = -1
        track.num_computed = 0

    def _drop_resting(self) -> None:
        self._model.forget(self._resting)
        self._free.extend(self._resting)
        self._resting.clear()

    def _admit(self) -> None:
        """Give slots to those that wait, as long as the cache has room for their prompts."""
        held: list[Track] = []
        while self._waiting and len(self._running) < self._num_slots:
            track = self._waiting[0]
            room = sum(len(one.tokens) + _HEADROOM for one in (*self._running, track))
            if self._running and room > self._model.cache_tokens:
                break
            self._waiting.popleft()
            if self._is_coming(track):
                held.append(track)
            else:
                self._place(track)
        self._waiting.extendleft(reversed(held))

    def _is_coming(self, track: Track) -> bool:
        """Return whether somebody is about to compute a beginning that this one shares."""
        if not self._model.can_share:
            return False
        _, found = self._find(track)
        return any(
            _count_common(track.tokens, one.tokens) >= max(found, one.num_computed) + _LEAST_SHARED
            for one in self._running
            if one.num_computed < one.num_prompt
        )

    def _find(self, track: Track) -> tuple[int, int]:
        """Return the slot that holds most of what the sequence begins with, and how much."""
        best = (-1, 0)
        if self._model.can_share:
            held = [(one.slot, one.tokens, one.num_computed) for one in self._running]
            held += [(slot, tokens, len(tokens)) for slot, tokens in self._resting.items()]
            for slot, tokens, num_computed in held:
                # The last token has to be computed, since its logits are wanted.
                most = min(num_computed, len(track.tokens) - 1)
                if most > best[1]:
                    common = min(most, _count_common(track.tokens, tokens))
                    if common > best[1]:
                        best = (slot, common)
        return best if best[1] >= _LEAST_SHARED else (-1, 0)

    def _place(self, track: Track) -> None:
        source, shared = self._find(track)
        if self._free:
            track.slot = self._free.pop()
        else:
            track.slot = next((slot for slot in self._resting if slot != source), source)
            del self._resting[track.slot]
            self._model.keep(track.slot, shared if track.slot == source else 0)
        if source >= 0 and track.slot != source:
            self._model.share(source, track.slot, shared)
        if source in self._resting:
            self._resting.move_to_end(source)
        track.num_computed = shared
        if track.cached_tokens is None:
            track.cached_tokens = shared
        self._running.append(track)


def _count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
