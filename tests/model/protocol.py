"""The protocol of leases as a small transition system, for the exhaustive search beside it.

One batch of one plan, its shards and its finalizer; workers that claim, write, commit, give back,
crash, and wait for as long as they like between any two steps; a sweeper; a client that cancels.
Each method that is named like a function of `storage` does to a `State` what that function does to
the rows, in the same order. A transaction is one step: rows are locked in the code, and the tests
of races run the real ones beside each other. Its reply may be lost, and then the worker does not
know and may do the same again.

What is left out, and why nothing is lost by it:

- time: a lease may be reaped, a window may pass and a wait may end at any moment;
- wake-ups: any worker may claim at any moment, so it does not matter which of them arrive;
- `renew`, `poke_due`: they change no state and no epoch;
- counts of lost leases: a reap gives the unit back or gives it up, as it likes;
- the size of an epoch: only which epochs are equal, and that a new one is the largest. `_renamed`
  numbers them anew in every state, so the search ends although leases may be lost for ever.

Each guard of the code is a switch; a search without one shows what it was for.

Source: the transitions T1 to T9 and the invariants I1 to I7 of the reliability notes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")

# Plain strings: the hash of an enum's member is several times as slow.
PENDING, LEASED, DONE, FAILED = "pending", "leased", "done", "failed"
CANCELLED, EXPIRED, ABSENT = "cancelled", "expired", "absent"
VALIDATING, IN_PROGRESS, FINALIZING = "validating", "in_progress", "finalizing"
CANCELLING, COMPLETED = "cancelling", "completed"
PLAN, SHARD, FINALIZE = "plan", "shard", "finalize"

ENDED_UNIT = frozenset({DONE, FAILED, CANCELLED, EXPIRED})
ENDED_BATCH = frozenset({COMPLETED, FAILED, CANCELLED, EXPIRED})
_NOBODY = -1
_WORKERS = "ABCD"


class Guard(Enum):
    """What the code checks, by function and check."""

    RECORD_EPOCH = "segments.record compares the epoch"
    RECORD_STATE = "segments.record asks for a leased unit"
    RECORD_OVERLAP = "segments.record refuses a line that has its result"
    RECORD_KEY = "a segment's key is unique, and its writer recognises it"
    SETTLE_FENCE = "units.settle locks the unit and compares the epoch"
    SETTLE_STATE = "units.settle names the state it leaves"
    PLAN_FENCE = "batches.record_plan locks the unit and compares the epoch"
    PLAN_ONCE = "batches.record_plan looks at planned_at"
    PLAN_STATUS = "a batch is planned while it is validating"
    PLAN_KEY = "a shard's ordinal is unique in its batch"
    COMPLETE_FENCE = "batches.complete locks the unit and compares the epoch"
    COMPLETE_STATUS = "files are published while a batch is finalizing or cancelling"
    CANCEL_STATUS = "a batch that ended is not cancelled"
    FROZEN = "the trigger on rows that ended"
    RECOUNT = "the finalizer counts what it wrote"
    REAP_EPOCH = "units.reap raises the epoch"
    CLAIM_STATE = "units.claim asks for a pending unit as it writes"
    CLAIM_LOCK = "units.claim locks the unit it chose"
    RELEASE_STOP = "a unit given back by a batch that was stopped ends"
    SWEEP_STOP = "batches.advance_finished ends pending units of a batch that was stopped"
    END_ADVANCE = "who ends the last unit inserts the finalizer's"
    SWEEP_ADVANCE = "batches.advance_finished inserts the finalizer's"


class Rule(Enum):
    """What has to hold in every state, or over every step."""

    COMPLETE = "I1: a published batch has a record of each line"
    UNIQUE = "I2: no line is published twice"
    ROWS = "I2: no line is in two segments"
    FENCED = "I3: who lost a lease changes nothing by it"
    TOLD = "I3: who lost a lease is not told that it ended the unit"
    ONE_LEASE = "a unit that is leased is not leased again"
    ONE_PLAN = "the shards of a batch are inserted once"
    FINAL = "I4: what has ended stays as it is"
    ENDS = "I5: the batch can still end"
    HONEST = "I7: the counts are those of the segments"


class Batch(NamedTuple):
    """The row of the batch; `published` has the number of records of each line."""

    status: str = VALIDATING
    ending: str = ""
    planned: bool = False
    published: tuple[int, ...] | None = None


class Unit(NamedTuple):
    """The row of a unit."""

    kind: str
    state: str
    epoch: int = 0
    owner: int = _NOBODY


class Shard(NamedTuple):
    """The row of a shard and its segments: epoch, sequence and positions of each."""

    done: int = 0
    counted: int = 0
    segments: tuple[tuple[int, int, int], ...] = ()


class Held(NamedTuple):
    """What a worker knows of the unit it holds, or believes to hold.

    `lost` is known to nobody: whether the lease was taken from it. `known` are the positions it
    believes done, `writing` those of a blob that is written and not yet known to be committed,
    `gathered` what a finalizer has written: the number of records of each line.
    """

    unit: int
    epoch: int
    lost: bool = False
    known: int = 0
    sequence: int = 0
    writing: int = 0
    gathered: tuple[int, ...] | None = None


class State(NamedTuple):
    """All there is. Units are the plan, the shards and the finalizer's, in this order."""

    batch: Batch
    units: tuple[Unit, ...]
    shards: tuple[Shard, ...]
    workers: tuple[Held | None, ...]


