import itertools
import random
from collections.abc import Callable

import pytest

from engine.memory import ModelSize, size_of
from engine.tuning import (
    Fitting,
    Part,
    Room,
    Start,
    Tuner,
    Tuning,
    choose_hf,
    choose_vllm,
    render_tuning,
)

GB = 10**9
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
KIB_PER_TOKEN = 128

# --- what an engine begins with ---


def room(device: str, free_bytes: int, token_bytes: int, *, context_tokens: int) -> Room:
    return Room(
        device="cuda" if device == "cuda" else "cpu",
        cache_tokens=int(free_bytes * (0.8 if device == "cuda" else 0.25)) // token_bytes,
        context_tokens=context_tokens,
        step_bytes=2 * (6 * 4096 + 3 * 14336),
        free_bytes=free_bytes,
    )


def begin(found: Room, slots: int | None = None, batch_tokens: int | None = None) -> Start:
    return choose_hf(found, slots=slots, batch_tokens=batch_tokens)


def test_a_large_gpu_begins_below_the_ridge_and_may_go_beyond_it() -> None:
    found = begin(room("cuda", 120 * GB, KIB_PER_TOKEN << 10, context_tokens=8192))
    assert (found.slots, found.max_slots, found.slots_by) == (128, 512, "device")
    assert (found.batch_tokens, found.max_batch_tokens) == (2048, 8192)
    assert found.cache_tokens == int(96 * GB) // (KIB_PER_TOKEN << 10)
    assert found.cache_tokens_by == "memory"


def test_a_small_gpu_begins_with_what_its_cache_has_room_for() -> None:
    # A T4 with 7 billion parameters in 4 bits: 32 heads and no groups are 512 KiB a token.
    found = begin(room("cuda", 10 * GB, 512 << 10, context_tokens=4096))
    assert (found.slots, found.max_slots, found.slots_by) == (29, 119, "memory")
    assert found.cache_tokens == 8 * GB // (512 << 10)
    # Its steps are held to a twentieth of what is free.
    assert 2 * (6 * 4096 + 3 * 14336) * found.max_batch_tokens <= 0.05 * 10 * GB


def test_a_cpu_begins_with_all_slots_and_leaves_memory_to_others() -> None:
    found = begin(room("cpu", 8 * GB, 1024, context_tokens=2048))
    assert (found.slots, found.max_slots, found.slots_by) == (128, 128, "device")
    assert (found.batch_tokens, found.max_batch_tokens) == (512, 2048)
    assert found.cache_tokens == 32 * 2048


def test_short_contexts_all_find_room_on_a_cpu() -> None:
    for context in (128, 512):
        found = begin(room("cpu", 8 * GB, 1024, context_tokens=context))
        assert found.cache_tokens == 128 * context
    # What was asked for has room for all of the context of each.
    asked = begin(room("cpu", 64 * GB, 1024, context_tokens=2048), slots=48)
    assert asked.cache_tokens == 48 * 2048


def test_a_dense_mask_keeps_steps_short() -> None:
    found = choose_hf(
        Room(device="cuda", cache_tokens=500_000, context_tokens=8192, masks_cache=True),
        slots=None,
        batch_tokens=None,
    )
    assert found.batch_tokens == found.max_batch_tokens == 512


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_is_set_stays_as_it_is(device: str) -> None:
    found = begin(room(device, 20 * GB, 1 << 17, context_tokens=4096), 7, 100)
    assert (found.slots, found.max_slots, found.slots_by) == (7, 7, "asked")
    assert (found.batch_tokens, found.max_batch_tokens, found.batch_tokens_by) == (
        *(100, 100),
        "asked",
    )
    # A token budget alone bounds the slots: each that decodes is a token of the step.
    alone = begin(room(device, 20 * GB, 1 << 17, context_tokens=4096), None, 16)
    assert (alone.max_slots, alone.batch_tokens) == (16, 16)
    # Slots alone raise it.
    assert begin(room("cpu", GB, 512, context_tokens=64), 900).batch_tokens == 900


