import random
import threading
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from jobs.domain.batch import BatchEnding, BatchStatus
from jobs.domain.errors import Conflict, LeaseLost
from jobs.domain.ids import BatchId, WorkerId
from jobs.domain.retry import Settlement
from jobs.domain.shard import FORMAT_VERSION, Fault, Lease, Trial, UnitKind, UnitState
from storage import batches, shards, units, workers
from storage.tables import units as units_table
from tests.conformance.storage.bench import ALL, Bench

RNG = random.Random(0)
RELEASED = Settlement(state=UnitState.PENDING, exit="released")


def state_of(bench: Bench, lease: Lease) -> UnitState:
    with bench.db.read() as tx:
        return UnitState(
            tx.execute(
                sa.select(units_table.c.state).where(units_table.c.id == lease.unit_id)
            ).scalar_one()
        )


def test_claim_returns_nothing_when_nothing_waits(bench: Bench) -> None:
    assert bench.claim() is None


def test_claim_gives_a_lease_and_no_second_one(bench: Bench) -> None:
    batch = bench.add_batch()
    lease = bench.must_claim()
    assert lease.batch_id == batch.id
    assert lease.kind is UnitKind.PLAN
    assert (lease.epoch, lease.attempt, lease.crash_count) == (1, 1, 0)
    assert lease.expires_at == bench.clock.now + timedelta(seconds=60)
    assert bench.claim(worker="worker_b") is None


def test_claim_takes_the_higher_priority_then_the_earlier_deadline_then_the_older(
    bench: Bench,
) -> None:
    late = bench.add_batch(hours=48)
    older = bench.add_batch(hours=24)
    younger = bench.add_batch(hours=24)
    urgent = bench.add_batch(hours=72, priority=5)
    order = [bench.must_claim().batch_id for _ in range(4)]
    assert order == [urgent.id, older.id, younger.id, late.id]


def test_claim_hands_out_shards_in_the_order_of_their_lines(bench: Bench) -> None:
    bench.add_planned(*[1] * 20)
    assert [bench.must_claim(UnitKind.SHARD).ordinal for _ in range(20)] == list(range(20))


def test_claim_heeds_kinds_models_and_excluded_batches(bench: Bench) -> None:
    batch_id = bench.add_planned(3)
    assert bench.claim(UnitKind.PLAN) is None
    assert bench.claim(UnitKind.SHARD, model_keys=["other"]) is None
    assert bench.claim(UnitKind.SHARD, model_keys=[]) is None
    claimed = units.claim(
        bench.db,
        worker_id=WorkerId("w"),
        boot_id="b",
        kinds=ALL,
        lease_seconds=60,
        exclude_batches=[batch_id],
    )
    assert claimed is None
    assert bench.claim(UnitKind.SHARD, model_keys=["other", "demo"]) is not None


def test_models_do_not_limit_plans(bench: Bench) -> None:
    bench.add_batch()
    assert bench.claim(UnitKind.PLAN, model_keys=["demo"]) is not None


def test_a_unit_of_a_newer_format_is_left_to_newer_workers(bench: Bench) -> None:
    bench.add_batch()
    with bench.db.transaction() as tx:
        tx.execute(sa.update(units_table).values(format_version=FORMAT_VERSION + 1))
    assert bench.claim() is None