class Step(NamedTuple):
    """Something that can happen: its words, the state after it, and the rule it breaks."""

    words: str
    state: State
    broken: Rule | None = None


class _LeaseLostError(Exception):
    """`LeaseLost`."""


class _RefusedError(Exception):
    """`Conflict` and `IllegalTransition`: nothing is written."""


class _BrokenError(Exception):
    """A step broke a rule."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule.value)
        self.rule = rule


def _number_of(positions: int) -> str:
    lines = [str(p) for p in range(positions.bit_length()) if positions >> p & 1]
    return ("line " if len(lines) == 1 else "lines ") + ", ".join(lines)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The transition system: how large it is, what it lacks, what may happen to it.

    `loses_rows`: a segment's row may vanish while the files are written, as after a failover to a
    replica that lags.
    """

    lines: tuple[int, ...] = (2,)
    num_workers: int = 2
    without: frozenset[Guard] = frozenset()
    loses_rows: bool = False

    # --- what can happen ---

    def first(self) -> State:
        """Return the state after `batches.insert`."""
        units = [Unit(PLAN, PENDING)]
        units += [Unit(SHARD, ABSENT) for _ in self.lines]
        units += [Unit(FINALIZE, ABSENT)]
        return State(
            Batch(), tuple(units), tuple(Shard() for _ in self.lines), (None,) * self.num_workers
        )

    def steps(self, state: State) -> Iterator[Step]:
        """Yield everything that can happen next."""
        for step in self._all_steps(state):
            yield step._replace(state=_renamed(step.state))

    def _all_steps(self, state: State) -> Iterator[Step]:
        for worker, held in enumerate(state.workers):
            if held is None:
                yield from self._claims(state, worker)
            elif held.epoch < 0:
                yield from self._take_chosen(state, worker, held)
            else:
                yield from self._work(state, worker, held)
        yield from self._sweeps(state)

    def _claims(self, state: State, worker: int) -> Iterator[Step]:
        for number, unit in enumerate(state.units):
            if not self._may_claim(state, unit):
                continue
            name = f"{_WORKERS[worker]} claims the {self._name(number)}"
            if self._has(Guard.CLAIM_LOCK):
                yield from self._step(name, state, partial(self.claim, state, worker, number))
            else:
                chosen = Held(number, -1)
                words = f"{_WORKERS[worker]} chooses the {self._name(number)}"
                yield Step(words, _with_worker(state, worker, chosen))

    def _take_chosen(self, state: State, worker: int, held: Held) -> Iterator[Step]:
        words = f"{_WORKERS[worker]} takes the {self._name(held.unit)} it chose"
        unit = state.units[held.unit]
        if self._has(Guard.CLAIM_STATE) and unit.state != PENDING:
            yield Step(words + ", in vain", _with_worker(state, worker, None))
        else:
            yield from self._step(words, state, partial(self.claim, state, worker, held.unit))

    def _work(self, state: State, worker: int, held: Held) -> Iterator[Step]:
        """Yield what a holder may do; it may also have stood still since its last step."""
        name = _WORKERS[worker]
        kind = state.units[held.unit].kind
        yield Step(f"{name} crashes", _with_worker(state, worker, None))
        if kind == PLAN:
            yield from self._call(state, worker, "records the plan", self.record_plan)
            yield from self._call(state, worker, "refuses the file", self.refuse)
        elif kind == SHARD:
            yield from self._segments(state, worker, held)
        elif held.gathered is None:
            gathered = self._gather(state)
            yield Step(
                f"{name} writes the files",
                _with_worker(state, worker, held._replace(gathered=gathered)),
            )
        else:
            # `_write_shard` and `finalize` raise CountMismatch, or InputLost where lines have no
            # result and the input that names them is gone.
            if not self._has(Guard.RECOUNT) or all(count == 1 for count in held.gathered):
                yield from self._call(state, worker, "publishes the files", self.complete)
            if self._lines_are_missing(state):
                yield from self._call(state, worker, "has lost the input", self.give_up)
        for target in self._targets(state, kind):
            yield from self._call(
                state,
                worker,
                f"settles it as {target}",
                partial(self.settle, target=target),
            )

    def _segments(self, state: State, worker: int, held: Held) -> Iterator[Step]:
        name = _WORKERS[worker]
        if held.writing:
            words = f"commits {_number_of(held.writing)}"
            yield from self._call(state, worker, words, self.record)
            return
        missing = (1 << self.lines[held.unit - 1]) - 1 & ~held.known
        positions = missing
        while positions:  # every subset of what is missing
            yield Step(
                f"{name} writes a blob of {_number_of(positions)}",
                _with_worker(state, worker, held._replace(writing=positions)),
            )
            positions = (positions - 1) & missing

    @staticmethod
    def _targets(state: State, kind: str) -> Iterator[str]:
        """Yield what a holder may settle its unit as."""
        yield PENDING
        yield FAILED
        if kind != SHARD:
            return
        # A holder that was told: `batches.find_stopping`. A window may have passed unnoticed.
        yield EXPIRED
        if state.batch.status in {CANCELLING, CANCELLED, FAILED}:
            yield CANCELLED

    def _sweeps(self, state: State) -> Iterator[Step]:
        for number, unit in enumerate(state.units):
            if unit.state != LEASED:
                continue
            words = f"the lease of the {self._name(number)} is reaped"
            yield from self._step(words, state, partial(self.reap, state, number, stuck=False))
            if unit.kind != FINALIZE:
                yield from self._step(
                    words + " once too often",
                    state,
                    partial(self.reap, state, number, stuck=True),
                )
        yield from self._step("the client cancels", state, partial(self.request_cancel, state))
        yield from self._step("the window passes", state, partial(self.expire_overdue, state))
        yield from self._step("the sweeper looks", state, partial(self.advance_finished, state))
        if self.loses_rows and state.batch.status == FINALIZING:
            for number, shard in enumerate(state.shards):
                for segment in shard.segments:
                    left = tuple(other for other in shard.segments if other != segment)
                    shards = _with(state.shards, number, shard._replace(segments=left))
                    words = f"the row of a segment of {_number_of(segment[2])} is lost"
                    yield Step(words, state._replace(shards=shards))

    # --- functions of storage ---

    @staticmethod
    def _may_claim(state: State, unit: Unit) -> bool:
        """Return whether the query of `units.claim` finds the unit."""
        if unit.state != PENDING:
            return False
        batch = state.batch
        runs = batch.status in {VALIDATING, IN_PROGRESS} and not batch.ending
        return unit.kind == FINALIZE or runs

    def claim(self, state: State, worker: int, number: int) -> State:
        """The update of `units.claim`, and `shards.get` of who got it.

        Between the two nobody else can commit to the shard, or this lease is lost already.
        """
        unit = state.units[number]
        if unit.state == LEASED:
            raise _BrokenError(Rule.ONE_LEASE)
        leased = Unit(unit.kind, LEASED, unit.epoch + 1, worker)
        self._check_frozen(unit, leased)
        known = state.shards[number - 1].done if unit.kind == SHARD else 0
        state = _lose(state, number)
        state = state._replace(units=_with(state.units, number, leased))
        return _with_worker(state, worker, Held(number, leased.epoch, known=known))

    def _lock_unit(self, state: State, worker: int, fence: Guard) -> bool:
        """`transitions.lock_unit`."""
        held = _held(state, worker)
        unit = state.units[held.unit]
        if not self._has(fence):
            return True
        if unit.epoch == held.epoch:
            if unit.state == LEASED:
                return True
            if unit.state == PENDING or unit.owner == worker:
                if held.lost:
                    raise _BrokenError(Rule.TOLD)
                return False
        raise _LeaseLostError

    def _end_unit(self, state: State, worker: int, target: str) -> State:
        """`transitions.end_unit`."""
        held = _held(state, worker)
        unit = state.units[held.unit]
        if unit.state != LEASED or unit.epoch != held.epoch:
            return state
        return state._replace(units=_with(state.units, held.unit, unit._replace(state=target)))

    def record(self, state: State, worker: int) -> State:
        """`segments.record`, and `feed._flush` of who called it."""
        held = _held(state, worker)
        unit, shard = state.units[held.unit], state.shards[held.unit - 1]
        if self._has(Guard.RECORD_KEY) and any(
            segment[:2] == (held.epoch, held.sequence) for segment in shard.segments
        ):
            return _with_worker(state, worker, _committed(held, ended=unit.state == DONE))
        if self._has(Guard.RECORD_STATE) and unit.state != LEASED:
            raise _LeaseLostError
        if self._has(Guard.RECORD_EPOCH) and unit.epoch != held.epoch:
            raise _LeaseLostError
        if self._has(Guard.RECORD_OVERLAP) and shard.done & held.writing:
            raise _RefusedError
        done = shard.done | held.writing
        shard = Shard(
            done,
            shard.counted + held.writing.bit_count(),
            (*shard.segments, (held.epoch, held.sequence, held.writing)),
        )
        state = state._replace(shards=_with(state.shards, held.unit - 1, shard))
        ended = done == (1 << self.lines[held.unit - 1]) - 1
        if ended:
            # As the code's own update: by the epoch of the lease, in state leased.
            state = self._end_unit(state, worker, DONE)
            state = self._advance_if_ended(state)
        return _with_worker(state, worker, _committed(held, ended=ended))

    def settle(self, state: State, worker: int, *, target: str) -> State:
        """`units.settle`."""
        held = _held(state, worker)
        if not self._lock_unit(state, worker, Guard.SETTLE_FENCE) and self._has(Guard.SETTLE_STATE):
            return _with_worker(state, worker, None)
        unit = state.units[held.unit]
        if target == FAILED and unit.kind == FINALIZE:
            target = PENDING
        if target == PENDING and unit.kind != FINALIZE and self._has(Guard.RELEASE_STOP):
            target = _stopped_state(state.batch) or target
        state = self._write_end(state, held.unit, target, epoch=unit.epoch)
        if unit.kind != FINALIZE and target in ENDED_UNIT:
            state = self._after_work(state, unit.kind, target)
        return _with_worker(state, worker, None)

    def _write_end(self, state: State, number: int, target: str, *, epoch: int) -> State:
        """`units._write_end`."""
        unit = state.units[number]
        if unit.state != LEASED and self._has(Guard.SETTLE_STATE):
            return state
        owner = _NOBODY if target == PENDING else unit.owner
        ended = Unit(unit.kind, target, epoch, owner)
        self._check_frozen(unit, ended)
        return state._replace(units=_with(state.units, number, ended))

    def _after_work(self, state: State, kind: str, target: str) -> State:
        """`units._after_work`."""
        if kind == PLAN and target == FAILED and state.batch.status == VALIDATING:
            return self._save(state, state.batch._replace(status=FAILED))
        return self._advance_if_ended(state)

    def reap(self, state: State, number: int, *, stuck: bool) -> State:
        """`units._give_up` of one unit."""
        unit = state.units[number]
        target = FAILED if stuck else PENDING
        if unit.kind != FINALIZE and self._has(Guard.RELEASE_STOP):
            target = _stopped_state(state.batch) or target
        epoch = unit.epoch + 1 if self._has(Guard.REAP_EPOCH) else unit.epoch
        state = self._write_end(_lose(state, number), number, target, epoch=epoch)
        if unit.kind != FINALIZE and target in ENDED_UNIT:
            state = self._after_work(state, unit.kind, target)
        return state

    def record_plan(self, state: State, worker: int) -> State:
        """`batches.record_plan`."""
        if not self._lock_unit(state, worker, Guard.PLAN_FENCE):
            return _with_worker(state, worker, None)
        batch = state.batch
        stopped = _stopped_state(batch)
        if stopped or (batch.planned and self._has(Guard.PLAN_ONCE)):
            state = self._end_unit(state, worker, stopped or DONE)
            return _with_worker(self._advance_if_ended(state), worker, None)
        if batch.status != VALIDATING and self._has(Guard.PLAN_STATUS):
            raise _RefusedError
        state = self._save(state, batch._replace(status=IN_PROGRESS, planned=True))
        if state.units[1].state != ABSENT:
            if self._has(Guard.PLAN_KEY):
                raise _RefusedError
            raise _BrokenError(Rule.ONE_PLAN)
        shards = tuple(Unit(SHARD, PENDING) for _ in self.lines)
        state = state._replace(units=(state.units[0], *shards, state.units[-1]))
        state = self._end_unit(state, worker, DONE)
        return _with_worker(self._advance_if_ended(state), worker, None)

    def refuse(self, state: State, worker: int) -> State:
        """`batches.refuse`."""
        if not self._lock_unit(state, worker, Guard.PLAN_FENCE):
            return _with_worker(state, worker, None)
        if state.batch.status != VALIDATING:
            state = self._end_unit(state, worker, _stopped_state(state.batch) or DONE)
            return _with_worker(self._advance_if_ended(state), worker, None)
        state = self._save(state, state.batch._replace(status=FAILED))
        return _with_worker(self._end_unit(state, worker, DONE), worker, None)

    def complete(self, state: State, worker: int) -> State:
        """`batches.complete`."""
        gathered = _held(state, worker).gathered
        if not self._lock_unit(state, worker, Guard.COMPLETE_FENCE):
            return _with_worker(state, worker, None)
        batch = state.batch
        if batch.status not in {FINALIZING, CANCELLING} and self._has(Guard.COMPLETE_STATUS):
            raise _RefusedError
        status = CANCELLED if batch.status == CANCELLING else batch.ending or COMPLETED
        state = self._save(state, batch._replace(status=status, published=gathered))
        return _with_worker(self._end_unit(state, worker, DONE), worker, None)

    def give_up(self, state: State, worker: int) -> State:
        """`batches.give_up`."""
        if not self._lock_unit(state, worker, Guard.COMPLETE_FENCE):
            return _with_worker(state, worker, None)
        if state.batch.status not in {FINALIZING, CANCELLING} and self._has(Guard.COMPLETE_STATUS):
            raise _RefusedError
        state = self._save(state, state.batch._replace(status=FAILED))
        return _with_worker(self._end_unit(state, worker, DONE), worker, None)

    def request_cancel(self, state: State) -> State:
        """`batches.request_cancel`."""
        batch = state.batch
        if batch.status not in {VALIDATING, IN_PROGRESS} and (
            batch.status in {FINALIZING, CANCELLING, CANCELLED} or self._has(Guard.CANCEL_STATUS)
        ):
            return state
        state = self._save(
            state, batch._replace(status=CANCELLING, ending=batch.ending or CANCELLED)
        )
        return self._advance_if_ended(_stop_pending(state))

    def expire_overdue(self, state: State) -> State:
        """`batches.expire_overdue`."""
        batch = state.batch
        if batch.status not in {VALIDATING, IN_PROGRESS} or batch.ending:
            return state
        state = self._save(state, batch._replace(ending=EXPIRED))
        return self._advance_if_ended(_stop_pending(state))

    def advance_finished(self, state: State) -> State:
        """`batches.advance_finished`."""
        batch, work = state.batch, [unit.state for unit in state.units[:-1]]
        if batch.status in ENDED_BATCH or state.units[-1].state != ABSENT:
            return state
        stopping = batch.status == CANCELLING or batch.ending != ""
        if not (
            (stopping and LEASED not in work)
            or (batch.status == IN_PROGRESS and not {PENDING, LEASED} & set(work))
        ):
            return state
        if self._has(Guard.SWEEP_STOP):
            state = _stop_pending(state)
        return self._advance_if_ended(state, by=Guard.SWEEP_ADVANCE)

    def _advance_if_ended(self, state: State, *, by: Guard = Guard.END_ADVANCE) -> State:
        """`transitions.advance_if_ended`."""
        batch, work = state.batch, [unit.state for unit in state.units[:-1]]
        if batch.status not in {VALIDATING, IN_PROGRESS, CANCELLING} or not self._has(by):
            return state
        if batch.status == VALIDATING and not batch.ending:
            return state
        if PENDING in work or LEASED in work:
            return state
        if not batch.ending and EXPIRED in work:
            batch = batch._replace(ending=EXPIRED)
        if state.units[-1].state != ABSENT:
            return state
        if batch.status != CANCELLING:
            batch = batch._replace(status=FINALIZING, ending=batch.ending or COMPLETED)
        state = self._save(state, batch)
        return state._replace(units=_with(state.units, -1, Unit(FINALIZE, PENDING)))

    # --- functions of the finalizer ---

    def _gather(self, state: State) -> tuple[int, ...]:
        """Return how many records `finalizer.finalize` writes of each line."""
        if not state.batch.planned:
            return ()
        counts: list[int] = []
        for num_lines, shard in zip(self.lines, state.shards, strict=True):
            for position in range(num_lines):
                found = sum(segment[2] >> position & 1 for segment in shard.segments)
                # A line without a result gets an error: `_missing`, by the shard's bitmap.
                counts.append(found + (not shard.done >> position & 1))
        return tuple(counts)

    def _lines_are_missing(self, state: State) -> bool:
        return state.batch.planned and any(
            shard.done != (1 << num_lines) - 1
            for num_lines, shard in zip(self.lines, state.shards, strict=True)
        )

    # --- parts ---

    def _has(self, guard: Guard) -> bool:
        return guard not in self.without

    def _name(self, number: int) -> str:
        if 0 < number <= len(self.lines):
            return f"shard {number}" if len(self.lines) > 1 else "shard"
        return "plan" if number == 0 else "files"

    def _check_frozen(self, before: Unit, after: Unit) -> None:
        """The trigger `tr_units_ended`."""
        changed = before[1:3] != after[1:3]
        if before.state in ENDED_UNIT and changed and self._has(Guard.FROZEN):
            raise _RefusedError

    def _save(self, state: State, batch: Batch) -> State:
        """`transitions.save_batch`, and the trigger `tr_batches_ended`."""
        ended = state.batch.status in ENDED_BATCH
        if ended and batch != state.batch and self._has(Guard.FROZEN):
            raise _RefusedError
        return state._replace(batch=batch)

    def _call(self, state: State, worker: int, words: str, function: "_Function") -> Iterator[Step]:
        """Yield the call of a function by a worker: with its reply, and with the reply lost."""
        held = _held(state, worker)
        words = f"{_WORKERS[worker]} {words}"
        try:
            after = function(state, worker)
        except _LeaseLostError:
            yield Step(words + " and has lost it", _with_worker(state, worker, None))
            return
        except _RefusedError:
            # The loops end, and so does the lease by itself.
            yield Step(words + " and is refused", _with_worker(state, worker, None))
            return
        except _BrokenError as error:
            yield Step(words, state, error.rule)
            return
        broken = Rule.FENCED if held.lost and after[:3] != state[:3] else None
        yield Step(words, after, broken)
        if after[:3] != state[:3]:
            after = after._replace(workers=_with(after.workers, worker, held))
            yield Step(f"{words}; the reply is lost", after, broken)

    @staticmethod
    def _step(words: str, state: State, function: "_Change") -> Iterator[Step]:
        try:
            after = function()
        except _RefusedError:
            return
        except _BrokenError as error:
            yield Step(words, state, error.rule)
            return
        if after != state:
            yield Step(words, after)


