"""How many sequences an engine works on at once, how many tokens a step has, and why.

What the settings leave open is chosen when the model is loaded, from its size, its cache and its
device. From then on it follows the work itself:

    slots         would half of them be as quick for each token?   no: twice as many are tried
    batch_tokens  do steps leave slots empty for want of it?       yes: twice as many
    evictions     did sequences lose their cache?                  yes: no more than what fitted
    memory        did a step run out of it?                        yes: half as many, for a while

Nothing here reads a clock or knows an engine: it is told of steps, and asked for the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from engine.ceiling import Ceiling
from engine.memory import OVERHEAD_BYTES, ModelSize

DeviceKind = Literal["cuda", "mps", "cpu"]
Reason = Literal["asked", "device", "memory", "engine", "steps", "evictions", "shortage"]
"""What decided: a setting, the kind of device, its memory, the library's own choice, measured
steps, sequences that lost their cache, or a step for which there was no memory."""
Part = Literal["all", "decoding", "even", "odd"]
"""Who takes part in a step: everybody, or those that decode, or every second one of them."""

HF_SLOTS = 32
HF_BATCH_TOKENS = 512
VLLM_SLOTS = 256
VLLM_BATCH_TOKENS = 8192
"""What a model's memory is reckoned with where the settings leave it open."""

# A device's bandwidth is idle below about 200 sequences and its arithmetic above, whatever the
# model: compute for each byte of the weights on an H200, at 16 bit and at 8. What attention adds
# moves it up, so twice that is tried. Source: 989 TF/s over 4.8 TB/s, two operations a parameter.
_GPU_SLOTS, _MAX_GPU_SLOTS = 128, 512
_GPU_BATCH_TOKENS, _MAX_GPU_BATCH_TOKENS = 2048, 8192
# On one core, 48 GFLOP/s were measured with 16 rows, 74 with 32 and 125 with 128. With 128 a model
# of 100 million parameters was 6 % quicker than with 64 and 24 % than with 32, one of 4 million 11
# and 30 %, where what steps free is kept. A short batch ends before a climb to so many has paid.
_CPU_SLOTS, _MAX_CPU_SLOTS, _MAX_CPU_BATCH_TOKENS = 128, 128, 2048
# A sequence is taken to need so much cache at first, and at least so much when more are tried. Too
# little is no harm: who finds none waits, and evictions are counted.
_COMMON_TOKENS, _LEAST_TOKENS = 512, 128
_STEP_SHARE = 0.05
"""Of the free memory, for what a step of the most tokens needs beside weights and cache."""

