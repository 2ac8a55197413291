"""The loops of a worker, turn by turn, over a real database and real engine processes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
import structlog

from engine.deaths import DeathBudget
from jobs.app import App
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import EngineUnavailable, InvalidInput
from jobs.domain.shard import UnitKind, UnitState
from jobs.loops.control import ControlLoop
from jobs.loops.sweep import SweepLoop
from jobs.loops.turns import Crew
from jobs.loops.work import WorkLoop
from jobs.settings import Settings
from storage import batches
from tests.builders import Bench, await_true, ids_of, make_line, make_lines

SIMULATED = {"engine": "simulated", "options": {"step_seconds": 0.005, "slots": 8}}


def make_app(bench: Bench, folder: Path, **settings: Any) -> App:  # noqa: ANN401
    return App(
        settings=Settings(**settings),
        folder=folder,
        db=bench.db,
        blobs=bench.blobs,
        doorbell=bench.doorbell,
    )


@contextmanager
def crew_of(app: App) -> Iterator[Crew]:
    crew = Crew(app)
    crew.keeper.start()
    try:
        yield crew
    finally:
        crew.stop()
        crew.keeper.close()


@contextmanager
def turning(loop: WorkLoop, crew: Crew) -> Iterator[None]:
    """Within the block, repeat the loop's turns in a thread, as a worker does."""
    thread = threading.Thread(
        daemon=True, target=crew.repeat, args=(loop.turn,), kwargs={"name": "work"}
    )
    thread.start()
    try:
        yield
    finally:
        crew.stop()
        thread.join(20)
        loop.close()
        assert not thread.is_alive()


def submit_planned(bench: Bench, num_lines: int, *, model: str) -> Batch:
    lines = b"".join(make_line(f"{model}-{n}", model=model) + b"\n" for n in range(num_lines))
    return bench.submit_planned(lines, shard_lines=1)


# --- a turn ---


def test_failed_turn_is_counted_and_the_loop_goes_on(bench: Bench, tmp_path: Path) -> None:
    with crew_of(make_app(bench, tmp_path)) as crew:
        faults: list[Exception] = [ValueError("ours"), InvalidInput("theirs")]

        def turn() -> bool:
            if faults:
                raise faults.pop()
            crew.stop()
            return True

        crew.repeat(turn, name="some")
        assert crew.num_failures["some"] == 2
        assert crew.failure is not None
        assert crew.failure.code == "invalid_request", "the first one is kept"


def test_idle_loop_turns_again_when_the_doorbell_rings(bench: Bench, tmp_path: Path) -> None:
    app = make_app(bench, tmp_path, leases={"idle_poll_seconds": 3600})
    turned = threading.Semaphore(0)

    def turn() -> bool:
        turned.release()
        return False

    with crew_of(app) as crew:
        thread = threading.Thread(
            daemon=True, target=crew.repeat, args=(turn,), kwargs={"name": "some"}
        )
        thread.start()
        assert turned.acquire(timeout=20)
        app.doorbell.announce()
        assert turned.acquire(timeout=20)
        crew.stop()
        thread.join(20)
        assert not thread.is_alive()


# --- plan and finalize ---


def test_control_loop_plans_then_finalizes(bench: Bench, tmp_path: Path) -> None:
    batch = bench.submit(make_lines(1000))
    seen: list[tuple[str, int]] = []
    with crew_of(make_app(bench, tmp_path)) as crew:
        loop = ControlLoop(
            crew, checker=bench.sandbox, on_progress=lambda phase, n: seen.append((phase, n))
        )
        assert loop.turn()
        assert batches.get(bench.db, batch.id).status is BatchStatus.IN_PROGRESS
        assert not loop.turn(), "shards are not its business"
        assert seen[-1] == ("planning", 1000)
        batches.request_cancel(bench.db, batch.id)
        assert loop.turn()
        assert batches.get(bench.db, batch.id).status is BatchStatus.CANCELLED
        assert seen[-1] == ("finalizing", 1000)


def test_control_unit_is_given_back_when_told_to_stop(bench: Bench, tmp_path: Path) -> None:
    batch = bench.submit(make_lines(1000))
    with crew_of(make_app(bench, tmp_path)) as crew:
        crew.stop()
        assert ControlLoop(crew, checker=bench.sandbox).turn()
    assert batches.get(bench.db, batch.id).status is BatchStatus.VALIDATING
    assert bench.claim(UnitKind.PLAN).batch_id == batch.id


