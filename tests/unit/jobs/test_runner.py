"""Feed, runner and finalizer together, over an engine of the test's own."""

import random
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from typing_extensions import override

from engine.base import Source
from jobs import feed, sweeper
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import (
    BlobStoreUnavailable,
    StorageError,
)
from jobs.domain.ids import TenantId, WorkerId
from jobs.domain.request import Request
from jobs.domain.result import Result
from jobs.domain.retry import Settlement
from jobs.domain.shard import Segment, UnitKind, UnitState, count_bits
from storage import batches, files, segments, units
from storage.blobs.base import BlobInfo, BlobReader, BlobStore
from tests.builders import (
    NEVER,
    Bench,
    ScriptedEngine,
    Worker,
    assert_answered,
    await_set,
    await_true,
    ids_of,
    make_line,
    make_lines,
)


def segments_of(bench: Bench, batch: Batch) -> list[Segment]:
    return list(segments.iterate_for_batch(bench.db, batch.id))


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


def test_feed_reads_ahead_however_small_the_shards_are(bench: Bench) -> None:
    bench.submit_planned(make_lines(70), shard_lines=1)
    engine = ScriptedEngine(slots=2)
    engine.pause_after(0)
    with Worker(bench, engine) as worker:
        await_set(engine.paused)
        # Two run; the target is 64 queued ones, so all but a few shards are leased by then.
        await_true(lambda: bench.num_pending_shards() <= 70 - 2 - 64)
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
        num_leased = total - shard_lines * bench.num_pending_shards()
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
        await_true(lambda: bench.num_pending_shards() <= (300 - 30 - 90) // 10)
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
        assert bench.num_done(batch) == 0
        go_on.set()
        assert worker.result() == 40
    assert writers == {"feed-write"}
    assert bench.num_done(batch) == 40


def test_worker_leaves_other_models_alone(bench: Bench) -> None:
    bench.submit(make_line("a", model="other"))
    other = bench.plan()
    bench.submit_planned(make_lines(2))
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 2
    assert bench.states(other) == [UnitState.PENDING]


class WritesNonsense(ScriptedEngine):
    """Answers some questions with what no line can hold."""

    @override
    def _answer(self, request: Request) -> Result:
        answer = super()._answer(request)
        is_half = "half" in (answer.text or "")
        return msgspec.structs.replace(answer, text="\ud83d") if is_half else answer


def test_answer_that_no_line_can_hold_costs_its_own_lines_only(bench: Bench) -> None:
    twice = [make_line(f"half{n}", "half", temperature=0) + b"\n" for n in range(2)]
    bench.submit_planned(make_lines(3) + b"".join(twice) + make_lines(3, first=3))
    with Worker(bench, WritesNonsense()) as worker:
        worker.result()
    batch = bench.finalize()
    assert ids_of(bench.output_of(batch)) == [f"r{n}" for n in range(6)]
    errors = bench.errors_of(batch)
    assert ids_of(errors) == ["half0", "half1"]
    codes = {error["response"]["body"]["error"]["code"] for error in errors}
    assert codes == {"internal_error"}


def test_shard_that_is_claimed_when_the_feed_has_ended_is_given_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit_planned(make_lines(2))
    inside, has_ended, claimed = threading.Event(), threading.Event(), threading.Event()
    claim, num_claims = units.claim, 0

    def claim_late(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        nonlocal num_claims
        num_claims += 1
        if num_claims <= 2:  # one shard, and then nothing
            return claim(*args, **kwargs)
        inside.set()
        assert has_ended.wait(60)
        lease = claim(*args, **kwargs)
        claimed.set()
        return lease

    monkeypatch.setattr(units, "claim", claim_late)
    monkeypatch.setattr(feed, "_JOIN_SECONDS", 0.05)
    engine = ScriptedEngine()
    engine.pause_after(1)
    with Worker(bench, engine, settings=replace(NEVER, poll_seconds=0.01)) as worker:
        await_set(inside)
        engine.go_on()
        assert worker.result() == 2
        monkeypatch.setattr(units, "claim", claim)
        late = bench.submit_planned(make_lines(2))
        has_ended.set()
        await_set(claimed)
        await_true(lambda: bench.states(late) == [UnitState.PENDING])


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
        await_true(lambda: bench.num_done(batch) == num_answered)
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
        assert bench.num_done(batch) == 0, "no limit was reached"
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
