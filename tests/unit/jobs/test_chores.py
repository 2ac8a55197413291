"""The chore loop, over a real database and real blobs."""

import os
from pathlib import Path
from typing import Any

import pytest
import structlog

from jobs import metrics
from jobs.domain.batch import Batch
from jobs.loops.chores import ChoreLoop
from jobs.loops.turns import Crew, Stopped
from jobs.settings import Settings
from storage import chores
from storage.blobs.base import segments_prefix
from tests.builders import Bench, ScriptedEngine, Worker, make_lines
from tests.unit.jobs.test_loops import make_app

HOUR = 3600
DAY = 24 * HOUR


def make_loop(bench: Bench, folder: Path, **settings: Any) -> ChoreLoop:  # noqa: ANN401
    return ChoreLoop(Crew(make_app(bench, folder, **settings)))


def run(bench: Bench) -> Batch:
    bench.submit_planned(make_lines(4), shard_lines=2)
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    return bench.finalize()


def count(name: str) -> float:
    """Return a counter as it is now."""
    lines = metrics.render().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_audit_is_made_every_hour_and_finds_nothing_where_all_is_well(
    bench: Bench, tmp_path: Path
) -> None:
    run(bench)
    loop = make_loop(bench, tmp_path)
    before = count('batchctl_audits_total{outcome="ok"}')
    for passed in (0, HOUR - 60, 60, 0):
        bench.clock.advance(passed)
        loop.look_after()
    assert count('batchctl_audits_total{outcome="ok"}') == before + 1


def test_violation_is_logged_and_counted(bench: Bench, tmp_path: Path) -> None:
    batch = run(bench)
    loop = make_loop(bench, tmp_path, collect={"every_seconds": 0})
    loop.look_after()
    key = next(iter(bench.blobs.list_keys(segments_prefix(batch.id))))
    bench.blobs.delete(key)
    bench.clock.advance(HOUR)
    before = count('batchctl_audit_problems_total{check="segments"}')
    with structlog.testing.capture_logs() as logs:
        loop.look_after()
    assert count('batchctl_audit_problems_total{check="segments"}') == before + 1
    [found] = [one for one in logs if one.get("check") == "segments"]
    assert (found["event"], found["log_level"]) == ("audit_failed", "error")
    assert (found["batch_id"], found["num_problems"]) == (batch.id, 1)


def test_of_two_processes_one_audits(bench: Bench, tmp_path: Path) -> None:
    run(bench)
    loops = [make_loop(bench, tmp_path) for _ in range(2)]
    for loop in loops:
        loop.look_after()
    bench.clock.advance(HOUR)
    before = count("batchctl_audits_total")
    for loop in loops:
        loop.look_after()
    assert count("batchctl_audits_total") == before + 1


def test_what_nobody_needs_is_removed(bench: Bench, tmp_path: Path) -> None:
    batch = run(bench)
    loop = make_loop(bench, tmp_path)
    loop.look_after()
    bench.clock.advance(DAY + 60)
    before = count('batchctl_collected_total{kind="old_segment"}')
    loop.look_after()
    assert list(bench.blobs.list_keys(segments_prefix(batch.id))) == []
    assert count('batchctl_collected_total{kind="old_segment"}') == before + 2


def test_a_turn_that_did_not_come_to_the_end_is_gone_on_with_soon(
    bench: Bench, tmp_path: Path
) -> None:
    for number in range(1001):
        bench.blobs.put(f"files/file-{number:04}", b"")
    loop = make_loop(bench, tmp_path, collect={"max_blobs": 1000})
    loop.look_after()
    bench.clock.advance(DAY + 60)
    loop.look_after()
    assert len(list(bench.blobs.list_keys())) == 1
    due_at = chores.get_due(bench.db, "collect")
    assert due_at is not None
    assert (due_at - bench.db.now()).total_seconds() < 61
    bench.clock.advance(61)
    loop.look_after()
    assert list(bench.blobs.list_keys()) == []


def test_chores_that_are_turned_off_are_not_done(bench: Bench, tmp_path: Path) -> None:
    off = {"every_seconds": 0}
    loop = make_loop(bench, tmp_path, audit=off, collect=off)
    log = tmp_path / "engine-worker_0.log"
    log.write_bytes(b"")
    os.utime(log, (0, 0))
    for _ in range(2):
        loop.look_after()
        bench.clock.advance(9 * DAY)
    assert chores.get_due(bench.db, "audit") is None
    assert chores.get_due(bench.db, "collect") is None
    assert log.exists()


def test_logs_of_engines_of_this_folder_are_looked_at_from_the_start(
    bench: Bench, tmp_path: Path
) -> None:
    log = tmp_path / "engine-worker_0.log"
    log.write_bytes(b"")
    os.utime(log, (0, 0))
    make_loop(bench, tmp_path).look_after()
    assert not log.exists()


def test_audit_ends_with_its_process(bench: Bench, tmp_path: Path) -> None:
    run(bench)
    crew = Crew(make_app(bench, tmp_path))
    loop = ChoreLoop(crew)
    loop.look_after()
    bench.clock.advance(HOUR)
    crew.stopping.set()
    with pytest.raises(Stopped):
        loop.look_after()
    assert loop.turn(), "and it does not wait"


def test_an_orphan_may_not_be_taken_for_one_too_soon() -> None:
    with pytest.raises(ValueError, match="orphan_seconds"):
        Settings(collect={"orphan_seconds": 60})
