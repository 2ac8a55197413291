"""Random calls of the statements, in any order and by anybody, held against what must stay true.

After each call all rows are read, and held against those before it (`check_rows`). What a call may
do follows from what is known of its lease: whether it is live, and whether it ended its unit
itself. At the end honest workers finish what is left, and every batch has to end.

Run as a program it takes whichever `storage` comes first on the path, on SQLite:
`python -m tests.conformance.storage.machine EXAMPLES STEPS`.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

import storage
from jobs.domain.batch import TERMINAL_STATUSES, BatchStatus, LineProblem
from jobs.domain.errors import Conflict, IllegalTransition, LeaseLost
from jobs.domain.ids import DEFAULT_TENANT, BatchId
from jobs.domain.retry import Settlement
from jobs.domain.shard import (
    TERMINAL_UNIT_STATES,
    Lease,
    Segment,
    UnitKind,
    UnitState,
    has_bit,
)
from storage import batches, segments, shards, tables, units
from storage.database import Database, open_database, upgrade
from tests.conformance.storage.bench import Bench, FixedClock

Row = dict[str, Any]
Key = tuple[str, int]  # a lease: its unit and its epoch
WORK = (UnitKind.PLAN, UnitKind.SHARD)
_LEASE_SECONDS = 60
_BACKOFF_SECONDS = 60

workers = st.sampled_from(["worker_a", "worker_b", "worker_c"])
positions = st.lists(st.integers(0, 10), min_size=1, max_size=6, unique=True)
sizes = st.lists(st.integers(1, 10), max_size=3)
limits = st.sampled_from([1, 2, 100])


# --- what must stay true ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """All rows, by their keys."""

    batches: dict[str, Row]
    units: dict[str, Row]
    shards: dict[str, Row]
    segments: dict[tuple[str, int, int], Row]
    events: list[Row]
    files: dict[str, Row]

    def work_of(self, batch_id: str) -> list[Row]:
        """Return the plan and the shards of a batch."""
        return [u for u in self.units.values() if u["batch_id"] == batch_id and u["kind"] in WORK]

    def finalizers_of(self, batch_id: str) -> list[Row]:
        """Return the finalize units of a batch; there should be one at most."""
        return [
            unit
            for unit in self.units.values()
            if unit["batch_id"] == batch_id and unit["kind"] == UnitKind.FINALIZE
        ]

    def shards_of(self, batch_id: str) -> list[Row]:
        """Return the shards of a batch in the order of its lines."""
        found = [shard for shard in self.shards.values() if shard["batch_id"] == batch_id]
        return sorted(found, key=lambda shard: shard["ordinal"])

    def segments_of(self, unit_id: str) -> list[Row]:
        """Return the segments of a shard."""
        return [segment for key, segment in self.segments.items() if key[0] == unit_id]


def read_rows(db: Database) -> Rows:
    """Return all rows, in one transaction."""

    def read(table: sa.Table) -> list[Row]:
        return [dict(row) for row in tx.execute(sa.select(table)).mappings()]

    with db.read() as tx:
        return Rows(
            batches={row["id"]: row for row in read(tables.batches)},
            units={row["id"]: row for row in read(tables.units)},
            shards={row["unit_id"]: row for row in read(tables.shards)},
            segments={
                (row["unit_id"], row["epoch"], row["sequence"]): row
                for row in read(tables.segments)
            },
            events=read(tables.outbox),
            files={row["id"]: row for row in read(tables.files)},
        )


def check_rows(before: Rows, after: Rows) -> None:
    """Hold what is there against what was there, and against itself."""
    for key, segment in before.segments.items():
        assert after.segments.get(key) == segment, "a segment changed"
    for unit_id, old in before.units.items():
        unit = after.units[unit_id]
        assert unit["epoch"] >= old["epoch"], "an epoch went back"
        if old["state"] in TERMINAL_UNIT_STATES:
            assert unit == old, "a unit that had ended changed"
            shard = before.shards.get(unit_id)
            assert after.shards.get(unit_id) == shard, "a shard that had ended changed"
    for batch_id, old in before.batches.items():
        if old["status"] in TERMINAL_STATUSES:
            assert after.batches[batch_id] == old, "a batch that had ended changed"
    for shard in after.shards.values():
        _check_shard(shard, after.segments_of(shard["unit_id"]))
    for batch in after.batches.values():
        _check_batch(batch, after)


def _check_shard(shard: Row, found: list[Row]) -> None:
    union = 0
    for segment in found:
        lines = int.from_bytes(segment["positions"], "little")
        assert lines, "a segment without lines"
        assert not union & lines, "a line is in two segments"
        union |= lines
    assert union == int.from_bytes(shard["done"], "little"), "the bitmap is not of the segments"
    assert union.bit_length() <= shard["num_lines"], "a line past the end"
    assert shard["num_done"] == union.bit_count(), "num_done is not a recount"
    for name in ("num_completed", "num_failed", "prompt_tokens", "completion_tokens"):
        assert shard[name] == sum(segment[name] for segment in found), f"{name} is not a recount"


def _check_batch(batch: Row, rows: Rows) -> None:
    work, finalizers = rows.work_of(batch["id"]), rows.finalizers_of(batch["id"])
    states = {unit["state"] for unit in work}
    has_work = bool(states & {UnitState.PENDING, UnitState.LEASED})
    ended = batch["status"] in TERMINAL_STATUSES
    assert sum(unit["kind"] == UnitKind.PLAN for unit in work) == 1, "not one plan"
    assert len(finalizers) <= 1, "two finalizers"
    if finalizers:
        assert not has_work, "a finalizer before the work ended"
        assert ended == (finalizers[0]["state"] == UnitState.DONE), "a finalizer is not its batch's"
    elif batch["status"] != BatchStatus.FAILED:
        assert has_work, "all work has ended and nobody writes the files"
    if batch["ending"] in {"cancelled", "expired"} or ended:
        assert UnitState.PENDING not in states, "work waits for a batch that was stopped"
    found = rows.shards_of(batch["id"])
    if batch["planned_at"] is not None:
        assert batch["total"] == sum(shard["num_lines"] for shard in found), "a plan in parts"
        assert [shard["ordinal"] for shard in found] == list(range(len(found))), "a plan in parts"
    else:
        assert not found, "shards without a plan"
    events = [event for event in rows.events if event["batch_id"] == batch["id"]]
    assert len(events) == ended, "not one event for the end of a batch"
    published = {batch["output_file_id"], batch["error_file_id"]} - {None}
    assert published <= rows.files.keys(), "a published file has no row"
    if batch["final_completed"] is not None:
        total = batch["final_completed"] + batch["final_failed"]
        assert total == (batch["total"] or 0), "published counts are not of all lines"


# --- what may be called ---


class Machine(RuleBasedStateMachine):
    """Several batches, workers, sweepers and clients over one database."""

    plans: Bundle[Lease] = Bundle("plans")
    shard_leases: Bundle[Lease] = Bundle("shard_leases")
    finalizers: Bundle[Lease] = Bundle("finalizers")
    commits: Bundle[tuple[Lease, Segment]] = Bundle("commits")

    def __init__(self, opened: Callable[[], Bench]) -> None:
        super().__init__()
        self.bench = opened()
        self.db = self.bench.db
        self.file = self.bench.add_file()
        self.rows = read_rows(self.db)
        self.given: set[Key] = set()
        self.ended: set[Key] = set()

    @override
    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.end_honestly()
        finally:
            self.db.close()

    # --- clients ---

    # Hypothesis leaves some rules out of each example: what the others need is there first.
    @initialize(target=shard_leases, sizes=st.lists(st.integers(1, 10), min_size=1, max_size=3))
    def begin(self, sizes: list[int]) -> MultipleResults[Lease]:
        self.insert_planned(sizes)
        found = [self.claim(UnitKind.SHARD, worker) for worker in ("worker_a", "worker_b")]
        return multiple(*[lease for lease in found if lease is not None])

    @rule(hours=st.sampled_from([1, 24]), priority=st.integers(0, 1))
    def insert(self, hours: int, priority: int) -> None:
        batch = self.bench.make_batch(file=self.file, hours=hours, priority=priority)
        batches.insert(self.db, batch)
        self.look()
        batches.insert(self.db, batch)
        self.look(changed=False)

    @rule(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=3))
    def insert_planned(self, sizes: list[int]) -> None:
        # The most urgent one: so its plan is the one that is claimed.
        self.insert(24, 2 + len(self.rows.batches))
        lease = self.claim(UnitKind.PLAN, "worker_a")
        assert lease is not None
        self.end(lease, lambda: self.bench.record_plan(lease, sizes))

    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        batch_ids = sorted(self.rows.batches)
        batch_id = BatchId(batch_ids[number % len(batch_ids)])
        status = self.rows.batches[batch_id]["status"]
        may = status not in TERMINAL_STATUSES or status == BatchStatus.CANCELLED
        try:
            batches.request_cancel(self.db, batch_id)
        except IllegalTransition:
            assert not may
        else:
            assert may
        self.look()

    @rule(seconds=st.sampled_from([1, 59, 61, 61, 600, 3601]))
    def wait(self, seconds: int) -> None:
        self.bench.clock.advance(seconds)

    # --- workers ---

    @rule(target=plans, worker=workers)
    def claim_plan(self, worker: str) -> Lease | MultipleResults[Lease]:
        return self.claim(UnitKind.PLAN, worker) or multiple()

    @rule(target=shard_leases, worker=workers)
    def claim_shard(self, worker: str) -> Lease | MultipleResults[Lease]:
        return self.claim(UnitKind.SHARD, worker) or multiple()

    @rule(target=finalizers, worker=workers)
    def claim_finalizer(self, worker: str) -> Lease | MultipleResults[Lease]:
        return self.claim(UnitKind.FINALIZE, worker) or multiple()

    @rule(lease=plans, sizes=sizes)
    def record_plan(self, lease: Lease, sizes: list[int]) -> None:
        self.end(lease, lambda: self.bench.record_plan(lease, sizes))

    @rule(lease=plans)
    def refuse(self, lease: Lease) -> None:
        problem = LineProblem(code="invalid_json", message="No.", line=1)
        self.end(lease, lambda: batches.refuse(self.db, lease, errors=[problem], num_errors=1))

    @rule(
        target=commits,
        lease=shard_leases,
        parts=st.lists(positions, min_size=1, max_size=3),
        sequence=st.integers(0, 5),
        num_failed=st.integers(0, 1),
    )
    def record(
        self, lease: Lease, parts: list[list[int]], sequence: int, num_failed: int
    ) -> tuple[Lease, Segment]:
        num_lines = self.rows.shards[lease.unit_id]["num_lines"]
        for number, lines in enumerate(parts, start=sequence):
            segment = self.bench.make_segment(
                lease,
                lines,
                num_lines=max(num_lines, *lines, 0) + 1,
                sequence=number,
                num_failed=num_failed,
            )
            self.commit(lease, segment)
        return lease, segment

    @rule(commit=commits, further=st.sampled_from([0, 0, 10, 20]))
    def record_again(self, commit: tuple[Lease, Segment], further: int) -> None:
        """The same call again, or the same lines under another number."""
        lease, segment = commit
        self.commit(lease, replace(segment, sequence=segment.sequence + further))

    @rule(worker=workers)
    def finish_a_shard(self, worker: str) -> None:
        lease = self.claim(UnitKind.SHARD, worker)
        if lease is not None:
            self.run_shard(lease)

    @rule(leases=st.lists(plans | shard_leases | finalizers, min_size=1, max_size=4, unique=True))
    def renew(self, leases: list[Lease]) -> None:
        live = {lease.unit_id for lease in leases if self.is_live(lease)}
        renewed = units.renew(self.db, leases, lease_seconds=_LEASE_SECONDS)
        assert renewed.keys() == live
        self.look(changed=bool(live))

    @rule(target=shard_leases, lease=shard_leases, worker=workers, lines=positions)
    def take_over(self, lease: Lease, worker: str, lines: list[int]) -> MultipleResults[Lease]:
        """Another gets the shard of a holder not heard of for too long, who then wakes up."""
        self.wait(_LEASE_SECONDS + 1)
        units.reap(self.db)
        self.look()
        assert not self.is_live(lease)
        self.wait(_BACKOFF_SECONDS + 1)
        found: list[Lease] = []
        while (other := self.claim(UnitKind.SHARD, worker)) is not None:
            found.append(other)
            if other.unit_id == lease.unit_id:
                break
        num_lines = self.rows.shards[lease.unit_id]["num_lines"]
        segment = self.bench.make_segment(
            lease, lines, num_lines=max(num_lines, *lines, 0) + 1, sequence=9
        )
        self.commit(lease, segment)
        return multiple(*found)

    @rule(lease=shard_leases, suspects=st.lists(positions, max_size=2))
    def report_death(self, lease: Lease, suspects: list[list[int]]) -> None:
        live = self.is_live(lease)
        try:
            shards.report_death(self.db, lease, suspects=suspects)
        except LeaseLost:
            assert not live
        else:
            assert live
        self.look(changed=live)
        self.end(lease, lambda: shards.begin_trial(self.db, lease, positions=[0]))

    @rule(
        lease=plans | shard_leases | finalizers,
        state=st.sampled_from([*[UnitState.PENDING] * 4, *sorted(TERMINAL_UNIT_STATES)]),
        delay_seconds=st.sampled_from([0, 0, 30]),
    )
    def settle(self, lease: Lease, state: UnitState, delay_seconds: int) -> None:
        if state in {UnitState.CANCELLED, UnitState.EXPIRED} and lease.kind is UnitKind.SHARD:
            # A worker ends a shard like this after it was told to, never by itself.
            told = units.watch(self.db, [lease.batch_id]).get(lease.batch_id)
            if told is None:
                return
            state = told
        settlement = Settlement(state=state, delay_seconds=delay_seconds, exit=str(state))
        if state is UnitState.DONE and self.is_live(lease):
            # A shard's last segment ended it; the others end with what they are for.
            try:
                units.settle(self.db, lease, settlement)
            except Conflict:
                self.look(changed=False)
                return
            raise AssertionError("a unit was said to be done, and was not")
        self.end(lease, lambda: units.settle(self.db, lease, settlement))

    @rule(lease=finalizers)
    def complete(self, lease: Lease) -> None:
        completed, failed = self.add_up(lease.batch_id)
        self.end(
            lease,
            lambda: self.bench.complete(lease, num_completed=completed, num_failed=failed),
        )

    @rule(lease=finalizers)
    def give_up(self, lease: Lease) -> None:
        problem = LineProblem(code="input_lost", message="Gone.")
        self.end(lease, lambda: batches.give_up(self.db, lease, errors=[problem]))

    # --- sweepers ---

    @rule(limit=limits, max_stalls=st.sampled_from([0, 10]))
    def reap(self, limit: int, max_stalls: int) -> None:
        before, now = self.rows, self.bench.clock.now
        reaped = units.reap(self.db, limit=limit, max_claims_without_progress=max_stalls)
        self.look()
        overdue = {
            unit["id"]
            for unit in before.units.values()
            if unit["state"] == UnitState.LEASED and unit["lease_expires_at"] < now
        }
        assert len(reaped) == min(limit, len(overdue))
        self.check_reaped({one.unit_id for one in reaped}, overdue, before)

    @rule(boot_id=st.sampled_from(["boot", "next boot"]))
    def restart(self, boot_id: str) -> None:
        before = self.rows
        reaped = units.reap_other_boots(self.db, boot_id=boot_id)
        self.look()
        others = {
            unit["id"]
            for unit in before.units.values()
            if unit["state"] == UnitState.LEASED and unit["boot_id"] != boot_id
        }
        assert len(reaped) == len(others)
        self.check_reaped({one.unit_id for one in reaped}, others, before)

    @rule(limit=limits)
    def sweep(self, limit: int) -> None:
        overdue = {
            batch["id"]
            for batch in self.rows.batches.values()
            if batch["status"] in {BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS}
            and batch["ending"] is None
            and batch["deadline_at"] <= self.bench.clock.now
        }
        expired = batches.expire_overdue(self.db, limit=limit)
        assert len(expired) == min(limit, len(overdue))
        assert overdue >= set(expired)
        self.look(changed=bool(expired))
        # Whoever ended the last unit has moved the batch on already: there is nothing to find.
        assert batches.advance_finished(self.db, limit=limit) == []
        self.look(changed=False)
        before = self.rows
        units.poke_due(self.db)
        self.look()
        for unit_id, unit in self.rows.units.items():
            old = before.units[unit_id]
            assert old | {"last_poked_at": None} == unit | {"last_poked_at": None}

    # --- parts ---

    def look(self, *, changed: bool = True) -> None:
        """Read and check all rows; hold the counts that clients read against a recount."""
        before, self.rows = self.rows, read_rows(self.db)
        if not changed:
            assert self.rows == before, "a call that had no right to change something did"
        check_rows(before, self.rows)
        shown, _ = batches.list_page(self.db, tenant_id=DEFAULT_TENANT, limit=100)
        for batch in shown:
            row = self.rows.batches[batch.id]
            found = self.rows.shards_of(batch.id)
            completed = sum(shard["num_completed"] for shard in found)
            assert batch.request_counts.total == (row["total"] or 0)
            assert batch.request_counts.completed == completed

    def is_live(self, lease: Lease) -> bool:
        """Return whether this lease is the one that its unit is leased by."""
        unit = self.rows.units[lease.unit_id]
        return (unit["state"], unit["epoch"]) == (UnitState.LEASED, lease.epoch)

    def claim(self, kind: UnitKind, worker: str) -> Lease | None:
        """Claim a unit; if there is none, none may wait that could run."""
        before, now = self.rows, self.bench.clock.now
        lease = self.bench.claim(kind, worker=worker)
        self.look(changed=lease is not None)
        if lease is None:
            assert not [u for u in before.units.values() if self.is_offered(u, kind, now)]
            return None
        unit_id = lease.unit_id
        assert self.is_offered(before.units[unit_id], kind, now), "it was not to be had"
        assert lease.epoch > before.units[unit_id]["epoch"], "a claim raises the epoch"
        assert (unit_id, lease.epoch) not in self.given, "two leases of one epoch"
        self.given.add((unit_id, lease.epoch))
        others = {key: unit for key, unit in before.units.items() if key != unit_id}
        assert others == {k: unit for k, unit in self.rows.units.items() if k != unit_id}
        return lease

    def is_offered(self, unit: Row, kind: UnitKind, now: datetime) -> bool:
        """Return whether a unit of this kind waits and may run now."""
        batch = self.rows.batches[unit["batch_id"]]
        stopped = batch["ending"] is not None or batch["status"] in TERMINAL_STATUSES
        return (
            unit["kind"] == kind
            and unit["state"] == UnitState.PENDING
            and unit["not_before"] <= now
            and not (stopped and kind in WORK)
        )

    def end(self, lease: Lease, action: Callable[[], object]) -> None:
        """Call what only a live lease may do; it may end the unit.

        A lease that is not live is told so, unless it ended the unit itself; and changes nothing.
        """
        key, live = (lease.unit_id, lease.epoch), self.is_live(lease)
        try:
            action()
        except LeaseLost:
            assert not live, "a live lease was refused"
        else:
            assert live or key in self.ended, "a lost lease was not told"
        self.look(changed=live)
        if live and not self.is_live(lease):
            self.ended.add(key)

    def commit(self, lease: Lease, segment: Segment) -> None:
        """Record a segment, and see that it is refused when it has to be."""
        live, shard = self.is_live(lease), self.rows.shards[lease.unit_id]
        known = self.rows.segments.get((segment.unit_id, segment.epoch, segment.sequence))
        lines = int.from_bytes(segment.positions, "little")
        done = int.from_bytes(shard["done"], "little")
        good = not lines & done and lines.bit_length() <= shard["num_lines"]
        expected: type[Exception] | None
        if known is not None:
            expected = None if known["sha256"] == segment.sha256 else Conflict
        elif not live:
            expected = LeaseLost
        else:
            expected = None if good else Conflict
        try:
            finished = segments.record(self.db, lease, segment, lease_seconds=_LEASE_SECONDS)
        except (LeaseLost, Conflict) as error:
            if type(error) is not expected:
                raise
            self.look(changed=False)
            return
        assert expected is None, "a segment was taken that should have been refused"
        self.look(changed=known is None)
        unit, shard = self.rows.units[lease.unit_id], self.rows.shards[lease.unit_id]
        assert int.from_bytes(shard["done"], "little") == done | lines
        assert finished == (unit["state"] == UnitState.DONE)
        if live and finished:
            self.ended.add((lease.unit_id, lease.epoch))
        elif live and known is None:
            assert (unit["lease_expires_at"] - self.bench.clock.now).total_seconds() == 60

    def check_reaped(self, reaped: set[Any], lost: set[Any], before: Rows) -> None:
        """Only leases that were to be lost are lost, and their door is closed at once."""
        assert reaped <= lost
        for unit_id in reaped:
            old, unit = before.units[unit_id], self.rows.units[unit_id]
            assert unit["state"] != UnitState.LEASED
            assert unit["epoch"] > old["epoch"], "a reap raises the epoch"
            assert unit["crash_count"] == old["crash_count"] + 1

    def add_up(self, batch_id: BatchId) -> tuple[int, int]:
        """Return how many lines a finalizer writes to either file; of each line one record."""
        completed = failed = 0
        for shard in self.rows.shards_of(batch_id):
            found = self.rows.segments_of(shard["unit_id"])
            answered = sum(segment["num_completed"] for segment in found)
            done = sum(int.from_bytes(s["positions"], "little").bit_count() for s in found)
            completed += answered
            failed += shard["num_lines"] - answered
            state = self.rows.units[shard["unit_id"]]["state"]
            assert done == shard["num_lines"] or state != UnitState.DONE
        return completed, failed

    def run_shard(self, lease: Lease) -> None:
        """Commit everything that is missing of a shard, a part at a time."""
        shard = self.rows.shards[lease.unit_id]
        missing = [p for p in range(shard["num_lines"]) if not has_bit(shard["done"], p)]
        for sequence, first in enumerate(range(0, len(missing), 4)):
            segment = self.bench.make_segment(
                lease,
                missing[first : first + 4],
                num_lines=shard["num_lines"],
                sequence=sequence,
            )
            self.commit(lease, segment)
        assert self.rows.units[lease.unit_id]["state"] == UnitState.DONE

    def end_honestly(self) -> None:
        """Let sweepers and workers without a fault finish: every batch ends, soon."""
        for _ in range(2):
            # Every lease has run out and is reaped; every wait is over in the second round.
            self.bench.clock.advance(_LEASE_SECONDS + _BACKOFF_SECONDS + 1)
            self.reap_all()
            for kind in (UnitKind.PLAN, UnitKind.SHARD, UnitKind.FINALIZE):
                while (lease := self.claim(kind, "honest")) is not None:
                    if kind is UnitKind.PLAN:
                        self.end(lease, lambda lease=lease: self.bench.record_plan(lease, [3, 2]))  # type: ignore[misc]
                    elif kind is UnitKind.SHARD:
                        self.run_shard(lease)
                    else:
                        self.publish(lease)
        left = {row["status"] for row in self.rows.batches.values()} - TERMINAL_STATUSES
        assert not left, f"batches that do not end: {left}"

    def reap_all(self) -> None:
        """Do what a sweeper does in its turn."""
        units.reap(self.db, limit=1000)
        batches.expire_overdue(self.db)
        batches.advance_finished(self.db)
        self.look()

    def publish(self, lease: Lease) -> None:
        """Write the files of a batch, in so many words."""
        completed, failed = self.add_up(lease.batch_id)
        self.end(
            lease,
            lambda: self.bench.complete(lease, num_completed=completed, num_failed=failed),
        )
        batch = self.rows.batches[lease.batch_id]
        assert batch["final_completed"] + batch["final_failed"] == (batch["total"] or 0)


# --- running it ---


def run(
    opened: Callable[[], Bench], *, examples: int, steps: int, derandomize: bool, shrink: bool
) -> None:
    """Run the machine; what fails is raised, with the shortest calls that lead there if asked."""
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    run_state_machine_as_test(
        partial(Machine, opened),  # type: ignore[arg-type]  # it calls whatever it is given
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


def copies_of(template: Path, folder: Path) -> Callable[[], Bench]:
    """Return what opens a bench over a new copy of a SQLite file with our tables."""
    numbers = count()

    def opened() -> Bench:
        path = folder / f"{next(numbers)}.sqlite3"
        shutil.copyfile(template, path)
        clock = FixedClock()
        return Bench(db=open_database(f"sqlite:///{path}", clock=clock), clock=clock)

    return opened


def main(examples: str, steps: str) -> None:
    """Say whose `storage` it is, and run."""
    print(storage.__file__, flush=True)
    with tempfile.TemporaryDirectory() as name:
        template = Path(name) / "template.sqlite3"
        with open_database(f"sqlite:///{template}") as db:
            upgrade(db)
        run(
            copies_of(template, Path(name)),
            examples=int(examples),
            steps=int(steps),
            derandomize=True,
            shrink=False,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
