"""Feed, runner and finalizer together, over an engine of the test's own."""

import random
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from typing_extensions import override

from engine.base import Source
from engine.supervisor import MAX_SUSPECT_DEATHS
from jobs import sweeper
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import (
    BatchctlError,
    BlobStoreUnavailable,
    EngineDied,
    EngineMisconfigured,
    EngineOutOfMemory,
    EngineUnavailable,
    StorageError,
)
from jobs.domain.ids import TenantId, WorkerId
from jobs.domain.result import Result
from jobs.domain.retry import Settlement
from jobs.domain.shard import Segment, UnitKind, UnitState, count_bits
from jobs.domain.suspects import CAREFUL_STALLS, SOLO_CRASHES
from storage import batches, files, segments, shards, statistics, units
from storage.blobs.base import BlobInfo, BlobReader, BlobStore
from tests.builders import (
    NEVER,
    Bench,
    ScriptedEngine,
    Worker,
    await_set,
    await_true,
    ids_of,
    make_line,
    make_lines,
)


def segments_of(bench: Bench, batch: Batch) -> list[Segment]:
    return list(segments.iterate_for_batch(bench.db, batch.id))


def num_done(bench: Bench, batch: Batch) -> int:
    return sum(count_bits(segment.positions) for segment in segments_of(bench, batch))


def assert_answered(lines: list[dict[str, Any]], expected: dict[str, str]) -> None:
    """Check that each custom_id has, in this order, the answer to its own question."""
    found = [
        (line["custom_id"], line["response"]["body"]["choices"][0]["message"]["content"])
        for line in lines
    ]
    assert found == list(expected.items())


def sum_usage(lines: list[dict[str, Any]]) -> tuple[int, int]:
    usages = [
        line["response"]["body"]["usage"]
        for line in lines
        if line["response"] and "usage" in line["response"]["body"]
    ]
    return (
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["completion_tokens"] for usage in usages),
    )


class BlobsOfTheTest:
    """The bench's store, where the test says what happens to a segment that is written."""

    def __init__(self, store: BlobStore, before_put: Callable[[int], None]) -> None:
        self._store = store
        self._before_put = before_put
        self.num_puts = 0

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> BlobInfo:
        self.num_puts += 1
        self._before_put(self.num_puts)
        return self._store.put(key, data, if_absent=if_absent)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._store, name)


# --- everything goes well ---


@pytest.mark.parametrize("seed", [1, 2])
def test_results_out_of_order_come_out_in_input_order(bench: Bench, seed: int) -> None:
    batch = bench.submit_planned(make_lines(50), shard_lines=7)
    with Worker(bench, ScriptedEngine(slots=16, seed=seed)) as worker:
        assert worker.result() == 50
    batch = bench.finalize()
    assert batch.status is BatchStatus.COMPLETED
    assert_answered(bench.output_of(batch), {f"r{n}": f"re: hello {n}" for n in range(50)})
    assert batch.error_file_id is None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (50, 0)


def test_failed_lines_go_to_the_error_file_and_nowhere_else(bench: Bench) -> None:
    content = make_lines(3) + make_line("bad", "refuse") + b"\n" + make_lines(2, first=3)
    bench.submit_planned(content)
    with Worker(bench, ScriptedEngine(seed=3)) as worker:
        worker.result()
    batch = bench.finalize()
    assert ids_of(bench.output_of(batch)) == [f"r{n}" for n in range(5)]
    (failed,) = bench.errors_of(batch)
    assert (failed["custom_id"], failed["error"]) == ("bad", None)
    assert failed["response"]["body"]["error"]["code"] == "refused"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (5, 1)


def test_batch_of_which_every_line_fails_is_completed_without_an_output(bench: Bench) -> None:
    bench.submit_planned(make_lines(3, content="refuse"))
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    batch = bench.finalize()
    assert (batch.status, batch.output_file_id) == (BatchStatus.COMPLETED, None)
    assert len(bench.errors_of(batch)) == 3


def test_usage_is_the_sum_over_lines(bench: Bench) -> None:
    content = make_lines(20) + make_lines(4, first=20)
    bench.submit_planned(content, shard_lines=5)
    with Worker(bench, ScriptedEngine(seed=1), settings=replace(NEVER, flush_results=2)) as worker:
        worker.result()
    before = batches.get(bench.db, bench.claim(UnitKind.FINALIZE).batch_id)
    prompt = sum(len(f"hello {n}") for n in range(24))
    assert before.usage.prompt_tokens == prompt, "while the files are not written yet"