def test_there_is_always_one_slot() -> None:
    found = begin(Room(device="cpu", cache_tokens=64, context_tokens=2048, step_bytes=1))
    assert (found.slots, found.max_slots, found.batch_tokens) == (1, 1, 1)
    assert found.cache_tokens == 64
    # Of two, one can be half.
    assert begin(Room(device="cpu", cache_tokens=300, context_tokens=2048)).slots == 2


def large() -> ModelSize:
    found = size_of(LLAMA_8B)
    assert found is not None
    return found


def vllm(size: ModelSize | None, gigabytes: int, **changes: int) -> tuple[int, int | None]:
    return choose_vllm(
        size,
        **{
            "weight_bytes": 16 * GB,
            "device_bytes": gigabytes * GB,
            "share": 0.9,
            "num_gpus": 1,
            "context_tokens": None,
            **changes,  # type: ignore[arg-type]  # numbers
        },
    )


def test_vllm_gets_what_the_memory_of_its_gpus_holds() -> None:
    assert vllm(large(), 141) == (1024, 8192)
    # 24 GB less a tenth, less 16 GB of weights and 2 GB of what is beside them: 3.6 GB of cache.
    slots, tokens = vllm(large(), 24)
    assert (slots, tokens) == (int(3.6 * GB) // large().cache_bytes_per_token // 512, 2048)
    assert vllm(large(), 24, num_gpus=2)[0] > 2 * slots
    assert vllm(large(), 24, context_tokens=64)[0] == 256
    assert vllm(large(), 10) == (1, 2048), "whether it fits is for others to say"


def test_vllm_keeps_its_own_choice_where_nothing_is_known() -> None:
    assert vllm(None, 141) == (256, 8192)
    assert vllm(large(), 0) == (256, None)


# --- what follows from the steps ---

Cost = Callable[[int], float]


class Machine:
    """Runs steps of a queue that never ends, each taking what a cost model says."""

    def __init__(self, tuner: Tuner, cost: Cost, *, holds: int = 10**9, noise: float = 0.0) -> None:
        self.tuner = tuner
        self._cost = cost
        self._holds = holds
        self._noise = noise
        self._rng = random.Random(7)
        self.running = 0
        self.context = 100.0
        self.drift = 0.0
        self.num_steps = 0
        self.seconds = 0.0
        self.num_tokens = 0
        self.limits: list[int] = []
        self.parts: list[Part] = []

    def step(self) -> None:
        part = self.tuner.next_part()
        num_evicted = 0
        if part == "all":
            # One in twenty ends, and others take their places.
            self.running -= sum(self._rng.random() < 0.05 for _ in range(self.running))
            self.running = max(self.running, min(self.tuner.limit, self.running + 16))
            if self.running > self._holds:
                num_evicted, self.running = self.running - self._holds, self._holds
        rows = {
            "all": self.running,
            "decoding": self.running,
            "even": (self.running + 1) // 2,
            "odd": self.running // 2,
        }[part]
        seconds = self._cost(rows) * (1 + self.drift * self.num_steps)
        if self._noise:
            seconds *= 1 + self._rng.expovariate(1 / self._noise)
        self.tuner.note(
            num_rows=rows,
            num_tokens=rows,
            num_cached=int(rows * self.context),
            num_waiting=1,
            num_evicted=num_evicted,
            seconds=seconds,
        )
        self.num_steps += 1
        self.seconds += seconds
        self.num_tokens += rows
        self.limits.append(self.tuner.limit)
        self.parts.append(part)

    def run(self, num_steps: int) -> int:
        for _ in range(num_steps):
            self.step()
        return self.tuner.limit


def start(slots: int = 32, max_slots: int = 256, **changes: object) -> Start:
    values: dict[str, object] = {
        "slots_by": "device",
        "batch_tokens": 512,
        "max_batch_tokens": 2048,
        "batch_tokens_by": "device",
        "cache_tokens": 10**6,
        **changes,
    }
    return Start(slots=slots, max_slots=max_slots, **values)  # type: ignore[arg-type]


def fixed_and(per_row: float, knee: int) -> Cost:
    """A step has a cost of its own up to `knee` rows, from where each row costs its own."""
    return lambda rows: max(knee * per_row, rows * per_row) + 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_slots_are_doubled_as_long_as_that_pays(noise: float) -> None:
    machine = Machine(Tuner(start()), fixed_and(1e-4, knee=100), noise=noise)
    assert machine.run(1000) == 128
    # It climbed, tried twice as many, and went back; from then on nothing moved.
    assert [
        n for n, before in zip(machine.limits, [0, *machine.limits], strict=False) if n != before
    ] == [
        *(32, 64, 128),
        256,
        128,
    ]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_what_pays_clearly_is_seen_after_a_few_comparisons(noise: float) -> None:
    def comparisons(cost: Cost, slots: int) -> int:
        tuner = Tuner(start())
        machine = Machine(tuner, cost, noise=noise)
        while tuner.limit == slots:
            machine.step()
        return tuner.report(cache_tokens=1).num_comparisons

    assert comparisons(lambda _rows: 0.01, 32) == 6
    # Half of them cost 13 % more each: that is not told from chance so soon.
    assert comparisons(lambda rows: 0.001 + rows * 2e-4, 32) >= 12


def test_slots_go_to_all_there_is_room_for_where_a_step_costs_the_same() -> None:
    assert Machine(Tuner(start(max_slots=200)), lambda _rows: 0.01).run(600) == 200


def test_slots_that_bring_nothing_are_given_up_as_far_as_a_quarter() -> None:
    tuner = Tuner(start(slots=64))
    assert Machine(tuner, lambda rows: rows * 1e-4).run(600) == 16
    assert tuner.report(cache_tokens=1).slots_by == "steps"


def test_small_losses_do_not_add_up_on_the_way_down() -> None:
    # Each halving costs 2 %: one is taken, two are more than what a change may cost.
    def cost(rows: int) -> float:
        return rows * next(
            each for most, each in ((8, 1.06), (16, 1.04), (32, 1.02), (64, 1.0)) if rows <= most
        )

    assert Machine(Tuner(start(slots=64, max_slots=64)), cost).run(600) == 32


def test_steps_that_grow_longer_all_the_time_deceive_nobody() -> None:
    # Sequences grow, or others take the machine: each step is a little longer than the last.
    machine = Machine(Tuner(start()), fixed_and(1e-4, knee=100))
    machine.drift = 0.01
    assert machine.run(600) == 128


def test_measuring_costs_little() -> None:
    def cost(rows: int) -> float:
        return 0.002 + rows * 1e-4

    tuned, still = Machine(Tuner(start()), cost), Machine(Tuner(start(), is_live=False), cost)
    tuned.run(400)
    still.run(400)
    assert tuned.num_tokens / tuned.seconds > 0.97 * still.num_tokens / still.seconds
    # A plain step stays: no part of the batch waits for more than a comparison.
    assert "all" in tuned.parts[-9:]


def test_a_search_ends_and_begins_again_only_with_other_work() -> None:
    tuner = Tuner(start())
    machine = Machine(tuner, fixed_and(1e-4, knee=100))
    machine.run(1000)
    settled = tuner.report(cache_tokens=1).num_comparisons
    machine.run(2000)
    assert tuner.report(cache_tokens=1).num_comparisons == settled
    machine.context = 1000
    machine.run(1000)
    assert tuner.report(cache_tokens=1).num_comparisons > settled


def test_too_few_sequences_are_not_judged() -> None:
    tuner = Tuner(start())
    for _ in range(300):
        assert tuner.next_part() == "all"
        tuner.note(
            num_rows=10, num_tokens=10, num_cached=99, num_waiting=0, num_evicted=0, seconds=1.0
        )
    assert tuner.limit == 32


def test_a_step_without_anybody_ends_a_comparison() -> None:
    tuner = Tuner(start())
    machine = Machine(tuner, lambda _rows: 0.01)
    while tuner.next_part() == "all":
        machine.step()
    tuner.skip()
    assert tuner.next_part() == "all"


def test_steps_too_quick_for_the_clock_decide_nothing() -> None:
    machine = Machine(Tuner(start()), lambda _rows: 0.0)
    assert machine.run(600) == 32
    assert set(machine.parts[200:]) == {"all"}


def test_nothing_moves_that_was_asked_for_or_is_not_to_be_tuned() -> None:
    for asked in (
        Tuner(start(slots_by="asked", batch_tokens_by="asked")),
        Tuner(start(), is_live=False),
    ):
        machine = Machine(asked, lambda _rows: 0.01, holds=20)
        assert machine.run(600) == 32
        assert set(machine.parts) == {"all"}
        assert asked.batch_tokens == 512


def test_a_budget_that_keeps_slots_empty_is_doubled_up_to_the_most() -> None:
    tuner = Tuner(start())
    for _ in range(64):
        tuner.note(
            num_rows=4, num_tokens=512, num_cached=0, num_waiting=9, num_evicted=0, seconds=0.1
        )
    assert tuner.batch_tokens == 1024
    assert tuner.report(cache_tokens=1).batch_tokens_by == "steps"
    for _ in range(640):
        tuner.note(
            num_rows=4, num_tokens=2048, num_cached=0, num_waiting=9, num_evicted=0, seconds=0.1
        )
    assert tuner.batch_tokens == 2048


def test_a_budget_stays_where_slots_are_full_or_nobody_waits() -> None:
    for rows, waiting in ((32, 9), (4, 0)):
        tuner = Tuner(start())
        for _ in range(640):
            tuner.note(
                num_rows=rows,
                num_tokens=512,
                num_cached=0,
                num_waiting=waiting,
                num_evicted=0,
                seconds=0.1,
            )
        assert tuner.batch_tokens == 512


def test_no_more_sequences_run_than_the_cache_was_seen_to_hold() -> None:
    tuner = Tuner(start(slots=128))
    machine = Machine(tuner, lambda _rows: 0.01, holds=40)
    assert machine.run(40) == 40
    report = tuner.report(cache_tokens=1)
    assert (report.slots, report.slots_by) == (40, "evictions")
    assert report.num_evictions > 0


def test_after_evictions_the_number_rises_slowly_and_ever_more_seldom() -> None:
    fitting = Fitting(100)
    changes = []
    for step in range(20_000):
        before = fitting.bound
        num_evicted = max(0, before - 40)
        fitting.note(num_running=min(before, 40), num_evicted=num_evicted)
        if fitting.bound < before:
            changes.append(step)
    assert fitting.bound <= 42
    gaps = [late - early for early, late in itertools.pairwise(changes)]
    assert gaps == sorted(gaps)
    assert len(changes) < 12


def test_a_cache_that_has_room_again_is_used_again() -> None:
    fitting = Fitting(64)
    fitting.note(num_running=16, num_evicted=3)
    assert fitting.bound == 16
    for _ in range(64 * 64):
        fitting.note(num_running=16, num_evicted=0)
    assert fitting.bound == 64


# --- what people read ---


def test_a_report_says_how_many_and_what_decided_it() -> None:
    said = render_tuning(
        Tuning(
            slots=64,
            max_slots=128,
            slots_by="steps",
            batch_tokens=2048,
            batch_tokens_by="device",
            cache_tokens=120_000,
            cache_tokens_by="memory",
        )
    )
    assert said == (
        "64 of 128 slots (by measured steps), 2,048 tokens a step (by the kind of device), cache "
        "of 120,000 tokens (by the memory)"
    )
    assert render_tuning(Tuning(slots=8, max_slots=8, slots_by="asked")) == "8 slots (as set)"