_LARGE_GPU_BYTES = 40 * 10**9
_MAX_VLLM_SLOTS = 1024
_SMALL_VLLM_BATCH_TOKENS = 2048


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine works with now, and what decided it.

    Attributes:
        slots: sequences at once.
        max_slots: what there is room for; `slots` stays within it.
        batch_tokens: the token budget of a step; 0: the engine's own.
        cache_tokens: what the cache holds; 0: unknown.
        num_comparisons: how often a whole step was compared with two halves.
        num_evictions: sequences that lost their cache, and were begun again.
        num_shrinks: steps that ran out of memory, and were done again in smaller ones.
    """

    slots: int
    max_slots: int
    slots_by: Reason
    batch_tokens: int = 0
    batch_tokens_by: Reason = "engine"
    cache_tokens: int = 0
    cache_tokens_by: Reason = "memory"
    num_comparisons: int = 0
    num_evictions: int = 0
    num_shrinks: int = 0

    @property
    def choice(self) -> tuple[object, ...]:
        """What was chosen, without the counts."""
        return (
            *(self.slots, self.slots_by, self.max_slots, self.batch_tokens, self.batch_tokens_by),
            *(self.cache_tokens, self.cache_tokens_by),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a loaded model finds.

    Attributes:
        cache_tokens: how many the cache may hold.
        step_bytes: memory of a step for each of its tokens.
        masks_cache: whether attention masks a matrix of the step's tokens by the cache's, whose
            memory grows with both.
        free_bytes: what the device has left beside the weights.
    """

    device: DeviceKind
    cache_tokens: int
    context_tokens: int
    step_bytes: int = 0
    free_bytes: int = 0
    masks_cache: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What an engine begins with, and how far it may go."""

    slots: int
    max_slots: int
    slots_by: Reason
    batch_tokens: int
    max_batch_tokens: int
    batch_tokens_by: Reason
    cache_tokens: int
    cache_tokens_by: Reason = "memory"


def choose_hf(
    room: Room, *, slots: int | None, batch_tokens: int | None, is_cache_set: bool = False
) -> Start:
    """Return what the hf engine begins with.

    Args:
        slots: as the settings have it; None: choose.
        batch_tokens: the same.
        is_cache_set: whether the settings say how much the cache holds.
    """
    is_gpu = room.device != "cpu"
    slots_by: Reason = "asked"
    first = most = slots or 0
    if slots is None:
        first, most = (_GPU_SLOTS, _MAX_GPU_SLOTS) if is_gpu else (_CPU_SLOTS, _MAX_CPU_SLOTS)
        # Each sequence that decodes is a token of the step.
        fitting = room.cache_tokens // min(room.context_tokens, _LEAST_TOKENS)
        most = max(1, min(most, fitting, batch_tokens or most))
        fitting = room.cache_tokens // min(room.context_tokens, _COMMON_TOKENS)
        slots_by = "memory" if fitting < first else "device"
        first = min(max(2, min(first, fitting)), most)  # one has no halves to compare
    tokens_by: Reason = "asked"
    tokens = most_tokens = batch_tokens or 0
    if batch_tokens is None:
        tokens, most_tokens = (
            (_GPU_BATCH_TOKENS, _MAX_GPU_BATCH_TOKENS)
            if is_gpu
            else (HF_BATCH_TOKENS, _MAX_CPU_BATCH_TOKENS)
        )
        if room.masks_cache:
            tokens = most_tokens = HF_BATCH_TOKENS
        tokens_by = "device"
        while room.step_bytes * most_tokens > _STEP_SHARE * room.free_bytes and most_tokens > 1:
            most_tokens //= 2
        if most_tokens < tokens:
            tokens_by = "memory"
        most_tokens = max(most_tokens, most)
        tokens = min(max(tokens, most), most_tokens)
    wanted = (most if is_gpu else first) * room.context_tokens
    if slots is None and not is_gpu:
        # A CPU's memory is everybody's: there is room for the whole context of some, and for what
        # all that it begins with are likely to need.
        wanted = min(wanted, max(HF_SLOTS * room.context_tokens, first * _COMMON_TOKENS))
    cache_by: Reason = "memory" if room.cache_tokens < wanted else slots_by
    if is_cache_set:
        wanted, cache_by = room.cache_tokens, "asked"
    return Start(
        slots=first,
        max_slots=most,
        slots_by=slots_by,
        batch_tokens=max(tokens, most),
        max_batch_tokens=max(most_tokens, most),
        batch_tokens_by=tokens_by,
        cache_tokens=min(room.cache_tokens, wanted),
        cache_tokens_by=cache_by,
    )


def choose_vllm(
    size: ModelSize | None,
    *,
    weight_bytes: int,
    device_bytes: int,
    share: float,
    num_gpus: int,
    context_tokens: int | None,
) -> tuple[int, int | None]:
    """Return vLLM's most sequences, and the token budget of a step (None: vLLM's own).

    Both are fixed once it runs, so they are generous: who finds no cache waits, and evictions
    lower the number that vLLM is given.

    Args:
        size: None where the model's files do not tell.
        device_bytes: memory of each GPU; 0: it runs on a CPU.
        share: of it, that vLLM takes.
    """
    if not device_bytes:
        return VLLM_SLOTS, None
    is_large = device_bytes >= _LARGE_GPU_BYTES
    batch_tokens = VLLM_BATCH_TOKENS if is_large else _SMALL_VLLM_BATCH_TOKENS
    if size is None:
        return VLLM_SLOTS, batch_tokens
    left = num_gpus * (share * device_bytes - OVERHEAD_BYTES["vllm"]) - weight_bytes
    cached = max(0, int(left)) // max(1, size.cache_bytes_per_token)
    each = min(context_tokens or size.context_tokens, _COMMON_TOKENS)
    most = _MAX_VLLM_SLOTS if is_large else VLLM_SLOTS
    return max(1, min(most, cached // each)), batch_tokens


_GAIN = 0.03
"""A change that brings less for each token is none."""
_NUM_COMPARISONS, _MAX_COMPARISONS = 12, 36
_CLEAR = (0.9, 1.0)
"""Outside of these a dozen comparisons tell whether it pays; within, more are made."""
_FEW_COMPARISONS, _CLEAR_SOON = 6, (0.7, 1.3)
"""Outside of these so few tell."""
_CALM_STEPS = 4
"""Ordinary steps between two comparisons, so that prompts get on."""
_FULL = 0.9
"""Share of the slots in use from which they count as all."""
_BUDGET_STEPS = 64
_LOOK_STEPS = 256
_OTHER_WORK = 2.0
"""By so much the mean length of sequences has to change for another look at the slots."""


class Climb:
    """The search for the fewest slots with which a token costs no more than with the best.

    It goes up by doubling while that pays, else down; it never turns twice.
    """

    def __init__(self, *, first: int, most: int) -> None:
        self.level = first
        self.is_settled = first >= most and first <= 1
        self._most = most
        # What begins with many is not led to a few by measurements: a short answer, or a machine
        # that others use, would hide what they are good for.
        self._least = max(1, first // 4)
        self._came_from: int | None = None
        self._is_going_down = False
        self._kept = 1.0

    def judge(self, ratio: float) -> None:
        """Take in what a token cost in whole steps, over what it cost in steps of half as many."""
        if ratio < 1 - _GAIN:
            if self._is_going_down or self.level >= self._most:
                self.is_settled = True
            else:
                self._came_from = self.level
                self.level = min(2 * self.level, self._most)
            return
        if self._came_from is not None:
            self.level = self._came_from  # what it came from is as good
            self.is_settled = True
            return
        self._kept *= min(1.0, ratio)
        if self._kept < 1 - _GAIN or self.level // 2 < self._least:
            self.is_settled = True
            return
        self._is_going_down = True
        self.level //= 2

    def reopen(self) -> None:
        """Search again from where it stands: the work is another."""
        self.is_settled = False
        self._came_from, self._is_going_down, self._kept = None, False, 1.0


class Fitting:
    """How many sequences the cache has been seen to hold; falls at once, and rises slowly."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bound = most
        self.num_evictions = 0
        self._quiet = 0
        self._patience = _BUDGET_STEPS

    def note(self, *, num_running: int, num_evicted: int) -> None:
        """Take in a step: who ran, and how many lost their cache for it."""
        if num_evicted:
            self.num_evictions += num_evicted
            if self._quiet:  # a burst is one lesson
                self._patience = min(2 * self._patience, 1 << 14)
            self.bound = max(1, min(self.bound, num_running))
            self._quiet = 0
            return
        self._quiet += 1
        if self.bound < self.most and self._quiet >= self._patience:
            self.bound = min(self.most, self.bound + max(1, self.bound // 16))
            self._quiet = 1


class Tuner:
    """Follows the steps of an engine, and says how many sequences and tokens the next one has.

    Slots are judged by comparing a whole step with two that have every second sequence each: the
    same sequences, one after the other, so neither their growing nor what else the machine does
    can tell the arms apart. No step is lost to it, and no sequence ends for it.
    """

    def __init__(self, start: Start, *, is_live: bool = True) -> None:
        """Begin.

        Args:
            is_live: whether steps may change what was chosen; what was asked for never changes.
        """
        self._start = start
        self._tunes_slots = is_live and start.slots_by != "asked"
        self._tunes_tokens = is_live and start.batch_tokens_by != "asked"
        self._climb = Climb(first=start.slots, most=start.max_slots)
        self._fitting = Fitting(start.max_slots)
        self._ceiling = Ceiling()
        self._batch_tokens = start.batch_tokens
        self._tokens_by = start.batch_tokens_by
        self._queue: list[Part] = []
        self._wholes: list[float] = []  # what each token cost
        self._halves: list[float] = []
        self._num_comparisons = 0
        self._num_judged = 0
        self._calm = 0
        self._num_steps = self._num_short = self._num_running = 0
        self._context = self._context_then = 0.0
        self._look_at, self._look_steps = 0, _LOOK_STEPS

    @property
    def limit(self) -> int:
        """How many sequences there may be at once."""
        return min(self._wanted, self._ceiling.slots or self._wanted)

    @property
    def _wanted(self) -> int:
        """How many there would be if no step had run out of memory."""
        if not self._tunes_slots:
            return self._start.slots
        return min(self._climb.level, self._fitting.bound)

    @property
    def batch_tokens(self) -> int:
        """How many tokens a step may have."""
        return min(self._batch_tokens, self._ceiling.batch_tokens or self._batch_tokens)

    def next_part(self) -> Part:
        """Return who is to take part in the next step."""
        if not self._queue and self._may_compare():
            # Neither arm is always first.
            self._queue = ["decoding", "even", "odd"]
            if self._num_comparisons % 2:
                self._queue.reverse()
        return self._queue[0] if self._queue else "all"

    def skip(self) -> None:
        """Note that there was nobody for the step."""
        self._queue.clear()
        self._calm = 0

    def shrink(self, *, num_rows: int, num_tokens: int) -> bool:
        """Take in a step that ran out of memory; return whether a smaller one may do.

        What was asked for is lowered too. See `Ceiling.shrink`.
        """
        self.skip()
        return self._ceiling.shrink(num_rows=num_rows, num_tokens=num_tokens)

    def note(
        self,
        *,
        num_rows: int,
        num_tokens: int,
        num_cached: int,
        num_waiting: int,
        num_evicted: int,
        seconds: float,
    ) -> None:
        """Take in a step.

        Args:
            num_rows: sequences that got a token.
            num_tokens: tokens that were computed, those of prompts too.
            num_cached: tokens of those sequences in the cache before.
            num_waiting: sequences that are queued behind them.
            num_evicted: sequences that lost their cache.
        """
        self._ceiling.note_step(most_slots=self._wanted, most_tokens=self._batch_tokens)
        if self._queue:
            self._fitting.note(num_running=self._num_running, num_evicted=num_evicted)
            self._note_part(num_rows=num_rows, seconds=seconds)
            return
        self._fitting.note(num_running=num_rows, num_evicted=num_evicted)
        self._num_running = num_rows
        self._num_steps += 1
        if num_rows:
            self._context += (num_cached / num_rows - self._context) / _CALM_STEPS
        limit = self.limit
        is_full = _FULL * limit <= num_rows <= limit / _FULL
        self._calm = self._calm + 1 if is_full else 0
        self._note_budget(
            is_short=num_waiting > 0
            and num_tokens >= self._batch_tokens
            and num_rows < _FULL * limit
        )
        if self._tunes_slots and self._climb.is_settled and self._num_steps >= self._look_at:
            self._look_again()

    def report(self, *, cache_tokens: int) -> Tuning:
        """Return what is in force."""
        slots_by: Reason = self._start.slots_by
        if self._tunes_slots:
            if self._fitting.bound < self._climb.level:
                slots_by = "evictions"
            elif self._num_judged:
                slots_by = "steps"
        if self.limit < self._wanted:
            slots_by = "shortage"
        is_short = self.batch_tokens < self._batch_tokens
        return Tuning(
            slots=self.limit,
            max_slots=self._start.max_slots,
            slots_by=slots_by,
            batch_tokens=self.batch_tokens,
            batch_tokens_by="shortage" if is_short else self._tokens_by,
            cache_tokens=cache_tokens,
            cache_tokens_by=self._start.cache_tokens_by,
            num_comparisons=self._num_comparisons,
            num_evictions=self._fitting.num_evictions,
            num_shrinks=self._ceiling.num_shrinks,
        )

    def _may_compare(self) -> bool:
        return (
            self._tunes_slots
            and not self._climb.is_settled
            and self._calm >= _CALM_STEPS
            and self._climb.level > 1
            and self._fitting.bound >= self._climb.level
            and self._ceiling.slots is None
        )

    def _note_part(self, *, num_rows: int, seconds: float) -> None:
        costs = self._wholes if self._queue.pop(0) == "decoding" else self._halves
        costs.append(seconds / max(1, num_rows))
        if self._queue:
            return
        self._calm = 0
        self._num_comparisons += 1
        num_made = len(self._wholes)
        if num_made % (_FEW_COMPARISONS if num_made < _NUM_COMPARISONS else _NUM_COMPARISONS) == 0:
            self._judge()

    def _judge(self) -> None:
        # Whatever disturbs a step makes it longer.
        whole, half = _lower_quartile(self._wholes), _lower_quartile(self._halves)
        if half <= 0:
            self._climb.is_settled = True  # too quick for the clock: nobody can tell
        else:
            ratio, num_made = whole / half, len(self._wholes)
            low, high = _CLEAR if num_made >= _NUM_COMPARISONS else _CLEAR_SOON
            if low < ratio < high and num_made < _MAX_COMPARISONS:
                return
            self._climb.judge(ratio)
        self._wholes.clear()
        self._halves.clear()
        self._num_judged += 1
        self._context_then = self._context
        self._look_at = self._num_steps + self._look_steps

    def _note_budget(self, *, is_short: bool) -> None:
        """Raise the token budget where it kept slots empty in half of the last steps."""
        self._num_short += is_short
        if self._num_steps % _BUDGET_STEPS:
            return
        is_too_small, self._num_short = 2 * self._num_short >= _BUDGET_STEPS, 0
        most = self._start.max_batch_tokens
        if self._tunes_tokens and is_too_small and self._batch_tokens < most:
            self._batch_tokens = min(2 * self._batch_tokens, most)
            self._tokens_by = "steps"

    def _look_again(self) -> None:
        """Search again where sequences have become longer or shorter; each time later."""
        self._look_at = self._num_steps + self._look_steps
        before, now = self._context_then, self._context
        if max(before, now) > _OTHER_WORK * min(before, now):
            self._look_steps *= 2
            self._climb.reopen()


def _lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


_REASONS: dict[Reason, str] = {
    "asked": "as set",
    "device": "by the kind of device",
    "memory": "by the memory",
    "engine": "by the engine",
    "steps": "by measured steps",
    "evictions": "by what the cache held",
    "shortage": "since a step ran out of memory",
}


def render_tuning(tuning: Tuning) -> str:
    """Return one line for people: how many, and what decided it."""
    of = f" of {tuning.max_slots:,}" if tuning.max_slots != tuning.slots else ""
    parts = [f"{tuning.slots:,}{of} slots ({_REASONS[tuning.slots_by]})"]
    if tuning.batch_tokens:
        by = _REASONS[tuning.batch_tokens_by]
        parts.append(f"{tuning.batch_tokens:,} tokens a step ({by})")
    if tuning.cache_tokens:
        by = _REASONS[tuning.cache_tokens_by]
        parts.append(f"cache of {tuning.cache_tokens:,} tokens ({by})")
    return ", ".join(parts)