def test_usage_of_a_finished_batch_is_the_sum_over_its_files(bench: Bench) -> None:
    bench.submit_planned(make_lines(23), shard_lines=5)
    with Worker(bench, ScriptedEngine(seed=1), settings=replace(NEVER, flush_results=2)) as worker:
        worker.result()
    batch = bench.finalize()
    usage = (batch.usage.prompt_tokens, batch.usage.completion_tokens)
    assert usage == sum_usage(bench.output_of(batch))
    assert batch.usage.cached_tokens == 23


def test_engine_is_not_drained_at_the_end_of_a_shard_or_batch(bench: Bench) -> None:
    made = [bench.submit_planned(make_lines(9), shard_lines=2) for _ in range(3)]
    # Answers nothing unless all its slots are taken, or all that is left runs: a feed that
    # waited for a shard or a batch to end would never get here.
    with Worker(bench, ScriptedEngine(slots=8, total=27)) as worker:
        assert worker.result() == 27
    finished = {bench.finalize().id for _ in made}
    assert finished == {batch.id for batch in made}


def num_pending_shards(bench: Bench) -> int:
    found = statistics.read(bench.db, workers_since=timedelta(0)).queues
    return sum(one.ready + one.waiting for one in found if one.kind is UnitKind.SHARD)


def test_feed_reads_ahead_however_small_the_shards_are(bench: Bench) -> None:
    bench.submit_planned(make_lines(70), shard_lines=1)
    engine = ScriptedEngine(slots=2)
    engine.pause_after(0)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        # Two run; the target is 64 queued ones, so all but a few shards are leased by then.
        await_true(lambda: num_pending_shards(bench) <= 70 - 2 - 64)
        engine.go_on()
        assert worker.result() == 70


class HoardingEngine(ScriptedEngine):
    """Takes three times what it runs, as the engines with a queue of their own do."""

    @override
    def generate(self, source: Source) -> Generator[Result]:
        self.num_slots *= 3
        yield from super().generate(source)


@pytest.mark.parametrize("make_engine", [ScriptedEngine, HoardingEngine])
def test_two_to_three_times_the_slots_wait_across_borders_of_shards_batches_and_tenants(
    bench: Bench, make_engine: type[ScriptedEngine]
) -> None:
    num_lines, shard_lines = 60, 5
    for tenant in ("first", "second", "first", "second", "third"):
        bench.submit(make_lines(num_lines), tenant_id=TenantId(tenant))
        bench.plan(shard_lines=shard_lines)
    total, slots = 5 * num_lines, 30
    # What lacks one line gets a shard more; an answer is counted after it was taken back.
    most = 3 * slots + shard_lines
    engine = make_engine(slots=slots)
    engine.pause_after(0)

    def num_waiting() -> int:
        num_leased = total - shard_lines * num_pending_shards(bench)
        return num_leased - engine.num_answered - slots

    class WatchedReads(BlobsOfTheTest):
        most_waiting = 0

        def open_reader(self, key: str, *, start: int = 0, length: int | None = None) -> BlobReader:
            self.most_waiting = max(self.most_waiting, num_waiting())
            return bench.blobs.open_reader(key, start=start, length=length)

    store = WatchedReads(bench.blobs, lambda _number: None)
    with Worker(bench, engine, blobs=store) as worker:
        for num_answered in (0, 40, 80):
            engine.pause_after(num_answered)
            await_set(engine.paused)
            await_true(lambda: num_waiting() > 2 * slots)
        await_true(lambda: num_waiting() >= 3 * slots - shard_lines)
        with pytest.raises(AssertionError, match="too long"):
            await_true(lambda: store.most_waiting > most, seconds=1)
        engine.go_on()
        assert worker.result() == total
    assert store.most_waiting <= most


