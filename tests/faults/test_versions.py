"""Programs of two versions on one database."""

import time

import pytest
import sqlalchemy as sa

from storage.tables import units
from tests.faults.checks import assert_sound
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import wait_for

pytestmark = pytest.mark.slow
NOBODY = "redis://127.0.0.1:1/0"
# The next version of the format, in the process of a worker of the next version.
NEXT = """
import jobs.domain.shard as shard
shard.FORMAT_VERSION += 1
shard.PLAIN_FORMAT = shard.FORMAT_VERSION
from jobs.worker.process import main
main()
"""


def test_units_of_a_newer_program_wait_for_a_newer_worker(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.005, slots=32)
    control = fleet.start("control", role="control", celery=False, program=("-c", NEXT))
    old = fleet.start("old", role="engine", celery=False)
    newer = fleet.submit(60)
    wait_for(lambda: fleet.get(newer.id).in_progress_at is not None)
    assert control.drain() == 0
    time.sleep(2.0)  # some looks for work, and some heartbeats
    (alone,) = fleet.live()
    assert (alone.state, alone.model_key) == ("idle", None), "no engine is loaded for nothing"
    fleet.start("old-control", role="control", celery=False)
    older = fleet.submit(60)
    fleet.wait_done(older.id)
    assert_sound(fleet, older.id, 60)
    assert fleet.num_done(newer.id) == 0, "the old worker left it alone"
    with fleet.app.db.read() as tx:
        of_newer = sa.select(units.c.claims).where(
            units.c.batch_id == newer.id, units.c.kind == "shard"
        )
        assert set(tx.execute(of_newer).scalars()) == {0}
    fleet.start("new", role="all", celery=False, program=("-c", NEXT))
    fleet.wait_done(newer.id)
    assert_sound(fleet, newer.id, 60)
    assert old.process.poll() is None


def test_workers_go_on_while_a_newer_program_adds_to_their_tables(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.02, slots=8)
    fleet.start("all", role="all", celery=False)
    batch = fleet.submit(160)
    wait_for(lambda: fleet.num_done(batch.id) > 0)
    added = ("batches", "units", "shards", "segments", "files", "workers")
    try:
        for table in added:
            fleet.app.db.run(
                lambda tx, table=table: tx.execute(  # type: ignore[misc]
                    sa.text(f"ALTER TABLE {table} ADD COLUMN of_the_next_version text DEFAULT 'x'")
                )
            )
        later = fleet.submit(40)
        for one, num_lines in ((batch, 160), (later, 40)):
            fleet.wait_done(one.id)
            assert_sound(fleet, one.id, num_lines)
    finally:
        for table in added:
            fleet.app.db.run(
                lambda tx, table=table: tx.execute(  # type: ignore[misc]
                    sa.text(f"ALTER TABLE {table} DROP COLUMN of_the_next_version")
                )
            )