_Function = Callable[[State, int], State]
_Change = Callable[[], State]


def _held(state: State, worker: int) -> Held:
    held = state.workers[worker]
    assert held is not None
    return held


def _with(values: tuple[_T, ...], number: int, value: _T) -> tuple[_T, ...]:
    changed = list(values)
    changed[number] = value
    return tuple(changed)


def _with_worker(state: State, worker: int, held: Held | None) -> State:
    return state._replace(workers=_with(state.workers, worker, held))


def _committed(held: Held, *, ended: bool) -> Held | None:
    """Return what a worker knows after the reply to its commit."""
    if ended:
        return None
    known = held.known | held.writing
    return held._replace(known=known, writing=0, sequence=held.sequence + 1)


def _lose(state: State, number: int) -> State:
    """Take the unit from whoever holds it; they find out later."""
    return state._replace(
        workers=tuple(
            held._replace(lost=True) if held and held.unit == number and held.epoch >= 0 else held
            for held in state.workers
        )
    )


def _stopped_state(batch: Batch) -> str:
    """`transitions.stopped_state`."""
    if FAILED in batch or CANCELLED in batch:
        return CANCELLED
    return EXPIRED if batch.ending == EXPIRED else ""


def _stop_pending(state: State) -> State:
    """`transitions.stop_pending`."""
    target = _stopped_state(state.batch)
    if not target:
        return state
    units = tuple(
        unit._replace(state=target) if unit.state == PENDING and unit.kind != FINALIZE else unit
        for unit in state.units
    )
    return state._replace(units=units)


def _renamed(state: State) -> State:
    """Return the state with epochs numbered anew: only their order is ever looked at.

    The key of a segment that nobody can write again does not matter either.
    """
    units, shards, workers = list(state.units), list(state.shards), list(state.workers)
    for number, unit in enumerate(units):
        holders = [
            (worker, held)
            for worker, held in enumerate(workers)
            if held is not None and held.unit == number and held.epoch >= 0
        ]
        epochs = sorted({unit.epoch, *(held.epoch for _, held in holders)})
        places = {epoch: place for place, epoch in enumerate(epochs)}
        units[number] = unit._replace(epoch=places[unit.epoch])
        for worker, held in holders:
            workers[worker] = held._replace(epoch=places[held.epoch])
        if unit.kind == SHARD and shards[number - 1].segments:
            shard = shards[number - 1]
            live = {held.epoch for _, held in holders}
            kept = [(places[s[0]], s[1], s[2]) for s in shard.segments if s[0] in live]
            gone = sorted(s[2] for s in shard.segments if s[0] not in live)
            old = [(-1, place, positions) for place, positions in enumerate(gone)]
            shards[number - 1] = shard._replace(segments=tuple(sorted(old + kept)))
    return State(state.batch, tuple(units), tuple(shards), tuple(workers))
