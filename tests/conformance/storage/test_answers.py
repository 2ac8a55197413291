"""Answers for later batches, on every database and in every blob store."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from jobs import collector
from jobs.audit import audit
from storage import answers, files
from storage.answers import INDEX, AnswerBlob, read_answers, read_index
from storage.blobs.base import BlobStore
from storage.database import open_database
from tests.builders import Bench, Clock, ids_of
from tests.reusing import DAY, Reusing, lines_of


@pytest.fixture
def reusing(database_url: str, blobs: BlobStore) -> Iterator[Reusing]:
    clock = Clock()
    with open_database(database_url, clock=clock) as db, ExitStack() as stack:
        yield Reusing(Bench(db=db, blobs=blobs, clock=clock, stack=stack))


def test_batches_take_each_others_answers(reusing: Reusing) -> None:
    bench = reusing.bench
    first = reusing.run(lines_of(range(30)))
    second = reusing.run(lines_of(range(15, 45)), limits={"shard_lines": 4})
    assert (reusing.num_run, second.num_reused) == (15, 15)
    third = reusing.run(lines_of(range(45)))
    assert (reusing.num_run, third.num_reused) == (0, 45)
    output = bench.output_of(third)
    assert ids_of(output) == [f"r{n}" for n in range(45)]
    origins = [line["response"]["body"]["batchctl"]["reused_from"] for line in output]
    assert origins == [first.id] * 30 + [second.id] * 15
    for batch in (first, second, third):
        assert audit(bench.db, bench.blobs, batch.id).violated == ()
    files.mark_deleted(bench.db, first.input_file_id)
    bench.clock.advance(0.1 * DAY)
    reusing.run(lines_of(range(45)))
    assert reusing.num_run == 30
    bench.clock.advance(1.1 * DAY)
    assert collector.collect(bench.db, bench.blobs, collector.Rules()).expired_answers == 2
    assert answers.list_expired(bench.db, now=bench.db.now(), limit=9) == []


def test_answers_are_read_where_they_are(reusing: Reusing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far apart or close together, and one several times."""
    bench, gap = reusing.bench, 100
    monkeypatch.setattr(answers, "_MAX_GAP", gap)
    found = reusing.blob(reusing.run(lines_of(range(30))))
    blobs = bench.blobs
    (index,) = read_index(blobs, found)
    assert len(index) == found.num_entries == 30
    content = blobs.get(found.blob_key)
    every = [(int(entry["offset"]), int(entry["length"])) for entry in index]
    assert found.num_bytes == sum(length for _, length in every) + 30 * INDEX.itemsize
    for places in (every, every[::9], [*every[:1], *every[3:4] * 3, *every[25:]], []):
        expected = [content[at : at + length] for at, length in places]
        assert list(read_answers(blobs, found, places)) == expected


def test_a_row_is_replaced_by_that_of_a_later_finalizer(reusing: Reusing) -> None:
    bench = reusing.bench
    batch = reusing.submit(lines_of(range(2)))
    now = bench.db.now()
    first = AnswerBlob(
        batch_id=batch.id,
        tenant_id=batch.tenant_id,
        identity="a",
        blob_key="reuse/x/1",
        num_entries=1,
        num_bytes=10,
        created_at=now,
        expires_at=now,
    )
    assert answers.record(bench.db, first, max_bytes=100) == []
    assert answers.record(bench.db, first, max_bytes=100) == [], "a repeated call"
    later = replace(first, blob_key="reuse/x/2")
    assert answers.record(bench.db, later, max_bytes=100) == ["reuse/x/1"]
    assert answers.list_expired(bench.db, now=now, limit=9) == [later]
    answers.forget(bench.db, first)
    assert answers.list_expired(bench.db, now=now, limit=9) == [later]
    answers.forget(bench.db, later)
    assert answers.list_expired(bench.db, now=now, limit=9) == []
