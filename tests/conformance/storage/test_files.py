from dataclasses import replace
from datetime import timedelta

import pytest

from jobs.domain.errors import Conflict, NotFound
from jobs.domain.ids import FileId, TenantId
from jobs.domain.shard import UnitKind
from storage import batches, files
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


def test_an_expired_input_of_an_unfinished_batch_is_not_in_the_way_of_others(bench: Bench) -> None:
    now = bench.clock.now
    read, other = (
        files.insert(bench.db, replace(bench.make_file(), expires_at=now - timedelta(seconds=n)))
        for n in (2, 1)
    )
    batches.insert(bench.db, bench.make_batch(file=read))
    assert files.list_expired(bench.db, now=now, limit=1) == [other]
    batches.refuse(bench.db, bench.must_claim(UnitKind.PLAN), errors=[], num_errors=0)
    assert files.list_expired(bench.db, now=now) == [read, other]


def test_a_deleted_file_may_still_be_looked_at(bench: Bench) -> None:
    file = bench.add_file()
    files.mark_deleted(bench.db, file.id)
    assert files.peek(bench.db, file.id) == replace(file, deleted_at=bench.clock.now)
    with pytest.raises(NotFound):
        files.peek(bench.db, FileId("file-none"))
