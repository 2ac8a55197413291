"""Wall clocks that are ten minutes wrong, and an interpreter too busy to look at its own."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.domain.ids import WorkerId
from jobs.domain.shard import UnitKind
from jobs.leases import LeaseKeeper, LeaseTimes
from storage import units
from storage.database import open_database
from tests.conformance.storage.bench import Bench, FixedClock
from tests.faults.checks import assert_sound, num_reaped
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import wait_for

SHIM = Path(__file__).parent / "wrong_clock"
TEN_MINUTES = 600
NOBODY = "redis://127.0.0.1:1/0"


def wrong_by(seconds: float) -> dict[str, str]:
    path = os.pathsep.join([str(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "WRONG_CLOCK_SECONDS": str(seconds)}


def test_the_clock_of_such_a_process_is_wrong() -> None:
    program = (
        "import time, datetime as d; utc = d.timezone.utc\n"
        "print(time.time(), d.datetime.now(utc).timestamp(), time.time_ns() / 1e9)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **wrong_by(-TEN_MINUTES)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for instant in map(float, said.split()):
        assert abs(time.time() - TEN_MINUTES - instant) < 30


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [TEN_MINUTES, -TEN_MINUTES], ids=["ahead", "behind"])
def test_wrong_clocks_take_no_lease_and_no_time_from_a_batch(
    make_fleet: MakeFleet, seconds: int
) -> None:
    fleet = make_fleet(NOBODY, step_seconds=0.02, slots=8)
    # Long for a machine that is slow, short for a clock that is wrong.
    fleet.values["leases"] = {"timing_profile": "fast", "lease_seconds": 20}
    # The one that judges is wrong, and so is one of those who hold leases.
    control = fleet.start("control", role="control", celery=False, variables=wrong_by(seconds))
    wrong = fleet.start("wrong", role="engine", celery=False, variables=wrong_by(seconds))
    fleet.start("right", role="engine", celery=False)
    batch = fleet.submit(300, window_seconds=TEN_MINUTES / 2)
    wait_for(lambda: fleet.num_done(batch.id) > 150)
    assert not num_reaped(control), "nobody is given up early"
    wrong.kill()
    wait_for(lambda: num_reaped(control), what="for the dead one's shards: nor late")
    fleet.wait_done(batch.id)
    done = assert_sound(fleet, batch.id, 300)
    instants = (done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at)
    assert None not in instants
    assert list(instants) == sorted(instants, key=str), "all of one clock"


@pytest.mark.slow
def test_a_lease_outlives_a_busy_interpreter(postgres_url: str) -> None:
    clock = FixedClock()
    ended = threading.Event()

    def burn() -> None:
        while not ended.is_set():
            sum(number * number for number in range(20_000))

    with open_database(postgres_url) as db:
        now = db.now()
        clock.now = now
        bench = Bench(db=db, clock=clock)
        bench.add_planned(4)
        times = LeaseTimes(lease_seconds=6, renew_seconds=0.5, watch_seconds=0.2)
        lease = units.claim(
            db,
            worker_id=WorkerId("w"),
            boot_id="b",
            kinds=(UnitKind.SHARD,),
            lease_seconds=times.lease_seconds,
        )
        assert lease is not None
        keeper, lost = LeaseKeeper(db, times), threading.Event()
        keeper.start()
        keeper.hold(
            lease,
            progress=time.monotonic_ns,
            on_lost=lambda _unit_id: lost.set(),
            on_stopping=lambda _unit_id, _state: None,
        )
        threads = [threading.Thread(daemon=True, target=burn) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert not lost.wait(2 * times.lease_seconds)
        assert units.reap(db) == []
        ended.set()
        for thread in threads:
            thread.join()
        keeper.close()