def test_two_claimers_never_get_the_same_unit(bench: Bench) -> None:
    bench.add_planned(*[1] * 40)
    found: list[Lease] = []
    failures: list[BaseException] = []
    start = threading.Barrier(2, timeout=30)

    def claim_all(worker: str) -> None:
        try:
            start.wait()
            while (lease := bench.claim(UnitKind.SHARD, worker=worker)) is not None:
                found.append(lease)
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            failures.append(error)

    threads = [
        threading.Thread(daemon=True, target=claim_all, args=(f"worker_{n}",)) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert len(found) == 40
    assert len({lease.unit_id for lease in found}) == 40


def test_renew_extends_what_is_held_and_leaves_out_what_is_lost(bench: Bench) -> None:
    bench.add_planned(3, 2)
    first, second = bench.must_claim(), bench.must_claim()
    bench.clock.advance(61)
    units.reap(bench.db, rng=RNG)
    assert units.renew(bench.db, [first, second], lease_seconds=60) == {}
    bench.clock.advance(600)
    third = bench.must_claim()
    renewed = units.renew(bench.db, [first, third], lease_seconds=90)
    assert set(renewed) == {third.unit_id}
    assert renewed[third.unit_id].expires_at == bench.clock.now + timedelta(seconds=90)
    assert not renewed[third.unit_id].cancel_requested
    assert units.renew(bench.db, [], lease_seconds=60) == {}


def test_a_lease_past_its_expiry_that_nobody_reaped_is_renewed(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    bench.clock.advance(1000)
    assert lease.unit_id in units.renew(bench.db, [lease], lease_seconds=60)
    assert units.reap(bench.db) == []


def test_next_expiry_is_that_of_the_first_lease_to_run_out(bench: Bench) -> None:
    bench.add_planned(3, 2)
    assert units.next_expiry(bench.db) is None
    first, began = bench.must_claim(), bench.clock.now
    bench.clock.advance(10)
    second = bench.must_claim()
    assert units.next_expiry(bench.db) == first.expires_at == began + timedelta(seconds=60)
    units.renew(bench.db, [first], lease_seconds=90)
    assert units.next_expiry(bench.db) == second.expires_at


def test_renewal_says_that_the_batch_is_cancelled(bench: Bench) -> None:
    batch_id = bench.add_planned(3)
    lease = bench.must_claim()
    assert units.watch(bench.db, [batch_id]) == {}
    batches.request_cancel(bench.db, batch_id)
    assert units.renew(bench.db, [lease], lease_seconds=60)[lease.unit_id].cancel_requested
    assert units.watch(bench.db, [batch_id]) == {batch_id: UnitState.CANCELLED}


def test_renewal_says_that_the_deadline_has_passed(bench: Bench) -> None:
    batch_id = bench.add_planned(3, hours=1)
    lease = bench.must_claim()
    bench.clock.advance(3600)
    renewal = units.renew(bench.db, [lease], lease_seconds=60)[lease.unit_id]
    assert renewal.expired
    assert not renewal.cancel_requested
    assert units.watch(bench.db, [batch_id]) == {batch_id: UnitState.EXPIRED}


def test_renewal_of_a_finalizer_never_says_stop(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    batches.request_cancel(bench.db, batch_id)
    lease = bench.must_claim(UnitKind.FINALIZE)
    renewal = units.renew(bench.db, [lease], lease_seconds=60)[lease.unit_id]
    assert not renewal.cancel_requested
    assert not renewal.expired


def test_released_unit_may_be_claimed_after_its_wait(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    waits = Settlement(state=UnitState.PENDING, delay_seconds=5, exit="released")
    assert units.settle(bench.db, lease, waits) is UnitState.PENDING
    assert bench.claim() is None
    bench.clock.advance(5)
    again = bench.must_claim(worker="worker_b")
    assert (again.unit_id, again.epoch, again.attempt) == (lease.unit_id, 2, 2)
    assert again.crash_count == 0
    assert units.get_exit(bench.db, lease.unit_id) == "released"


def test_settling_again_changes_nothing(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    assert units.settle(bench.db, lease, RELEASED) is UnitState.PENDING
    assert units.settle(bench.db, lease, RELEASED) is UnitState.PENDING


def test_a_stale_lease_settles_nothing(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    units.settle(bench.db, lease, RELEASED)
    bench.must_claim(worker="worker_b")
    with pytest.raises(LeaseLost):
        units.settle(bench.db, lease, Settlement(state=UnitState.FAILED))


def test_a_shard_with_missing_lines_is_not_done(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    with pytest.raises(Conflict, match="3 lines without a result"):
        units.settle(bench.db, lease, Settlement(state=UnitState.DONE))
    assert state_of(bench, lease) is UnitState.LEASED


def test_a_failed_shard_lets_its_batch_be_finalized(bench: Bench) -> None:
    batch_id = bench.add_planned(3)
    lease = bench.must_claim()
    units.settle(bench.db, lease, Settlement(state=UnitState.FAILED, exit="attempts_exhausted"))
    assert batches.get(bench.db, batch_id).status is BatchStatus.FINALIZING
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_a_failed_plan_fails_its_batch(bench: Bench) -> None:
    batch = bench.add_batch()
    units.settle(bench.db, bench.must_claim(), Settlement(state=UnitState.FAILED))
    failed = batches.get(bench.db, batch.id)
    assert failed.status is BatchStatus.FAILED
    assert [problem.code for problem in failed.errors] == ["planning_failed"]
    assert failed.failed_at == bench.clock.now
    assert bench.claim() is None


def test_a_finalizer_is_never_given_up(bench: Bench) -> None:
    bench.add_planned(3, 2)
    bench.run_all_shards()
    lease = bench.must_claim()
    failed = Settlement(state=UnitState.FAILED)
    assert units.settle(bench.db, lease, failed) is UnitState.PENDING
    bench.clock.advance(60)
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_releasing_work_of_a_cancelled_batch_ends_it(bench: Bench) -> None:
    batch_id = bench.add_planned(3)
    lease = bench.must_claim()
    batches.request_cancel(bench.db, batch_id)
    assert units.settle(bench.db, lease, RELEASED) is UnitState.CANCELLED
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_a_holder_that_saw_the_deadline_first_expires_the_batch(bench: Bench) -> None:
    batch_id = bench.add_planned(3, hours=1)
    lease = bench.must_claim()
    bench.clock.advance(3601)
    units.settle(bench.db, lease, Settlement(state=UnitState.EXPIRED))
    batch = batches.get(bench.db, batch_id)
    assert (batch.status, batch.ending) == (BatchStatus.FINALIZING, BatchEnding.EXPIRED)


def test_reap_leaves_leases_that_run(bench: Bench) -> None:
    bench.add_planned(3)
    bench.must_claim()
    bench.clock.advance(60)
    assert units.reap(bench.db) == []


def test_expired_lease_returns_the_shard_after_a_wait_and_closes_the_door(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    bench.clock.advance(61)
    (reaped,) = units.reap(bench.db, rng=RNG)
    assert (reaped.unit_id, reaped.state) == (lease.unit_id, UnitState.PENDING)
    with pytest.raises(LeaseLost):
        bench.record(lease, [0])
    bench.clock.advance(2)
    again = bench.must_claim()
    assert (again.epoch, again.crash_count, again.attempt) == (3, 1, 2)


def test_reap_takes_a_bounded_number(bench: Bench) -> None:
    bench.add_planned(1, 1, 1)
    for _ in range(3):
        bench.must_claim()
    bench.clock.advance(61)
    assert len(units.reap(bench.db, limit=2)) == 2
    assert len(units.reap(bench.db, limit=2)) == 1


def test_reap_ends_work_of_a_cancelled_batch(bench: Bench) -> None:
    batch_id = bench.add_planned(3, 2)
    bench.must_claim()
    batches.request_cancel(bench.db, batch_id)
    bench.clock.advance(61)
    assert [reaped.state for reaped in units.reap(bench.db)] == [UnitState.CANCELLED]
    assert bench.must_claim().kind is UnitKind.FINALIZE


def test_a_shard_lost_too_often_without_progress_fails(bench: Bench) -> None:
    batch_id = bench.add_planned(3)
    for _ in range(2):
        bench.must_claim()
        bench.clock.advance(1000)
        (reaped,) = units.reap(bench.db, max_claims_without_progress=2)
        assert reaped.state is UnitState.PENDING
        bench.clock.advance(1000)
    bench.must_claim()
    bench.clock.advance(1000)
    (reaped,) = units.reap(bench.db, max_claims_without_progress=2)
    assert reaped.state is UnitState.FAILED
    assert batches.get(bench.db, batch_id).status is BatchStatus.FINALIZING


def test_progress_forgives_lost_leases(bench: Bench) -> None:
    bench.add_planned(3)
    for position in range(2):
        lease = bench.must_claim()
        bench.record(lease, [position])
        bench.clock.advance(1000)
        (reaped,) = units.reap(bench.db, max_claims_without_progress=1)
        assert reaped.state is UnitState.PENDING
        bench.clock.advance(1000)
    assert bench.must_claim().crash_count == 2


def test_a_plan_lost_too_often_fails_its_batch(bench: Bench) -> None:
    batch = bench.add_batch()
    bench.must_claim()
    bench.clock.advance(1000)
    units.reap(bench.db, max_claims_without_progress=0)
    assert batches.get(bench.db, batch.id).status is BatchStatus.FAILED


def test_a_restart_takes_back_the_leases_of_the_process_before_at_once(bench: Bench) -> None:
    bench.add_planned(3, 2)
    old = bench.claim(boot_id="before")
    mine = bench.claim(boot_id="now")
    assert old is not None
    assert mine is not None
    (reaped,) = units.reap_other_boots(bench.db, boot_id="now")
    assert reaped.unit_id == old.unit_id
    assert state_of(bench, mine) is UnitState.LEASED
    assert bench.must_claim().unit_id == old.unit_id


@pytest.mark.parametrize("state", ["pending", "leased", "done"])
def test_a_unit_that_ended_stays_as_it_is(bench: Bench, state: str) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    units.settle(bench.db, lease, Settlement(state=UnitState.FAILED))
    with pytest.raises(Conflict, match="ended"), bench.db.transaction() as tx:
        tx.execute(
            sa.update(units_table).where(units_table.c.id == lease.unit_id).values(state=state)
        )
    assert state_of(bench, lease) is UnitState.FAILED


def test_models_with_shards_to_claim_are_listed_with_since_when(bench: Bench) -> None:
    assert units.list_waiting_models(bench.db) == {}
    bench.add_planned(3, 2)
    since = bench.clock.now
    bench.clock.advance(5)
    bench.add_planned(2)
    bench.add_batch()
    assert units.list_waiting_models(bench.db) == {"demo": since}
    for _ in range(2):
        bench.must_claim(UnitKind.SHARD)
    assert units.list_waiting_models(bench.db) == {"demo": since + timedelta(seconds=5)}
    bench.must_claim(UnitKind.SHARD)
    assert units.list_waiting_models(bench.db) == {}


def test_each_model_of_a_batch_that_has_several_is_claimed_by_who_has_it(bench: Bench) -> None:
    batch = bench.add_batch()
    lease = bench.must_claim(UnitKind.PLAN)
    names = ["demo", "demo", "another", "third"]
    assert bench.record_plan(lease, [2] * 4, model_key=None, model_keys=names)
    found = batches.get(bench.db, batch.id)
    assert (found.model, found.models) == (None, ("demo", "another", "third"))
    bench.add_planned(1)
    assert batches.get(bench.db, bench.add_planned(1)).models == ()
    since = bench.clock.now
    assert units.list_waiting_models(bench.db) == dict.fromkeys(names, since)
    assert units.poke_due(bench.db) == [
        (UnitKind.SHARD, name) for name in ("another", "demo", "third")
    ]
    taken = bench.claim(UnitKind.SHARD, model_keys=["another"])
    assert taken is not None
    assert (taken.batch_id, taken.ordinal, taken.model_key) == (batch.id, 2, "another")
    assert bench.claim(UnitKind.SHARD, model_keys=["another"]) is None
    assert units.list_waiting_models(bench.db).keys() == {"demo", "third"}
    batches.request_cancel(bench.db, batch.id)
    assert units.list_waiting_models(bench.db).keys() == {"demo"}


def test_a_claim_takes_the_first_entry_of_an_index_however_many_wait(bench: Bench) -> None:
    bench.add_planned(*[1] * 500)
    if bench.db.is_postgres:
        # It plans by what it last counted, which may have been an empty table.
        with bench.db.transaction() as tx:
            tx.connection.exec_driver_sql("ANALYZE units")
    asked: list[tuple[str, Any]] = []

    def note(_c: object, _u: object, statement: str, parameters: object, *_: object) -> None:
        asked.append((statement, parameters))

    sa.event.listen(bench.db.engine, "before_cursor_execute", note)
    try:
        assert bench.claim(UnitKind.SHARD, model_keys=["demo"]) is not None
    finally:
        sa.event.remove(bench.db.engine, "before_cursor_execute", note)
    (claim,) = [(text, values) for text, values in asked if "candidate" in text]
    with bench.db.transaction() as tx:
        explain = "EXPLAIN" if bench.db.is_postgres else "EXPLAIN QUERY PLAN"
        rows = tx.connection.exec_driver_sql(f"{explain} {claim[0]}", claim[1])
        plan = "\n".join(str(row) for row in rows)
    used = plan.partition("ix_units_claim")[2][:200]
    assert "kind" in used, plan
    assert "model_key" in used, plan
    assert "ix_units_ready" not in plan, plan
    assert "Sort" not in plan, plan
    assert "B-TREE FOR ORDER" not in plan, plan


def test_forgotten_work_is_announced_again_after_a_while_only(bench: Bench) -> None:
    bench.add_planned(3, 2)
    bench.add_batch()
    everyone = [(UnitKind.PLAN, None), (UnitKind.SHARD, "demo")]
    assert units.poke_due(bench.db) == everyone
    assert units.poke_due(bench.db) == []
    bench.clock.advance(30)
    assert units.poke_due(bench.db) == everyone


def test_new_work_is_announced_at_once_though_older_work_was_just_now(bench: Bench) -> None:
    bench.add_planned(3, 2)
    shards_of_demo = [(UnitKind.SHARD, "demo")]
    assert units.poke_due(bench.db) == shards_of_demo
    bench.clock.advance(1)
    bench.add_planned(3)
    assert units.poke_due(bench.db) == shards_of_demo
    bench.must_claim(UnitKind.SHARD)
    assert units.poke_due(bench.db) == [], "what is claimed first tells nobody anything new"


def test_a_shard_that_may_run_again_later_is_announced_then(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim(UnitKind.SHARD)
    units.settle(bench.db, lease, Settlement(state=UnitState.PENDING, delay_seconds=20))
    assert units.poke_due(bench.db) == []
    bench.clock.advance(20)
    assert units.poke_due(bench.db) == [(UnitKind.SHARD, "demo")]


def test_a_death_leaves_its_suspects_and_counts_a_line_that_was_alone(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    shards.report_death(bench.db, lease, suspects=[[0, 1], [2]], exit_reason="SIGSEGV")
    assert shards.get(bench.db, lease.unit_id).suspects == ((0, 1), (2,))
    shards.report_death(bench.db, lease, suspects=[[1]], solo_crash=1)
    for _ in range(3):  # the reply to a commit was lost
        fault = shards.report_death(bench.db, lease, suspects=[[1]], solo_crash=1, num_crashes=2)
    assert fault == Fault(position=1, solo_crashes=2, places=("here",))
    shard = shards.get(bench.db, lease.unit_id)
    assert shard.suspects == ((1,),)
    assert shard.faults == (fault,)
    assert shards.list_faults(bench.db, lease.unit_id) == [fault]
    assert shards.list_for_batch(bench.db, lease.batch_id) == [(shard, UnitState.LEASED)]


def test_a_death_is_counted_by_machine_and_device_not_by_process(bench: Bench) -> None:
    for name, host in (("worker_a", "h1"), ("worker_b", "h1"), ("worker_c", "h2")):
        workers.heartbeat(bench.db, bench.make_worker(name, host=host))
    bench.add_planned(3)
    for number, name in enumerate(("worker_a", "worker_b", "worker_c"), start=1):
        lease = bench.must_claim(UnitKind.SHARD, worker=name)
        fault = shards.report_death(
            bench.db, lease, suspects=[[0]], solo_crash=0, num_crashes=number
        )
        units.settle(bench.db, lease, Settlement(state=UnitState.PENDING))
    assert fault == Fault(position=0, solo_crashes=3, places=("h1 cuda:0", "h2 cuda:0"))


def test_what_was_tried_when_a_worker_died_is_left_for_the_next(bench: Bench) -> None:
    bench.add_planned(3)
    dead = bench.must_claim(worker="worker_a")
    shards.report_worker_death(bench.db, dead, suspects=[[0, 1, 2]], died=None)
    shards.begin_trial(bench.db, dead, positions=[0, 1])
    bench.clock.advance(61)
    units.reap(bench.db)
    bench.clock.advance(10)
    lease = bench.must_claim(worker="worker_b")
    assert lease.num_stalls == 1
    trial = shards.get(bench.db, lease.unit_id).trial
    assert trial == Trial(owner=dead.owner, positions=(0, 1))
    with pytest.raises(LeaseLost):
        shards.begin_trial(bench.db, dead, positions=[2])
    with pytest.raises(LeaseLost):
        shards.report_worker_death(bench.db, dead, suspects=[], died=trial)
    assert shards.report_worker_death(bench.db, lease, suspects=[[0], [1]], died=trial) is None
    alone = Trial(owner=dead.owner, positions=(1,))
    fault = shards.report_worker_death(bench.db, lease, suspects=[[1]], died=alone)
    assert fault == Fault(position=1, solo_crashes=1, places=("here",))
    shard = shards.get(bench.db, lease.unit_id)
    assert (shard.suspects, shard.trial) == (((1,),), Trial(owner=lease.owner, positions=()))


def test_a_worker_that_gives_a_shard_back_blames_none_of_its_lines(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    shards.begin_trial(bench.db, lease, positions=[0, 1])
    units.settle(bench.db, lease, Settlement(state=UnitState.PENDING))
    trial = shards.get(bench.db, lease.unit_id).trial
    assert trial == Trial(owner=lease.owner, positions=()), "and the next one is careful too"


def test_narrowing_down_is_progress_and_ends_no_shard_as_stuck(bench: Bench) -> None:
    batch_id = bench.add_planned(3)
    for _ in range(30):
        lease = bench.must_claim(UnitKind.SHARD)
        trial = Trial(owner=lease.owner, positions=(0, 1))
        shards.report_worker_death(bench.db, lease, suspects=[[0], [1]], died=trial)
        bench.clock.advance(61)
        units.reap(bench.db)
        bench.clock.advance(61)
    ((_, state),) = shards.list_for_batch(bench.db, batch_id)
    assert state is UnitState.PENDING


def test_a_stale_lease_suspects_nobody(bench: Bench) -> None:
    bench.add_planned(3)
    lease = bench.must_claim()
    bench.clock.advance(61)
    units.reap(bench.db)
    with pytest.raises(LeaseLost):
        shards.report_death(bench.db, lease, suspects=[[0]])


def test_watching_a_batch_that_does_not_exist_finds_nothing(bench: Bench) -> None:
    assert units.watch(bench.db, [BatchId("batch_x")]) == {}
    assert units.watch(bench.db, []) == {}


@pytest.mark.parametrize("state", ["cancelled", "expired"])
def test_a_plan_ends_like_a_stopped_batch_only_if_its_batch_was_stopped(
    bench: Bench, state: str
) -> None:
    batch = bench.add_batch()
    settled = units.settle(bench.db, bench.must_claim(), Settlement(state=UnitState(state)))
    assert settled is UnitState.PENDING
    assert bench.must_claim().batch_id == batch.id


def test_a_plan_and_a_finalizer_are_not_done_without_what_they_are_for(bench: Bench) -> None:
    done = Settlement(state=UnitState.DONE)
    bench.add_planned(3, 2)
    bench.run_all_shards()
    finalizer = bench.must_claim()
    bench.add_batch()
    plan = bench.must_claim()
    for lease in (finalizer, plan):
        with pytest.raises(Conflict, match="is not done"):
            units.settle(bench.db, lease, done)
        assert state_of(bench, lease) is UnitState.LEASED


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_a_finalizer_never_ends_without_its_batch(bench: Bench, state: str) -> None:
    bench.add_planned(3, 2)
    bench.run_all_shards()
    settled = units.settle(bench.db, bench.must_claim(), Settlement(state=UnitState(state)))
    assert settled is UnitState.PENDING
    bench.clock.advance(60)
    assert bench.must_claim().kind is UnitKind.FINALIZE
