"""Everything that can happen to the protocol of leases, looked at state by state."""

from dataclasses import dataclass

from typing_extensions import override

from tests.model.protocol import ENDED_BATCH, ENDED_UNIT, SHARD, Protocol, Rule, State, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found: the first rule that broke and the shortest way there, or none.

    `statuses` are those that the batch was seen in.
    """

    num_states: int
    statuses: frozenset[str]
    broken: Rule | None = None
    trace: tuple[str, ...] = ()

    @override
    def __str__(self) -> str:
        if self.broken is None:
            return f"{self.num_states} states, nothing broken"
        steps = "\n".join(f"{n:3}. {words}" for n, words in enumerate(self.trace, start=1))
        return f"{self.broken.value}: broken after\n{steps}"


def _broken_state(state: State, rules: frozenset[Rule]) -> Rule | None:
    published = state.batch.published
    if published is not None:
        if Rule.COMPLETE in rules and 0 in published:
            return Rule.COMPLETE
        if Rule.UNIQUE in rules and any(count > 1 for count in published):
            return Rule.UNIQUE
    for shard in state.shards:
        union = total = 0
        for _, _, positions in shard.segments:
            if Rule.ROWS in rules and union & positions:
                return Rule.ROWS
            union |= positions
            total += positions.bit_count()
        if Rule.HONEST in rules and (union != shard.done or total != shard.counted):
            return Rule.HONEST
    return None


def _changes_what_ended(before: State, after: State) -> bool:
    if before.batch.status in ENDED_BATCH and before.batch != after.batch:
        return True
    for number, (old, new) in enumerate(zip(before.units, after.units, strict=True)):
        if old.state not in ENDED_UNIT:
            continue
        if old.state != new.state:
            return True
        if old.kind == SHARD and before.shards[number - 1].done != after.shards[number - 1].done:
            return True
    return False


class _Search:
    """What was seen so far, in the order of the number of steps."""

    def __init__(self, first: State) -> None:
        self.states = [first]
        self.numbers = {first: 0}
        self.came: list[tuple[int, str]] = [(-1, "")]
        self.before: list[list[int]] = [[]]

    def add(self, step: Step, current: int) -> None:
        """Note where a step led."""
        number = self.numbers.get(step.state)
        if number is None:
            number = self.numbers[step.state] = len(self.states)
            self.states.append(step.state)
            self.came.append((current, step.words))
            self.before.append([])
        self.before[number].append(current)

    def trace(self, number: int) -> tuple[str, ...]:
        """Return the steps to a state."""
        words: list[str] = []
        while number:
            number, step = self.came[number]
            words.append(step)
        return tuple(reversed(words))

    def find_stuck(self) -> int | None:
        """Return the first state from which the batch cannot end."""
        ends = [n for n, state in enumerate(self.states) if state.batch.status in ENDED_BATCH]
        can_end = set(ends)
        while ends:
            new = [number for number in self.before[ends.pop()] if number not in can_end]
            can_end.update(new)
            ends += new
        return next((n for n in range(len(self.states)) if n not in can_end), None)

    def found(self, broken: Rule | None = None, trace: tuple[str, ...] = ()) -> Found:
        """Return what the search came to."""
        statuses = frozenset(state.batch.status for state in self.states)
        return Found(num_states=len(self.states), statuses=statuses, broken=broken, trace=trace)


def search(protocol: Protocol, *, rules: frozenset[Rule] = frozenset(Rule)) -> Found:
    """Return what breaks first, in the fewest steps, among everything that can happen."""
    seen = _Search(protocol.first())
    current = 0
    while current < len(seen.states):
        state = seen.states[current]
        for step in protocol.steps(state):
            broken = step.broken if step.broken in rules else None
            if broken is None and step.state not in seen.numbers:
                broken = _broken_state(step.state, rules)
            if broken is None and Rule.FINAL in rules and _changes_what_ended(state, step.state):
                broken = Rule.FINAL
            if broken is not None:
                return seen.found(broken, (*seen.trace(current), step.words))
            seen.add(step, current)
        current += 1
    stuck = seen.find_stuck() if Rule.ENDS in rules else None
    return seen.found() if stuck is None else seen.found(Rule.ENDS, seen.trace(stuck))