# --- sweep ---


def sweep_settings() -> dict[str, float]:
    return {"lease_seconds": 1.0, "renew_seconds": 0.2, "reap_seconds": 0.01}


def test_nobody_is_reaped_for_one_lease_after_a_gap(bench: Bench, tmp_path: Path) -> None:
    batch = bench.submit_planned(make_lines(1))
    with crew_of(make_app(bench, tmp_path, leases=sweep_settings())) as crew:
        loop = SweepLoop(crew)
        loop.turn()
        bench.claim(UnitKind.SHARD)
        bench.clock.advance(61)  # the machine slept: nobody could renew meanwhile
        loop.turn()
        assert bench.states(batch) == [UnitState.LEASED]
        assert not loop.may_reap()
        await_true(loop.may_reap)
        loop.turn()
        assert bench.states(batch) == [UnitState.PENDING]


def test_lease_that_ran_out_without_a_gap_is_reaped_at_once(bench: Bench, tmp_path: Path) -> None:
    batch = bench.submit_planned(make_lines(1))
    bench.claim(UnitKind.SHARD)
    bench.clock.advance(61)
    with crew_of(make_app(bench, tmp_path, leases=sweep_settings())) as crew:
        SweepLoop(crew).turn()
    assert bench.states(batch) == [UnitState.PENDING]


def test_lease_is_reaped_when_it_runs_out_and_not_a_pause_later(
    bench: Bench, tmp_path: Path
) -> None:
    batch = bench.submit_planned(make_lines(1))
    bench.claim(UnitKind.SHARD)
    bench.clock.advance(59)  # of the 60 s of the lease
    leases = sweep_settings() | {"reap_seconds": 600.0}
    with crew_of(make_app(bench, tmp_path, leases=leases)) as crew:
        loop = SweepLoop(crew)
        thread = threading.Thread(
            daemon=True, target=crew.repeat, args=(loop.turn,), kwargs={"name": "sweep"}
        )
        thread.start()
        try:
            await_true(lambda: bench.states(batch) == [UnitState.PENDING])
        finally:
            crew.stop()
            thread.join(20)
        assert not thread.is_alive()


# --- work ---


def test_model_makes_way_for_another_that_waits(bench: Bench, tmp_path: Path) -> None:
    app = make_app(
        bench,
        tmp_path,
        models={"simulated": SIMULATED, "other": SIMULATED},
        worker={"model_stay_seconds": 0.2},
    )
    long = submit_planned(bench, 400, model="simulated")
    short = submit_planned(bench, 1, model="other")
    with crew_of(app) as crew:
        loop = WorkLoop(crew)
        with turning(loop, crew):
            # Three engines start on the way, on a machine that may be busy.
            await_true(lambda: bench.states(short) == [UnitState.DONE], seconds=90)
            assert UnitState.PENDING in bench.states(long), "the first model had its turn"
            await_true(lambda: set(bench.states(long)) == {UnitState.DONE}, seconds=90)
        assert loop.num_engine_starts >= 3, "there, away and back"


def test_model_stays_while_nobody_waits(bench: Bench, tmp_path: Path) -> None:
    app = make_app(
        bench,
        tmp_path,
        models={"simulated": SIMULATED},
        worker={"model_stay_seconds": 0.01},
    )
    with crew_of(app) as crew:
        loop = WorkLoop(crew)
        with turning(loop, crew):
            for _ in range(2):
                batch = submit_planned(bench, 30, model="simulated")
                app.doorbell.announce()
                await_true(lambda batch=batch: set(bench.states(batch)) == {UnitState.DONE})  # type: ignore[misc]
        assert loop.num_engine_starts == 1


def test_worker_serves_only_the_models_it_was_given(bench: Bench, tmp_path: Path) -> None:
    app = make_app(bench, tmp_path, models={"simulated": SIMULATED, "other": SIMULATED})
    left_alone = submit_planned(bench, 2, model="simulated")
    served = submit_planned(bench, 2, model="other")
    with crew_of(app) as crew:
        loop = WorkLoop(crew, models=("other",))
        try:
            assert loop.turn()
            assert not loop.turn()
        finally:
            loop.close()
    assert bench.states(served) == [UnitState.DONE] * 2
    assert bench.states(left_alone) == [UnitState.PENDING] * 2