def test_urgent_batch_of_another_tenant_waits_for_no_more_than_what_was_read_ahead(
    bench: Bench,
) -> None:
    bench.submit(make_lines(300), tenant_id=TenantId("large"))
    bench.plan(shard_lines=10)
    engine = ScriptedEngine(slots=30)
    engine.pause_after(0)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        await_true(lambda: num_pending_shards(bench) <= (300 - 30 - 90) // 10)
        bench.submit(
            make_lines(3, content="urgent"), tenant_id=TenantId("small"), window_seconds=600
        )
        bench.plan()
        engine.go_on()
        assert worker.result() == 303
    first = next(place for place, text in enumerate(engine.asked) if text.startswith("urgent"))
    assert first <= 30 + 90
    assert engine.asked[first : first + 3] == [f"urgent {n}" for n in range(3)]


def test_next_shards_are_read_while_the_engine_runs_what_was_read_before(bench: Bench) -> None:
    store = ReadsWhenTold(bench)
    bench.submit_planned(make_lines(40), shard_lines=10)
    engine = ScriptedEngine(slots=4)
    engine.pause_after(0)
    with Worker(bench, engine, blobs=store) as worker:
        await_true(lambda: store.num_reads == 3)
        assert engine.num_answered == 0
        # What was read is answered, although the read of the third shard goes on and on.
        engine.go_on()
        await_true(lambda: engine.num_answered == 20)
        store.go_on.set()
        assert worker.result() == 40
    assert set(store.threads) == {"feed-read"}


class ReadsWhenTold(BlobsOfTheTest):
    """Holds up the third read of an input, and notes which threads read."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.blobs, lambda _number: None)
        self._inner = bench.blobs
        self.num_reads = 0
        self.threads: list[str] = []
        self.go_on = threading.Event()

    def open_reader(self, key: str, *, start: int = 0, length: int | None = None) -> BlobReader:
        self.num_reads += 1
        self.threads.append(threading.current_thread().name)
        if self.num_reads == 3:
            assert self.go_on.wait(60)
        return self._inner.open_reader(key, start=start, length=length)


def test_results_are_written_while_the_engine_goes_on(bench: Bench) -> None:
    go_on = threading.Event()
    writers: set[str] = set()

    def hold_up(_number: int) -> None:
        writers.add(threading.current_thread().name)
        assert go_on.wait(60)

    batch = bench.submit_planned(make_lines(40), shard_lines=10)
    engine = ScriptedEngine(slots=4)
    store = BlobsOfTheTest(bench.blobs, hold_up)
    with Worker(bench, engine, blobs=store, settings=replace(NEVER, flush_results=5)) as worker:
        await_true(lambda: engine.num_answered == 40)
        assert store.num_puts == 1, "the first segment is still being written"
        assert num_done(bench, batch) == 0
        go_on.set()
        assert worker.result() == 40
    assert writers == {"feed-write"}
    assert num_done(bench, batch) == 40


def test_worker_leaves_other_models_alone(bench: Bench) -> None:
    bench.submit(make_line("a", model="other"))
    other = bench.plan()
    bench.submit_planned(make_lines(2))
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 2
    assert bench.states(other) == [UnitState.PENDING]


# --- when results become durable ---


@pytest.mark.parametrize(
    ("settings", "num_answered"),
    [
        (replace(NEVER, flush_results=4), 4),
        (replace(NEVER, flush_bytes=1), 1),
        (replace(NEVER, flush_seconds=0.01), 1),
    ],
    ids=["count", "size", "age"],
)
def test_results_are_flushed_by(bench: Bench, settings: Any, num_answered: int) -> None:  # noqa: ANN401
    batch = bench.submit_planned(make_lines(10))
    engine = ScriptedEngine()
    engine.pause_after(num_answered)
    with Worker(bench, engine, settings=settings) as worker:
        await_true(lambda: num_done(bench, batch) == num_answered)
        counts = batches.get(bench.db, batch.id).request_counts
        assert counts.completed == num_answered, "a client sees them while the batch runs"
        engine.go_on()
        worker.result()
    assert ids_of(bench.output_of(bench.finalize())) == [f"r{n}" for n in range(10)]


def test_stop_flushes_what_is_finished_and_gives_the_rest_back(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(40), shard_lines=10)
    engine = ScriptedEngine(slots=4)
    engine.pause_after(5)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        assert num_done(bench, batch) == 0, "no limit was reached"
        worker.stop.set()
        assert worker.result() == 5
    assert [count_bits(segment.positions) for segment in segments_of(bench, batch)] == [5]
    assert bench.states(batch) == [UnitState.PENDING] * 4
    again = ScriptedEngine(slots=4)
    with Worker(bench, again) as worker:
        assert worker.result() == 35
    assert not {f"hello {n}" for n in range(5)} & set(again.asked), "what is done is not redone"
    assert ids_of(bench.output_of(bench.finalize())) == [f"r{n}" for n in range(40)]


# --- the batch is stopped ---


def test_cancelled_batch_keeps_what_is_finished(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(20), shard_lines=5)
    engine = ScriptedEngine(slots=4)
    engine.pause_after(7)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        assert batches.request_cancel(bench.db, batch.id).status is BatchStatus.CANCELLING
        await_set(engine.dropped)  # it stops generating by itself
        worker.result()
    assert UnitState.LEASED not in bench.states(batch)
    batch = bench.finalize()
    assert batch.status is BatchStatus.CANCELLED
    output, errors = bench.output_of(batch), bench.errors_of(batch)
    assert ids_of(output) == [f"r{n}" for n in range(7)]
    assert ids_of(errors) == [f"r{n}" for n in range(7, 20)]
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert {line["response"] for line in errors} == {None}
    assert (batch.request_counts.completed, batch.request_counts.failed) == (7, 13)


def test_cancelling_one_batch_leaves_the_other_alone(bench: Bench) -> None:
    first = bench.submit_planned(make_lines(6))
    second = bench.submit_planned(make_lines(6))
    engine = ScriptedEngine(slots=12)
    engine.pause_after(0)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        await_true(lambda: len(engine.asked) == 12)
        batches.request_cancel(bench.db, first.id)
        await_set(engine.dropped)
        engine.go_on()
        assert worker.result() == 6
    ended = {batch.id: batch for batch in (bench.finalize(), bench.finalize())}
    assert ended[first.id].request_counts.failed == 6
    assert ended[second.id].request_counts.completed == 6


def test_batch_past_its_deadline_keeps_what_is_finished(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(12), shard_lines=4, window_seconds=1000)
    engine = ScriptedEngine(slots=2)
    engine.pause_after(5)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        bench.clock.advance(2000)
        await_set(engine.dropped)
        worker.result()
    sweeper.tick(bench.db, rng=random.Random(0))
    batch = bench.finalize()
    assert batch.status is BatchStatus.EXPIRED
    assert ids_of(bench.output_of(batch)) == [f"r{n}" for n in range(5)]
    errors = bench.errors_of(batch)
    assert ids_of(errors) == [f"r{n}" for n in range(5, 12)]
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}


# --- the lease is lost ---


def test_worker_that_lost_its_lease_stops_and_writes_nothing_more(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(10))
    engine = ScriptedEngine(slots=2)
    engine.pause_after(3)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        later = bench.db.now() + timedelta(hours=1)
        (reaped,) = units.reap(bench.db, now=later)
        taken = units.claim(
            bench.db,
            worker_id=WorkerId("worker_other"),
            boot_id="boot",
            kinds=(UnitKind.SHARD,),
            lease_seconds=3600,
            now=later + timedelta(hours=1),
        )
        assert taken is not None
        assert taken.unit_id == reaped.unit_id
        await_set(engine.dropped)  # it stops generating by itself
        worker.result()
    assert segments_of(bench, batch) == [], "three results were finished, and are not written"
    assert bench.states(batch) == [UnitState.LEASED], "the other's lease is left alone"
    units.settle(bench.db, taken, Settlement(state=UnitState.PENDING, exit="released"))
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 10
    assert ids_of(bench.output_of(bench.finalize())) == [f"r{n}" for n in range(10)]


def test_segment_that_comes_after_the_lease_was_lost_is_refused(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(4))

    def lose(_number: int) -> None:
        units.reap(bench.db, now=bench.db.now() + timedelta(hours=1))
        units.claim(
            bench.db,
            worker_id=WorkerId("worker_other"),
            boot_id="boot",
            kinds=(UnitKind.SHARD,),
            lease_seconds=3600,
            now=bench.db.now() + timedelta(hours=2),
        )

    with Worker(bench, ScriptedEngine(), blobs=BlobsOfTheTest(bench.blobs, lose)) as worker:
        worker.result()
    assert segments_of(bench, batch) == []
    assert bench.states(batch) == [UnitState.LEASED]


# --- the engine dies ---


def test_line_that_kills_the_engine_is_found_by_halves_and_costs_only_itself(
    bench: Bench,
) -> None:
    content = make_lines(5) + make_line("r5", "poison") + b"\n" + make_lines(10, first=6)
    batch = bench.submit_planned(content)
    engine = ScriptedEngine(slots=8, total=16)
    with Worker(bench, engine) as worker:
        worker.result()
    assert [len(running) for running in engine.deaths] == [8, 4, 2, 1, 1, 1]
    assert all("poison" in running for running in engine.deaths)
    (shard, _) = shards.list_for_batch(bench.db, batch.id)[0]
    (fault,) = shards.list_faults(bench.db, shard.unit_id)
    assert (fault.position, fault.solo_crashes, fault.places) == (5, 3, ("here",))
    batch = bench.finalize()
    (error,) = bench.errors_of(batch)
    assert error["custom_id"] == "r5"
    assert error["response"]["status_code"] == 500
    assert error["response"]["body"]["error"]["code"] == "engine_crash"
    rest = {f"r{n}": f"re: hello {n}" for n in range(16) if n != 5}
    assert_answered(bench.output_of(batch), rest)


def test_two_lines_that_kill_the_engine_are_both_found(bench: Bench) -> None:
    content = b"".join(
        make_line(f"r{n}", "poison" if n in {1, 6} else f"hello {n}") + b"\n" for n in range(8)
    )
    bench.submit_planned(content)
    with Worker(bench, ScriptedEngine(slots=8, total=8)) as worker:
        worker.result()
    batch = bench.finalize()
    assert ids_of(bench.errors_of(batch)) == ["r1", "r6"]
    assert ids_of(bench.output_of(batch)) == ["r0", "r2", "r3", "r4", "r5", "r7"]


def test_suspects_of_two_batches_are_told_apart(bench: Bench) -> None:
    poisoned = bench.submit_planned(make_line("bad", "poison") + b"\n" + make_lines(3))
    innocent = bench.submit_planned(make_lines(4))
    with Worker(bench, ScriptedEngine(slots=8, total=8)) as worker:
        worker.result()
    ended = {batch.id: batch for batch in (bench.finalize(), bench.finalize())}
    assert ids_of(bench.errors_of(ended[poisoned.id])) == ["bad"]
    assert ended[innocent.id].request_counts.completed == 4


def test_work_goes_on_after_the_suspects_are_cleared(bench: Bench) -> None:
    # The look-ahead does not reach the last shards before the engine dies.
    content = make_line("bad", "poison") + b"\n" + make_lines(199)
    bench.submit_planned(content, shard_lines=10)
    with Worker(bench, ScriptedEngine(slots=4)) as worker:
        worker.result()
    assert num_pending_shards(bench) == 0, "work() returns when no shard is left"
    batch = bench.finalize()
    assert (batch.request_counts.completed, batch.request_counts.failed) == (199, 1)


def test_crashes_alone_are_counted_over_the_lives_of_workers(bench: Bench) -> None:
    bench.submit_planned(make_line("bad", "poison") + b"\n")
    lease = bench.claim(UnitKind.SHARD)
    shards.report_death(bench.db, lease, suspects=[[0]], solo_crash=0, num_crashes=2)
    units.settle(bench.db, lease, Settlement(state=UnitState.PENDING, exit="released"))
    engine = ScriptedEngine()
    with Worker(bench, engine) as worker:
        worker.result()
    assert len(engine.deaths) == 1
    assert ids_of(bench.errors_of(bench.finalize())) == ["bad"]


def test_suspects_of_an_earlier_worker_run_apart_from_the_rest(bench: Bench) -> None:
    bench.submit_planned(
        make_lines(6) + make_line("bad", "poison") + b"\n" + make_lines(6, first=6)
    )
    lease = bench.claim(UnitKind.SHARD)
    shards.report_death(bench.db, lease, suspects=[[5, 6]])
    units.settle(bench.db, lease, Settlement(state=UnitState.PENDING, exit="released"))
    engine = ScriptedEngine(slots=4)
    with Worker(bench, engine) as worker:
        worker.result()
    assert all(set(running) <= {"hello 5", "poison"} for running in engine.deaths)
    assert ids_of(bench.errors_of(bench.finalize())) == ["bad"]


def test_engine_that_answers_nothing_convicts_none_of_its_lines(bench: Bench) -> None:
    content = b"".join(make_line(f"r{n}", "poison") + b"\n" for n in range(8))
    batch = bench.submit_planned(content)
    engine = ScriptedEngine(slots=8, total=8)
    with Worker(bench, engine) as worker, pytest.raises(EngineUnavailable):
        worker.result()
    assert len(engine.deaths) == MAX_SUSPECT_DEATHS
    assert bench.states(batch) == [UnitState.PENDING]
    assert num_done(bench, batch) == 0, "the device may be to blame"


# --- the whole worker dies ---


def lose_leases(bench: Bench) -> None:
    """Do what becomes of the leases of a worker that was killed; nobody claims for an hour."""
    assert units.reap(bench.db, now=bench.db.now() + timedelta(hours=1))


def let_time_pass(bench: Bench) -> None:
    bench.clock.advance(2 * 3600)


def test_lines_that_workers_died_of_run_in_groups_that_are_written_down_first(
    bench: Bench,
) -> None:
    batch = bench.submit_planned(make_lines(40))
    for _ in range(CAREFUL_STALLS):
        bench.claim(UnitKind.SHARD)
        lose_leases(bench)
        let_time_pass(bench)
    for expected in ([f"hello {n}" for n in range(32)], [f"hello {n}" for n in range(16)]):
        engine = ScriptedEngine(slots=64)
        engine.pause_after(0)
        with Worker(bench, engine) as worker:
            await_set(engine.paused)
            ((shard, _),) = shards.list_for_batch(bench.db, batch.id)
            assert shard.trial is not None
            assert [f"hello {n}" for n in shard.trial.positions] == engine.asked == expected
            lose_leases(bench)
            await_set(engine.dropped)
            worker.result()
        let_time_pass(bench)
    with Worker(bench, ScriptedEngine(slots=64)) as worker:
        assert worker.result() == 40
    output = bench.output_of(bench.finalize())
    assert_answered(output, {f"r{n}": f"re: hello {n}" for n in range(40)})


def test_line_that_was_alone_when_workers_died_gets_an_error_and_the_others_their_answers(
    bench: Bench,
) -> None:
    batch = bench.submit_planned(make_lines(5))
    for num_crashes in range(SOLO_CRASHES):
        lease = bench.claim(UnitKind.SHARD)
        ((shard, _),) = shards.list_for_batch(bench.db, batch.id)
        shards.report_worker_death(
            bench.db, lease, suspects=[[3]], died=shard.trial, num_crashes=num_crashes
        )
        shards.begin_trial(bench.db, lease, positions=[3])
        lose_leases(bench)
        let_time_pass(bench)
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    batch = bench.finalize()
    assert ids_of(bench.output_of(batch)) == ["r0", "r1", "r2", "r4"]
    (error,) = bench.errors_of(batch)
    assert error["custom_id"] == "r3"
    assert error["response"]["body"]["error"]["code"] == "worker_crash"
    assert "3 times" in error["response"]["body"]["error"]["message"]


@pytest.mark.parametrize("error", [EngineOutOfMemory("It is full."), EngineMisconfigured("No.")])
def test_engine_that_cannot_go_on_gives_every_lease_back(
    bench: Bench, error: BatchctlError
) -> None:
    batch = bench.submit_planned(make_lines(8) + make_line("bad", "poison"), shard_lines=3)
    engine = ScriptedEngine(slots=1)
    engine.death = lambda _suspects: error
    with Worker(bench, engine) as worker, pytest.raises(type(error)):
        worker.result()
    assert UnitState.LEASED not in bench.states(batch)
    assert num_done(bench, batch) == 8, "what was finished is kept"


class DiesAtOnce(ScriptedEngine):
    """Its first life ends before it has begun anything."""

    @override
    def generate(self, source: Source) -> Generator[Result]:
        if not self.deaths:
            self.deaths.append([])
            raise EngineDied("It died.")
        yield from super().generate(source)


def test_nothing_more_is_claimed_while_the_engine_starts_again(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(90), shard_lines=10)
    engine = DiesAtOnce(slots=2)
    begun, may_go_on = threading.Event(), threading.Event()

    def start() -> Any:  # noqa: ANN401
        if engine.deaths:
            begun.set()
            assert may_go_on.wait(60)
        return engine

    with Worker(bench, engine, start=start) as worker:
        await_set(begun)
        # Whoever looks ahead would have six shards by then; the engine died of the first one, and
        # another may have been under way.
        threading.Event().wait(0.5)
        assert bench.states(batch).count(UnitState.LEASED) <= 2
        may_go_on.set()
        worker.result()
    with Worker(bench, engine) as worker:
        worker.result()
    assert set(bench.states(batch)) == {UnitState.DONE}


class AnswersNothingMore(ScriptedEngine):
    """After its first death, every further life of it ends at the first request."""

    @override
    def probe(self) -> None:
        raise EngineDied("It died again.")


def test_engine_that_fails_everything_after_its_first_death_gets_no_more_work(
    bench: Bench,
) -> None:
    batch = bench.submit_planned(make_lines(8) + make_line("bad", "poison"), shard_lines=3)
    engine = AnswersNothingMore(slots=1)
    with Worker(bench, engine) as worker, pytest.raises(EngineDied):
        worker.result()
    assert len(engine.deaths) == 1
    assert UnitState.LEASED not in bench.states(batch)
    (shard, _) = shards.list_for_batch(bench.db, batch.id)[2]
    assert shards.list_faults(bench.db, shard.unit_id)[0].solo_crashes == 1, "once, not five times"


# --- storage fails ---


def test_segment_is_written_again_until_the_store_is_back(bench: Bench) -> None:
    def fail_twice(number: int) -> None:
        if number <= 2:
            raise BlobStoreUnavailable("The disk is full.")

    bench.submit_planned(make_lines(5))
    store = BlobsOfTheTest(bench.blobs, fail_twice)
    with Worker(bench, ScriptedEngine(), blobs=store) as worker:
        assert worker.result() == 5
    assert store.num_puts == 3
    assert ids_of(bench.output_of(bench.finalize())) == [f"r{n}" for n in range(5)]


@pytest.mark.parametrize(
    ("error", "patience"),
    [(BlobStoreUnavailable("The disk is full."), 0.3), (StorageError("It is gone."), 60.0)],
    ids=["for too long", "for good"],
)
def test_store_that_does_not_come_back_ends_the_work(
    bench: Bench, error: StorageError, patience: float
) -> None:
    def fail(_number: int) -> None:
        raise error

    batch = bench.submit_planned(make_lines(40), shard_lines=4)
    settings = replace(NEVER, write_patience_seconds=patience)
    worker = Worker(
        bench, ScriptedEngine(), blobs=BlobsOfTheTest(bench.blobs, fail), settings=settings
    )
    with worker, pytest.raises(StorageError) as caught:
        worker.result(seconds=20)
    assert caught.value is error
    assert UnitState.LEASED not in bench.states(batch), "others may take the shards"


def test_fault_of_ours_in_the_writer_ends_the_work_and_does_not_hang_it(bench: Bench) -> None:
    def fail(_number: int) -> None:
        raise ZeroDivisionError

    bench.submit_planned(make_lines(40), shard_lines=4)
    worker = Worker(bench, ScriptedEngine(), blobs=BlobsOfTheTest(bench.blobs, fail))
    with worker, pytest.raises(ZeroDivisionError):
        worker.result(seconds=20)


def test_input_that_is_gone_ends_its_own_shards_and_no_others(bench: Bench) -> None:
    lost = bench.submit_planned(make_lines(3))
    file = files.get(bench.db, lost.input_file_id)
    other = bench.submit_planned(make_lines(4))
    bench.blobs.delete(file.blob_key)
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 4
    assert bench.states(lost) == [UnitState.FAILED]
    assert bench.states(other) == [UnitState.DONE]


def test_input_that_cannot_be_read_for_a_moment_is_read_again(bench: Bench) -> None:
    class ReadsLater(BlobsOfTheTest):
        num_reads = 0

        def open_reader(self, key: str, *, start: int = 0, length: int | None = None) -> BlobReader:
            self.num_reads += 1
            if self.num_reads <= 2:
                raise BlobStoreUnavailable("Nobody answers.")
            return bench.blobs.open_reader(key, start=start, length=length)

    bench.submit_planned(make_lines(5))
    store = ReadsLater(bench.blobs, lambda _number: None)
    with Worker(bench, ScriptedEngine(), blobs=store) as worker:
        assert worker.result() == 5
    assert store.num_reads == 3
