"""Segments that are damaged or gone when the files of their batch are to be written."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobs import finalizer, metrics
from jobs.app import App
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.shard import UnitState
from jobs.loops.control import ControlLoop
from jobs.loops.turns import Crew
from jobs.settings import Settings
from storage import batches, repairs
from storage.blobs import open_blobs
from storage.blobs.base import input_key, segments_prefix
from storage.config import BlobSettings
from storage.database import open_database
from storage.tables import segments as segments_table
from storage.tables import units as units_table
from tests.builders import Bench, Clock, ScriptedEngine, Worker, ids_of, make_lines


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Bench]:
    clock = Clock()
    with (
        open_database(database_url, clock=clock) as db,
        open_blobs(BlobSettings(), tmp_path) as blobs,
    ):
        made = Bench(db=db, blobs=blobs, clock=clock)
        with made.stack:
            yield made


@pytest.fixture
def control(bench: Bench, tmp_path: Path) -> ControlLoop:
    app = App(
        settings=Settings(),
        folder=tmp_path,
        db=bench.db,
        blobs=bench.blobs,
        doorbell=bench.doorbell,
    )
    return ControlLoop(Crew(app), checker=bench.sandbox)


def work(bench: Bench) -> None:
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()


def run(bench: Bench, *, num_lines: int = 6, shard_lines: int = 2) -> Batch:
    batch = bench.submit_planned(make_lines(num_lines), shard_lines=shard_lines)
    work(bench)
    return batch


def keys_of(bench: Bench, batch: Batch) -> list[str]:
    return list(bench.blobs.list_keys(segments_prefix(batch.id)))


def flip(bench: Bench, key: str, at: int = -1) -> None:
    content = bytearray(bench.blobs.get(key))
    content[at] ^= 1
    bench.blobs.put(key, bytes(content))


def status(bench: Bench, batch: Batch) -> BatchStatus:
    return batches.get(bench.db, batch.id).status


def assert_right(bench: Bench, batch: Batch, num_lines: int = 6) -> None:
    """Check that each request has one answer, which is the right one, in the order of the input."""
    ended = batches.get(bench.db, batch.id)
    assert ended.status is BatchStatus.COMPLETED
    found = bench.output_of(ended)
    assert ids_of(found) == [f"r{number}" for number in range(num_lines)]
    assert [line["response"]["body"]["choices"][0]["message"]["content"] for line in found] == [
        f"re: hello {number}" for number in range(num_lines)
    ]
    assert (ended.request_counts.completed, ended.request_counts.failed) == (num_lines, 0)
    usages = [line["response"]["body"]["usage"] for line in found]
    assert ended.usage.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert ended.usage.completion_tokens == sum(usage["completion_tokens"] for usage in usages)


@pytest.mark.parametrize("at", [0, 30, -1])
def test_a_flipped_byte_costs_the_shard_a_second_run_and_nothing_else(
    bench: Bench, control: ControlLoop, at: int
) -> None:
    batch = run(bench)
    flip(bench, keys_of(bench, batch)[1], at)
    assert control.turn()
    assert status(bench, batch) is BatchStatus.IN_PROGRESS
    assert sorted(bench.states(batch)) == [UnitState.DONE, UnitState.DONE, UnitState.PENDING]
    assert list(bench.blobs.list_keys("outputs/")) == []
    work(bench)
    assert control.turn()
    assert_right(bench, batch)
    assert b'batchctl_damaged_segments_total{outcome="run_again"}' in metrics.render()


def test_all_that_is_lost_is_run_again_at_once(bench: Bench, control: ControlLoop) -> None:
    batch = run(bench)
    first, second, third = keys_of(bench, batch)
    bench.blobs.delete(first)
    flip(bench, second)
    bench.blobs.put(third, b"")
    assert control.turn()
    assert bench.states(batch) == [UnitState.PENDING] * 3
    work(bench)
    assert control.turn()
    assert_right(bench, batch)
    assert repairs.count(bench.db, batch.id) == 1


def test_a_segment_of_several_costs_its_own_lines_only(bench: Bench, control: ControlLoop) -> None:
    batch = bench.submit_planned(make_lines(6))
    engine = ScriptedEngine()
    engine.pause_after(4)
    with Worker(bench, engine) as worker:
        assert engine.paused.wait(20)
        worker.stop.set()
        worker.result()
    work(bench)
    assert len(keys_of(bench, batch)) == 2
    flip(bench, keys_of(bench, batch)[1])
    assert control.turn()
    again = ScriptedEngine()
    with Worker(bench, again) as worker:
        worker.result()
    assert again.asked == ["hello 4", "hello 5"]
    assert control.turn()
    assert_right(bench, batch)


def test_damage_of_a_cancelled_batch_becomes_errors_of_that_kind(
    bench: Bench, control: ControlLoop
) -> None:
    batch = bench.submit_planned(make_lines(6), shard_lines=2)
    engine = ScriptedEngine(slots=1)
    engine.pause_after(4)
    with Worker(bench, engine) as worker:
        assert engine.paused.wait(20)
        worker.stop.set()
        worker.result()
    batches.request_cancel(bench.db, batch.id)
    flip(bench, keys_of(bench, batch)[0])
    assert control.turn()
    assert status(bench, batch) is BatchStatus.CANCELLING
    assert control.turn()
    ended = batches.get(bench.db, batch.id)
    assert ended.status is BatchStatus.CANCELLED
    found = ids_of(bench.output_of(ended)) + ids_of(bench.errors_of(ended))
    assert sorted(found) == [f"r{number}" for number in range(6)]
    assert {line["error"]["code"] for line in bench.errors_of(ended)} == {"batch_cancelled"}
    assert len(bench.output_of(ended)) == 2


def test_a_store_that_damages_again_and_again_is_left_to_a_person(
    bench: Bench, control: ControlLoop
) -> None:
    batch = run(bench)
    for _ in range(finalizer.MAX_REPAIRS):
        flip(bench, keys_of(bench, batch)[-1])
        assert control.turn()
        assert status(bench, batch) is BatchStatus.IN_PROGRESS
        work(bench)
    key = keys_of(bench, batch)[-1]  # of the highest epoch; the damaged ones stay beside it
    flip(bench, key)
    assert control.turn()
    assert status(bench, batch) is BatchStatus.FINALIZING
    assert repairs.count(bench.db, batch.id) == finalizer.MAX_REPAIRS
    bench.clock.advance(61)  # it waits before it looks again
    assert control.turn()
    assert status(bench, batch) is BatchStatus.FINALIZING
    assert list(bench.blobs.list_keys("outputs/")) == []
    flip(bench, key)  # a person brought it back
    bench.clock.advance(61)
    assert control.turn()
    assert_right(bench, batch)


def test_a_store_that_is_not_there_throws_no_result_away(
    bench: Bench, control: ControlLoop
) -> None:
    """As a folder is empty whose disk is not mounted."""
    batch = run(bench)
    kept = {key: bench.blobs.get(key) for key in list(bench.blobs.list_keys())}
    for key in kept:
        bench.blobs.delete(key)
    assert control.turn()
    assert status(bench, batch) is BatchStatus.FINALIZING
    assert bench.states(batch) == [UnitState.DONE] * 3
    for key, content in kept.items():
        bench.blobs.put(key, content)
    bench.clock.advance(61)
    assert control.turn()
    assert_right(bench, batch)


def test_a_row_that_is_gone_keeps_the_batch_from_being_published(
    bench: Bench, control: ControlLoop
) -> None:
    batch = run(bench)
    key = keys_of(bench, batch)[0]
    with bench.db.transaction() as tx:
        tx.execute(sa.delete(segments_table).where(segments_table.c.blob_key == key))
    assert control.turn()
    assert status(bench, batch) is BatchStatus.FINALIZING
    with bench.db.read() as tx:
        said = tx.execute(
            sa.select(units_table.c.last_exit).where(
                units_table.c.batch_id == batch.id, units_table.c.kind == "finalize"
            )
        ).scalar_one()
    assert said.startswith("count_mismatch: ")
    assert list(bench.blobs.list_keys("outputs/")) == []


def test_nothing_is_run_again_when_the_input_is_gone_too(
    bench: Bench, control: ControlLoop
) -> None:
    batch = run(bench)
    flip(bench, keys_of(bench, batch)[0])
    bench.blobs.delete(input_key(batch.input_file_id))
    assert control.turn()
    assert status(bench, batch) is BatchStatus.FINALIZING
    assert bench.states(batch) == [UnitState.DONE] * 3