def test_work_loop_says_what_it_does(bench: Bench, tmp_path: Path) -> None:
    slow = {"engine": "simulated", "options": {"step_seconds": 0.01, "slots": 1}}
    app = make_app(bench, tmp_path, models={"simulated": slow})
    batch = bench.submit_planned(make_lines(3))
    with crew_of(app) as crew:
        loop = WorkLoop(crew)
        assert (loop.state, loop.engine_pid, loop.num_shards) == ("idle", None, 0)
        with turning(loop, crew):
            await_true(lambda: loop.state == "working" and loop.num_shards == 1)
            assert loop.model == "simulated"
            assert loop.engine_pid is not None
            await_true(lambda: loop.state == "idle" and bench.states(batch) == [UnitState.DONE])
            assert loop.num_shards == 0
        assert loop.state == "draining"
        used = batches.get(bench.db, batch.id).usage
        assert loop.num_tokens == used.completion_tokens > 0


def test_shard_whose_row_could_not_be_read_is_claimed_again(bench: Bench, tmp_path: Path) -> None:
    batch = bench.submit_planned(make_lines(2))
    failed = threading.Event()

    def fail_once(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:  # noqa: ANN401
        if "WHERE shards.unit_id" in statement and not failed.is_set():
            failed.set()
            raise sa.exc.OperationalError(statement, {}, Exception("the connection is gone"))

    with crew_of(make_app(bench, tmp_path, models={"simulated": SIMULATED})) as crew:
        loop = WorkLoop(crew)
        sa.event.listen(bench.db.engine, "before_cursor_execute", fail_once)
        try:
            assert loop.turn()
        finally:
            sa.event.remove(bench.db.engine, "before_cursor_execute", fail_once)
            loop.close()
    assert failed.is_set()
    assert bench.states(batch) == [UnitState.DONE], "the lease was not lost"


def test_model_that_cannot_be_had_here_is_left_to_others(bench: Bench, tmp_path: Path) -> None:
    batch = submit_planned(bench, 1, model="other")
    with crew_of(make_app(bench, tmp_path)) as crew:
        loop = WorkLoop(crew, models=["other"], others_serve=lambda _model: True)
        assert not loop.has_no_engine_to_offer
        assert loop.turn()
        assert not loop.turn(), "it does not try again at once"
        assert loop.unavailable_models == {"other"}
        assert loop.has_no_engine_to_offer
        loop.serve(["other", "simulated"])
        assert not loop.has_no_engine_to_offer
    assert bench.states(batch) == [UnitState.PENDING]


def test_model_that_nobody_can_serve_ends_its_shards(bench: Bench, tmp_path: Path) -> None:
    batch = submit_planned(bench, 2, model="other")
    with crew_of(make_app(bench, tmp_path)) as crew:
        loop = WorkLoop(crew)
        assert loop.turn()
        assert loop.turn()
    assert bench.states(batch) == [UnitState.FAILED] * 2
    lines = bench.errors_of(bench.finalize())
    assert [line["custom_id"] for line in lines] == ["other-0", "other-1"]


def test_passing_cause_ends_no_shard_and_holds_up_no_other_model(
    bench: Bench, tmp_path: Path
) -> None:
    app = make_app(bench, tmp_path, models={"simulated": SIMULATED})
    waiting = submit_planned(bench, 1, model="simulated")
    with crew_of(app) as crew:
        loop = WorkLoop(crew)
        for num_tries in range(1, crew.policy.max_attempts + 3):
            loop._go_without_engine("simulated", EngineUnavailable("It is away."))  # noqa: SLF001
            assert not loop.turn(), "it does not try again at once"
            assert loop.unavailable_models == {"simulated"}, num_tries
        assert bench.states(waiting) == [UnitState.PENDING]
        other = submit_planned(bench, 1, model="other")
        try:
            assert loop.turn(), "another model has its turn"
        finally:
            loop.close()
    assert bench.states(other) == [UnitState.FAILED], "nobody has it, which no waiting changes"
    assert bench.states(waiting) == [UnitState.PENDING]


# --- the engine dies ---


@dataclass
class Hours:
    """A clock that stands still until the test moves it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def kill_engine_at_work(loop: WorkLoop) -> None:
    """Kill the engine once it has brought something in this life of its."""
    num_tokens = loop.num_tokens
    await_true(lambda: loop.engine_pid is not None and loop.num_tokens > num_tokens, seconds=90)
    pid = loop.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await_true(lambda: loop.engine_pid != pid, seconds=90)


def test_worker_whose_engine_dies_for_no_request_rests_and_gives_its_shards_back(
    bench: Bench, tmp_path: Path
) -> None:
    clock = Hours()
    budget = DeathBudget(max_deaths=2, window_seconds=600, clock=clock)
    batch = submit_planned(bench, 600, model="simulated")
    with crew_of(make_app(bench, tmp_path, models={"simulated": SIMULATED})) as crew:
        loop = WorkLoop(crew, budget=budget)
        with turning(loop, crew):
            for _ in range(2):
                kill_engine_at_work(loop)
            await_true(lambda: loop.state == "quarantined", seconds=90)
            await_true(lambda: loop.engine_pid is None)
            assert loop.num_unexplained_deaths == 2
            assert loop.quarantine is not None
            assert "2 times" in loop.quarantine
            states = set(bench.states(batch))
            assert states == {UnitState.DONE, UnitState.PENDING}, "what was held is given back"
            assert loop.num_shards == 0
            assert not loop.unavailable_models, "it is not the model's fault"
            clock.now = 600
            crew.app.doorbell.announce()
            await_true(lambda: set(bench.states(batch)) == {UnitState.DONE}, seconds=90)
            assert loop.quarantine is None


def test_lines_that_kill_the_engine_quarantine_nobody(bench: Bench, tmp_path: Path) -> None:
    lines = [
        make_line(f"r{n}", "[[fault=crash]]" if n in {2, 3} else "hello") + b"\n" for n in range(40)
    ]
    bench.submit_planned(b"".join(lines))
    with crew_of(make_app(bench, tmp_path, models={"simulated": SIMULATED})) as crew:
        loop = WorkLoop(crew, budget=DeathBudget(max_deaths=1, window_seconds=600))
        try:
            assert loop.turn()
        finally:
            loop.close()
        assert loop.num_engine_starts > 6, "two of them, three times alone each"
        assert loop.num_unexplained_deaths == 0
        assert loop.state == "idle"
    assert ids_of(bench.errors_of(bench.finalize())) == ["r2", "r3"]


def test_load_that_takes_too_long_is_ended_and_left_for_later(bench: Bench, tmp_path: Path) -> None:
    slow = {"engine": "simulated", "options": {"load_seconds": 600}}
    app = make_app(bench, tmp_path, models={"simulated": slow}, leases={"load_seconds": 1.0})
    batch = submit_planned(bench, 1, model="simulated")
    with crew_of(app) as crew, structlog.testing.capture_logs() as logs:
        loop = WorkLoop(crew)
        assert loop.turn()
        assert loop.num_engine_starts == 1
        assert not loop.turn(), "it does not try again at once"
        assert loop.unavailable_models == {"simulated"}
    (failed,) = [one for one in logs if one["event"] == "engine_unavailable"]
    assert failed["code"] == "engine_timed_out"
    assert "model simulated" in failed["error"]
    assert "leases.load_seconds" in failed["error"]
    assert bench.states(batch) == [UnitState.PENDING]


def test_engine_that_dies_while_it_loads_is_started_anew_and_the_log_says_why(
    bench: Bench, tmp_path: Path
) -> None:
    slow = {"engine": "simulated", "options": {"load_seconds": 3}}
    batch = submit_planned(bench, 1, model="simulated")
    app = make_app(bench, tmp_path, models={"simulated": slow})
    with crew_of(app) as crew, structlog.testing.capture_logs() as logs:
        loop = WorkLoop(crew)
        with turning(loop, crew):
            await_true(lambda: bool(engine_hosts()), seconds=90)
            engine_hosts()[0].kill()
            await_true(lambda: bench.states(batch) == [UnitState.DONE], seconds=90)
        assert loop.num_engine_starts == 2
    (died,) = [one for one in logs if one["event"] == "engine_died_loading"]
    assert died["model"] == "simulated"
    assert "SIGKILL" in died["error"]


def engine_hosts() -> list[psutil.Process]:
    """Return the engine processes of this one."""
    return [one for one in psutil.Process().children() if "engine.host" in one.cmdline()]
