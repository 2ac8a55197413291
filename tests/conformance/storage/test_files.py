from dataclasses import replace
from datetime import timedelta

import pytest

from jobs.domain.errors import Conflict, NotFound
from jobs.domain.ids import FileId, TenantId, WorkerId
from jobs.domain.shard import UnitKind
from storage import batches, files, models, workers
from storage.models import Model
from storage.workers import Worker
from tests.conformance.storage.bench import Bench

US = TenantId("default")
OTHER = TenantId("other")


def test_a_file_is_read_as_it_was_inserted(bench: Bench) -> None:
    file = bench.make_file()
    assert files.insert(bench.db, file) == file
    assert files.insert(bench.db, file) == file
    assert files.get(bench.db, file.id, tenant_id=US) == file


def test_an_upload_with_the_same_key_returns_the_first_file(bench: Bench) -> None:
    first = files.insert(bench.db, replace(bench.make_file(), idempotency_key="k"))
    assert files.insert(bench.db, replace(bench.make_file(), idempotency_key="k")) == first


def test_a_file_that_is_missing_or_foreign_is_not_found(bench: Bench) -> None:
    with pytest.raises(NotFound, match="No such File object: file-none"):
        files.get(bench.db, FileId("file-none"))
    with pytest.raises(NotFound):
        files.get(bench.db, bench.add_file().id, tenant_id=OTHER)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_files_have_no_gap_and_no_repetition(bench: Bench, order: files.Order) -> None:
    made = []
    for number in range(7):
        if number % 3:  # some of the same instant
            bench.clock.advance(1)
        made.append(bench.add_file().id)
    bench.add_file(tenant_id=OTHER)
    bench.add_file(purpose="batch_output")
    seen: list[FileId] = []
    has_more = True
    while has_more:
        page, has_more = files.list_page(
            bench.db,
            tenant_id=US,
            purpose="batch",
            after=seen[-1] if seen else None,
            limit=3,
            order=order,
        )
        seen += [file.id for file in page]
    assert seen == (made if order == "asc" else made[::-1])
    with pytest.raises(NotFound):
        files.list_page(bench.db, tenant_id=US, after=FileId("file-none"))


def test_a_deleted_file_is_gone(bench: Bench) -> None:
    file = bench.add_file()
    assert files.mark_deleted(bench.db, file.id, tenant_id=US) == file
    with pytest.raises(NotFound):
        files.get(bench.db, file.id)
    with pytest.raises(NotFound):
        files.mark_deleted(bench.db, file.id)
    assert files.list_page(bench.db, tenant_id=US) == ([], False)


def test_the_input_of_an_unfinished_batch_is_not_deleted(bench: Bench) -> None:
    batch = bench.add_batch()
    with pytest.raises(Conflict, match=batch.id):
        files.mark_deleted(bench.db, batch.input_file_id)
    batches.refuse(bench.db, bench.must_claim(UnitKind.PLAN), errors=[], num_errors=0)
    files.mark_deleted(bench.db, batch.input_file_id)


def test_files_past_their_expiry_are_listed(bench: Bench) -> None:
    now = bench.clock.now
    kept = replace(bench.make_file(), expires_at=now + timedelta(seconds=1))
    gone = replace(bench.make_file(), expires_at=now)
    for file in (kept, gone):
        files.insert(bench.db, file)
    assert files.list_expired(bench.db, now=now) == [gone]


def test_a_model_is_published_in_place_of_its_older_self(bench: Bench) -> None:
    model = Model(
        name="demo", fingerprint="a", capabilities={"n": [1]}, published_at=bench.clock.now
    )
    models.upsert(bench.db, model)
    models.upsert(bench.db, replace(model, fingerprint="b"))
    assert models.get(bench.db, "demo") == replace(model, fingerprint="b")
    assert len(models.list_all(bench.db)) == 1
    with pytest.raises(NotFound, match="The model 'x' does not exist"):
        models.get(bench.db, "x")


def test_a_worker_is_seen_while_its_heart_beats(bench: Bench) -> None:
    start = bench.clock.now
    worker = Worker(id=WorkerId("worker_a"), boot_id="b", started_at=start, heartbeat_at=start)
    workers.heartbeat(bench.db, worker)
    later = replace(worker, heartbeat_at=start + timedelta(seconds=10), draining=True)
    workers.heartbeat(bench.db, later)
    assert workers.list_recent(bench.db, since=start + timedelta(seconds=5)) == [later]
    assert workers.list_recent(bench.db, since=start + timedelta(seconds=11)) == []
    workers.remove(bench.db, worker.id)
    assert workers.list_recent(bench.db, since=start) == []
