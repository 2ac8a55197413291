"""What is removed and what is not; blobs are made old by the clock of the database going on."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobs import collector
from jobs.collector import Collected, Rules
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import NotFound
from jobs.domain.ids import WorkerId
from jobs.domain.shard import UnitKind
from storage import batches, files, segments, units
from storage.blobs import open_blobs
from storage.blobs.base import BlobStore, hash_bytes, output_key, segment_key, segments_prefix
from storage.config import BlobSettings
from storage.database import open_database
from storage.tables import files as files_table
from tests.builders import Bench, Clock, ScriptedEngine, Worker, ids_of, make_lines
from tests.conftest import s3_settings

DAY = 86_400


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


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


def collect(bench: Bench, *, blobs: BlobStore | None = None, **rules: float) -> Collected:
    return collector.collect(bench.db, blobs or bench.blobs, Rules(**rules))  # type: ignore[arg-type]


def run(bench: Bench) -> Batch:
    bench.submit_planned(make_lines(4), shard_lines=2, window_seconds=30 * DAY)
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    return bench.finalize()


def keys(bench: Bench) -> set[str]:
    return set(bench.blobs.list_keys())


def expire(bench: Bench, file_id: str | None) -> None:
    with bench.db.transaction() as tx:
        tx.execute(
            sa.update(files_table)
            .where(files_table.c.id == file_id)
            .values(expires_at=bench.db.now() - timedelta(seconds=1))
        )


def test_nothing_goes_that_is_new(bench: Bench) -> None:
    run(bench)
    bench.blobs.put("files/file-nobody", b"x")
    bench.clock.advance(DAY - 60)
    before = keys(bench)
    assert not collect(bench).found
    assert keys(bench) == before


def test_segments_go_a_while_after_the_end_of_their_batch(bench: Bench) -> None:
    batch = run(bench)
    old = set(bench.blobs.list_keys(segments_prefix(batch.id)))
    before = keys(bench)
    bench.clock.advance(DAY + 1)
    found = collect(bench)
    assert (found.old_segments, found.orphans) == (2, 0)
    assert keys(bench) == before - old
    assert segments.list_for_batch(bench.db, batch.id) == ([], None)
    assert batches.get(bench.db, batch.id) == batch
    assert ids_of(bench.output_of(batch)) == ["r0", "r1", "r2", "r3"]
    assert not collect(bench).found


def test_segments_of_batches_that_run_or_failed_stay(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(4), shard_lines=2, window_seconds=30 * DAY)
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    before = keys(bench)
    bench.clock.advance(9 * DAY)
    assert not collect(bench).found
    lease = bench.claim(UnitKind.FINALIZE)
    batches.give_up(bench.db, lease, errors=[])
    assert batches.get(bench.db, batch.id).status is BatchStatus.FAILED
    bench.clock.advance(9 * DAY)
    assert not collect(bench).found
    assert keys(bench) == before


def test_bytes_that_no_row_names_go_once_they_are_old(bench: Bench) -> None:
    batch = run(bench)
    before = keys(bench)
    orphans = [
        "files/file-0123",
        f"outputs/{batch.id}/9-output.jsonl",
        "outputs/batch_gone/1-error.jsonl",
        "segments/batch_gone/unit_gone/1-0-0123456789abcdef",
    ]
    for key in orphans:
        bench.blobs.put(key, b"xy")
    bench.clock.advance(DAY + 1)
    assert collect(bench, segment_seconds=9 * DAY).orphans == len(orphans)
    assert keys(bench) == before


def test_bytes_of_others_stay(bench: Bench) -> None:
    theirs = {"theirs", "files/photo.jpg", "outputs/x", "segments/a/b/c", "segments/a/unit_b/c"}
    for key in theirs:
        bench.blobs.put(key, b"x")
    bench.clock.advance(9 * DAY)
    assert not collect(bench).found
    assert keys(bench) == theirs


def test_a_segment_that_may_still_be_committed_stays_however_old(bench: Bench) -> None:
    bench.submit_planned(make_lines(4), window_seconds=30 * DAY)
    lease = bench.claim(UnitKind.SHARD)
    key = bench.blobs.put(segment_key(lease, 0, hash_bytes(b"x")), b"x").key
    bench.clock.advance(9 * DAY)
    assert not collect(bench).found, "its holder may only have been slow"
    units.reap(bench.db)
    assert collect(bench).orphans == 1, "its epoch is over"
    assert not bench.blobs.exists(key)


def test_a_finalizer_that_is_at_it_keeps_what_it_and_others_wrote(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(4), window_seconds=30 * DAY)
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    old = bench.claim(UnitKind.FINALIZE)
    key = bench.blobs.put(output_key(batch.id, old.epoch, "output"), b"x").key
    bench.clock.advance(9 * DAY)
    assert not collect(bench).found
    units.reap(bench.db)
    bench.clock.advance(100)
    published = bench.finalize()
    bench.clock.advance(9 * DAY)
    collect(bench)
    assert not bench.blobs.exists(key)
    assert ids_of(bench.output_of(published)) == ["r0", "r1", "r2", "r3"]


def test_expired_files_go(bench: Bench) -> None:
    batch = run(bench)
    assert batch.output_file_id is not None
    key = files.get(bench.db, batch.output_file_id).blob_key
    expire(bench, batch.output_file_id)
    found = collect(bench)
    assert found.expired_files == 1
    assert not bench.blobs.exists(key)
    with pytest.raises(NotFound):
        files.get(bench.db, batch.output_file_id)
    assert batches.get(bench.db, batch.id).output_file_id == batch.output_file_id
    assert not collect(bench).found


def test_an_input_stays_until_the_last_batch_that_reads_it_has_ended(bench: Bench) -> None:
    batch = bench.submit_planned(make_lines(4), window_seconds=30 * DAY)
    expire(bench, batch.input_file_id)
    bench.clock.advance(2 * DAY)
    assert not collect(bench).found
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    assert bench.finalize().status is BatchStatus.COMPLETED
    assert collect(bench).expired_files == 1
    assert list(bench.blobs.list_keys("files/")) == []


def test_a_deleted_file_whose_bytes_are_still_there_is_an_orphan(bench: Bench) -> None:
    batch = run(bench)
    files.mark_deleted(bench.db, batch.input_file_id)  # and then the process died
    bench.clock.advance(DAY + 1)
    assert collect(bench, segment_seconds=9 * DAY).orphans == 1
    assert list(bench.blobs.list_keys("files/")) == []


def test_an_upload_that_was_cut_off_goes(bench: Bench) -> None:
    with bench.blobs.open_writer("files/file-1") as writer:
        writer.write(b"x" * 1000)
        assert not collect(bench).found
        bench.clock.advance(DAY + 1)
        assert collect(bench).uploads == 1
        assert not collect(bench).found


def test_a_dry_run_counts_what_would_go_and_removes_nothing(bench: Bench) -> None:
    batch = run(bench)
    expire(bench, batch.input_file_id)
    bench.blobs.put("files/file-nobody", b"xy")
    bench.clock.advance(DAY + 1)
    before = keys(bench)
    would = collector.collect(bench.db, bench.blobs, Rules(), dry_run=True)
    assert (would.expired_files, would.old_segments, would.orphans) == (1, 2, 1)
    assert keys(bench) == before
    assert files.get(bench.db, batch.input_file_id).deleted_at is None
    done = collect(bench)
    assert (done.expired_files, done.old_segments, done.orphans, done.num_bytes) == (
        would.expired_files,
        would.old_segments,
        would.orphans,
        would.num_bytes,
    )


def test_a_turn_looks_at_so_many_blobs_and_the_next_goes_on_behind_them(bench: Bench) -> None:
    rules = Rules(max_blobs=2)
    for number in range(5):
        bench.blobs.put(f"files/file-{number}", b"x")
    bench.blobs.put("segments/batch_x/unit_x/1-0-0", b"x")
    bench.clock.advance(DAY + 1)
    place: str | None = None
    turns = []
    for _ in range(4):
        found = collector.collect(bench.db, bench.blobs, rules, place=place)
        place = found.place
        turns.append((found.orphans, place))
    assert turns == [
        (2, "files/file-1"),
        (2, "files/file-3"),
        (2, "segments/batch_x/unit_x/1-0-0"),
        (0, None),
    ]
    assert keys(bench) == set()


def test_a_turn_ends_when_told_to(bench: Bench) -> None:
    for number in range(5):
        bench.blobs.put(f"files/file-{number}", b"x")
    bench.clock.advance(DAY + 1)
    found = collector.collect(bench.db, bench.blobs, Rules(), stop=lambda: True)
    assert (found.orphans, found.place) == (1, "files/file-0")


@pytest.mark.parametrize("store", ["moto", "rclone"])
def test_a_bucket_is_collected_like_a_folder(
    bench: Bench, store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings = s3_settings(request.getfixturevalue(f"{store}_url"))
    with open_blobs(settings, tmp_path) as blobs:
        bench.blobs = blobs
        batch = run(bench)
        for key in ("files/file-nobody", "outputs/batch_gone/1-error.jsonl", "theirs"):
            blobs.put(key, b"xy")
        bench.clock.advance(DAY + 60)
        found = collect(bench)
        assert (found.old_segments, found.orphans) == (2, 2)
        assert keys(bench) == {
            "theirs",
            f"files/{batch.input_file_id}",
            files.get(bench.db, batch.output_file_id).blob_key if batch.output_file_id else "",
        }


def test_logs_of_engines_go_with_their_workers(tmp_path: Path) -> None:
    clock = Clock()
    now = clock()
    ages = {"a1": 2 * DAY, "b2": 2 * DAY, "c3": 60}
    for worker, age in ages.items():
        log = tmp_path / f"engine-worker_{worker}.log"
        log.write_bytes(b"x")
        os.utime(log, (now.timestamp() - age,) * 2)
    for name in ("engine.log", "engine-mine.log", "engine-worker_d4.log.txt"):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (0, 0))
    alive, before = {WorkerId("worker_b2")}, now - timedelta(days=1)
    assert collector.remove_engine_logs(tmp_path, alive=alive, before=before, dry_run=True) == 1
    assert collector.remove_engine_logs(tmp_path, alive=alive, before=before) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "engine-mine.log",
        "engine-worker_b2.log",
        "engine-worker_c3.log",
        "engine-worker_d4.log.txt",
        "engine.log",
    ]
