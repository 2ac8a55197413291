"""What lines cost that kill the engine, or the whole worker, and what they leave alone."""

import threading
from collections.abc import Generator
from datetime import timedelta
from typing import Any

import pytest
from typing_extensions import override

from engine.base import Source
from engine.supervisor import MAX_SUSPECT_DEATHS
from jobs.domain.errors import (
    BatchctlError,
    EngineDied,
    EngineMisconfigured,
    EngineOutOfMemory,
    EngineUnavailable,
)
from jobs.domain.result import Result
from jobs.domain.retry import Settlement
from jobs.domain.shard import UnitKind, UnitState
from jobs.domain.suspects import CAREFUL_STALLS, SOLO_CRASHES, list_suspects
from storage import shards, units
from tests.builders import (
    Bench,
    ScriptedEngine,
    Worker,
    assert_answered,
    await_set,
    ids_of,
    make_line,
    make_lines,
)

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
    assert bench.num_pending_shards() == 0, "work() returns when no shard is left"
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
    assert bench.num_done(batch) == 0, "the device may be to blame"


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


def test_lease_that_is_lost_while_deaths_are_looked_at_ends_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit_planned(make_lines(3))
    for _ in range(CAREFUL_STALLS):
        bench.claim(UnitKind.SHARD)
        lose_leases(bench)
        let_time_pass(bench)
    report = shards.report_worker_death

    def report_too_late(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        lose_leases(bench)
        return report(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "report_worker_death", report_too_late)
        with Worker(bench, ScriptedEngine()) as worker:
            assert worker.result() == 0
    let_time_pass(bench)
    with Worker(bench, ScriptedEngine()) as worker:
        assert worker.result() == 3


def test_suspects_that_wait_for_the_rest_of_their_shard_stay_written_down(bench: Bench) -> None:
    content = b"".join(
        make_line(f"r{n}", "poison" if n == 20 else f"hello {n}") + b"\n" for n in range(300)
    )
    batch = bench.submit_planned(content)
    lease = bench.claim(UnitKind.SHARD)
    shards.report_death(bench.db, lease, suspects=[[3, 4]])
    units.settle(bench.db, lease, Settlement(state=UnitState.PENDING, exit="released"))
    engine = ScriptedEngine(slots=4)
    begun, may_go_on = threading.Event(), threading.Event()

    def start() -> Any:  # noqa: ANN401
        if len(engine.deaths) == 1:
            begun.set()
            assert may_go_on.wait(60)
        return engine

    with Worker(bench, engine, start=start) as worker:
        await_set(begun)
        ((shard, _),) = shards.list_for_batch(bench.db, batch.id)
        suspects = {position for group in list_suspects(shard) for position in group}
        may_go_on.set()
        worker.result()
    assert {3, 4, 20} <= suspects
    assert ids_of(bench.errors_of(bench.finalize())) == ["r20"]


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
    assert bench.num_done(batch) == 8, "what was finished is kept"


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
