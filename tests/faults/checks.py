"""What has to hold of a batch after any fault, and what a test looks for in a worker's log."""

import json
from collections import Counter

import sqlalchemy as sa

from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import BatchId
from jobs.domain.result import Usage
from storage import files, segments
from storage.tables import shards, units
from tests.integration.fleet.fleets import Fleet, Member


def assert_sound(
    fleet: Fleet, batch_id: BatchId, num_lines: int, *, status: BatchStatus = BatchStatus.COMPLETED
) -> Batch:
    """Check that each line ended once, nothing is left open, and every count is a recount."""
    batch = fleet.get(batch_id)
    assert batch.status is status
    fleet.assert_once_each(batch, num_lines)
    done: dict[str, int] = {}
    num_answered, usage = 0, Usage()
    for segment in segments.iterate_for_batch(fleet.app.db, batch_id):
        positions = int.from_bytes(segment.positions, "little")
        assert not done.get(segment.unit_id, 0) & positions, "a line with two results"
        done[segment.unit_id] = done.get(segment.unit_id, 0) | positions
        num_answered += segment.num_completed
        usage += segment.usage
    with fleet.app.db.read() as tx:
        states = Counter(
            tx.execute(sa.select(units.c.state).where(units.c.batch_id == batch_id)).scalars()
        )
        rows = tx.execute(sa.select(shards).where(shards.c.batch_id == batch_id)).all()
    assert not {"pending", "leased"} & states.keys(), states
    assert {row.unit_id: int.from_bytes(row.done, "little") for row in rows if row.num_done} == done
    counts = batch.request_counts
    codes = error_codes(fleet, batch)
    assert (counts.total, counts.completed, counts.failed) == (
        num_lines,
        num_answered,
        codes.total(),
    )
    assert batch.usage == usage
    return batch


def error_codes(fleet: Fleet, batch: Batch) -> Counter[str]:
    """Return how often which code is in the error file."""
    if batch.error_file_id is None:
        return Counter()
    content = fleet.app.blobs.get(files.get(fleet.app.db, batch.error_file_id).blob_key)
    found: Counter[str] = Counter()
    for line in map(json.loads, content.splitlines()):
        error = line["error"] or line["response"]["body"]["error"]
        found[error["code"]] += 1
    return found


def num_reaped(member: Member) -> int:
    """Return how many leases a sweeper gave up, as its log says."""
    return sum(one["reaped"] for one in events(member, "swept"))


def events(member: Member, name: str) -> "list[dict[str, int]]":
    """Return what a worker logged under a name."""
    found = []
    for line in member.text().splitlines():
        if line.startswith("{") and f'"{name}"' in line:
            entry = json.loads(line)
            if entry.get("event") == name:
                found.append(entry)
    return found
