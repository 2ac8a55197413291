import random
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from jobs.domain.batch import BatchStatus
from jobs.domain.errors import Conflict, LeaseLost
from jobs.domain.ids import BatchId, UnitId
from jobs.domain.retry import Settlement
from jobs.domain.shard import Lease, UnitKind, UnitState, bitmap, has_bit
from storage import batches, files, segments, shards, units
from storage.tables import units as units_table
from tests.conformance.storage.bench import Bench

NUM_LINES = 4


def void(_: object) -> None:
    """Drop what a call returns."""


def run_together(*actions: Callable[[], None]) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(len(actions), timeout=30)

    def run(action: Callable[[], None]) -> None:
        try:
            start.wait()
            action()
        except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
            failures.append(error)

    threads = [threading.Thread(daemon=True, target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def work(bench: Bench, name: str) -> None:
    """Run shards a line at a time, giving some back in between."""
    rng = random.Random(name)
    while (lease := bench.claim(UnitKind.SHARD, worker=name)) is not None:
        done = shards.get(bench.db, lease.unit_id).done
        missing = [p for p in range(NUM_LINES) if not has_bit(done, p)]
        try:
            for sequence, position in enumerate(missing):
                if rng.random() < 0.2:
                    units.settle(bench.db, lease, Settlement(state=UnitState.PENDING))
                    break
                bench.record(lease, [position], num_lines=NUM_LINES, sequence=sequence)
        except LeaseLost:
            continue


def check(bench: Bench, batch_id: BatchId) -> None:
    """Every line that is done is in exactly one segment, and every sum agrees."""
    batch = batches.get(bench.db, batch_id)
    done = 0
    for shard, _ in shards.list_for_batch(bench.db, batch_id):
        union = 0
        for segment in segments.list_for_unit(bench.db, shard.unit_id):
            positions = int.from_bytes(segment.positions, "little")
            assert not union & positions
            union |= positions
        assert union == int.from_bytes(shard.done, "little")
        done += union.bit_count()
    assert batch.request_counts.completed == done


def test_two_workers_finish_every_line_once_and_one_finalizer_follows(bench: Bench) -> None:
    batch_id = bench.add_planned(*[NUM_LINES] * 12)
    run_together(lambda: work(bench, "a"), lambda: work(bench, "b"))
    work(bench, "c")  # what the last of them gave back
    check(bench, batch_id)
    assert batches.get(bench.db, batch_id).request_counts.completed == 12 * NUM_LINES
    assert batches.get(bench.db, batch_id).status is BatchStatus.FINALIZING
    assert bench.must_claim().kind is UnitKind.FINALIZE
    assert bench.claim() is None


@pytest.mark.parametrize("seed", range(3))
def test_cancel_sweep_and_reap_beside_two_workers_leave_nothing_hanging(
    bench: Bench, seed: int
) -> None:
    batch_id = bench.add_planned(*[NUM_LINES] * 12)

    def disturb() -> None:
        rng = random.Random(seed)
        for _ in range(4):
            bench.clock.advance(61)
            units.reap(bench.db, rng=rng)
            batches.advance_finished(bench.db)
        batches.request_cancel(bench.db, batch_id)
        for _ in range(4):
            batches.advance_finished(bench.db)
            batches.expire_overdue(bench.db)
            units.poke_due(bench.db)

    run_together(lambda: work(bench, "a"), lambda: work(bench, "b"), disturb)
    bench.clock.advance(1000)
    units.reap(bench.db)
    batches.advance_finished(bench.db)
    check(bench, batch_id)
    finalizer = bench.must_claim()
    assert finalizer.kind is UnitKind.FINALIZE
    ended = bench.complete(finalizer)
    assert ended.status in {BatchStatus.CANCELLED, BatchStatus.COMPLETED}


def test_one_of_two_commits_of_the_same_line_wins(bench: Bench) -> None:
    bench.add_planned(NUM_LINES)
    lease = bench.must_claim()
    outcomes: list[str] = []

    def commit(sequence: int) -> None:
        try:
            bench.record(lease, [0], num_lines=NUM_LINES, sequence=sequence)
        except Conflict:
            outcomes.append("refused")
        else:
            outcomes.append("committed")

    run_together(lambda: commit(0), lambda: commit(1))
    assert sorted(outcomes) == ["committed", "refused"]
    assert shards.get(bench.db, lease.unit_id).done == bitmap([0], NUM_LINES)


def test_one_batch_comes_of_two_inserts_with_one_key(bench: Bench) -> None:
    first, second = (bench.make_batch(idempotency_key="k") for _ in range(2))
    found: list[BatchId] = []
    run_together(
        lambda: found.append(batches.insert(bench.db, first).id),
        lambda: found.append(batches.insert(bench.db, second).id),
    )
    assert len(set(found)) == 1
    assert bench.claim() is not None
    assert bench.claim() is None


def test_twenty_inserts_with_one_key_make_one_batch_with_one_plan(bench: Bench) -> None:
    file = bench.add_file()
    made = [bench.make_batch(file=file, idempotency_key="k") for _ in range(20)]
    found: list[BatchId] = []
    run_together(
        *(lambda batch=batch: found.append(batches.insert(bench.db, batch).id) for batch in made)
    )
    assert len(found) == 20
    assert len(set(found)) == 1
    assert bench.claim() is not None
    assert bench.claim() is None


def test_eight_reapers_give_up_each_lease_once(bench: Bench) -> None:
    bench.add_planned(*[1] * 40)
    leases = [bench.must_claim(UnitKind.SHARD) for _ in range(40)]
    bench.clock.advance(61)
    reaped: list[UnitId] = []

    def reap() -> None:
        while found := units.reap(bench.db, limit=3):
            reaped.extend(one.unit_id for one in found)

    run_together(*[reap] * 8)
    # What each of them skipped because another held it.
    reaped.extend(one.unit_id for one in units.reap(bench.db))
    assert sorted(reaped) == sorted(lease.unit_id for lease in leases)
    with bench.db.read() as tx:
        rows = tx.execute(
            sa.select(units_table.c.epoch, units_table.c.crash_count).where(
                units_table.c.kind == UnitKind.SHARD
            )
        ).all()
    assert {tuple(row) for row in rows} == {(2, 1)}


def test_five_calls_of_two_planners_insert_the_shards_once(bench: Bench) -> None:
    bench.add_batch()
    stale = bench.must_claim(UnitKind.PLAN)
    bench.clock.advance(61)
    units.reap(bench.db)
    bench.clock.advance(61)
    lease = bench.must_claim(UnitKind.PLAN, worker="worker_b")
    outcomes: list[str] = []

    def plan(by: Lease) -> None:
        try:
            outcomes.append(str(bench.record_plan(by, (3, 2))))
        except LeaseLost:
            outcomes.append("lost")

    run_together(*[lambda: plan(lease)] * 5, *[lambda: plan(stale)] * 2)
    assert sorted(outcomes) == ["True"] * 5 + ["lost"] * 2
    assert len(shards.list_for_batch(bench.db, lease.batch_id)) == 2


def test_each_of_eight_claimers_gets_one_unit_a_claim_while_others_ring(bench: Bench) -> None:
    bench.add_planned(*[1] * 80)
    found: list[Lease] = []

    def claim(worker: str) -> None:
        leases: list[Lease] = []
        while len(leases) < 10:
            # None while those who ring hold the rows: a claim does not wait for them.
            if (lease := bench.claim(UnitKind.SHARD, worker=worker)) is not None:
                leases.append(lease)
        found.extend(leases)

    def ring() -> None:
        for _ in range(20):
            units.poke_due(bench.db, again_after_seconds=0)

    run_together(*(lambda n=n: claim(f"worker_{n}") for n in range(6)), ring, ring)
    assert len({lease.unit_id for lease in found}) == 60
    with bench.db.read() as tx:
        leased = sa.select(sa.func.count()).where(units_table.c.state == UnitState.LEASED)
        assert tx.execute(leased).scalar_one() == 60


@pytest.mark.parametrize("seed", range(6))
def test_a_cancel_beside_a_plan_leaves_no_work_behind(bench: Bench, seed: int) -> None:
    batch_id = bench.add_batch().id
    lease = bench.must_claim(UnitKind.PLAN)
    actions: list[Callable[[], object]] = [
        lambda: bench.record_plan(lease, (3, 2)),
        lambda: batches.request_cancel(bench.db, batch_id),
        lambda: batches.advance_finished(bench.db),
    ]
    random.Random(seed).shuffle(actions)
    run_together(*(lambda action=action: action() for action in actions))
    assert bench.complete(bench.must_claim(UnitKind.FINALIZE)).status is BatchStatus.CANCELLED
    assert bench.claim() is None


@pytest.mark.parametrize("state", [UnitState.PENDING, UnitState.EXPIRED])
def test_a_window_that_passes_while_a_shard_is_settled_ends_the_batch(
    bench: Bench, state: UnitState
) -> None:
    batch_id = bench.add_planned(3, hours=1)
    lease = bench.must_claim(UnitKind.SHARD)
    bench.clock.advance(3601)
    run_together(
        lambda: void(units.settle(bench.db, lease, Settlement(state=state))),
        lambda: void(batches.expire_overdue(bench.db)),
        lambda: void(batches.advance_finished(bench.db)),
    )
    assert batches.get(bench.db, batch_id).status is BatchStatus.FINALIZING
    assert bench.complete(bench.must_claim(UnitKind.FINALIZE)).status is BatchStatus.EXPIRED


def test_of_two_finalizers_the_one_that_holds_the_lease_publishes(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.run_all_shards()
    stale = bench.must_claim(UnitKind.FINALIZE)
    bench.clock.advance(61)
    units.reap(bench.db)
    bench.clock.advance(61)
    lease = bench.must_claim(UnitKind.FINALIZE, worker="worker_b")
    outcomes: list[str] = []

    def publish(by: Lease) -> None:
        try:
            outcomes.append(str(bench.complete(by).status))
        except LeaseLost:
            outcomes.append("lost")

    run_together(lambda: publish(stale), lambda: publish(lease), lambda: publish(lease))
    assert sorted(outcomes) == ["completed", "completed", "lost"]
    published, _ = files.list_page(
        bench.db, tenant_id=batches.get(bench.db, batch_id).tenant_id, purpose="batch_output"
    )
    assert len(published) == 1
