"""`kill -9` of any process of `batchctl run`, at random moments: nothing lost, nothing twice."""

import random
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest

from tests.faults.conftest import Bench, await_gone, await_true, tree_of


def await_growth(bench: Bench, process: subprocess.Popen[bytes]) -> None:
    before = bench.generated_tokens()
    await_true(lambda: process.poll() is not None or bench.generated_tokens() > before)


def kill_and_resume(bench: Bench, rng: random.Random, *, num_lines: int, num_kills: int) -> None:
    bench.write_mixed_input(num_lines)
    kills = 0
    while kills < num_kills:
        process = bench.start_run("--resume")
        if rng.random() < 0.8:  # most kills meet a working engine, some the start or the planning
            await_growth(bench, process)
        time.sleep(rng.uniform(0.0, 1.5))
        tree = tree_of(process)
        if process.poll() is None and tree:
            victim = rng.choice(tree)
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
                kills += 1
            if victim.pid != process.pid:
                time.sleep(rng.uniform(0.0, 1.0))  # the run goes on by itself; then it dies too
                tree = tree_of(process)
                process.kill()
        process.wait()
        await_gone(tree)
    final = bench.start_run("--resume")
    assert final.wait(timeout=300) == 0, bench.stderr()
    ids = bench.custom_ids()
    assert len(ids) == num_lines
    assert ids == [f"r{n}" for n in range(num_lines)], "each custom_id once, in input order"
    assert bench.num_followers() > num_lines / 5, "what repeats others was not run by itself"
    generated, kept = bench.generated_tokens(), bench.usage_tokens()
    repeated = generated - kept
    print(
        f"\n{num_lines} lines, {kills} kills: 0 lost, 0 doubled; {repeated} of {generated} tokens "
        f"generated twice ({100 * repeated / generated:.2f} %)"
    )
    assert repeated >= 0


def test_a_few_kills_lose_and_double_nothing(bench: Bench, rng: random.Random) -> None:
    bench.model_options = {"step_seconds": 0.006}
    kill_and_resume(bench, rng, num_lines=3000, num_kills=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_of_a_run_of_20000_lines(bench: Bench, rng: random.Random) -> None:
    bench.model_options = {"step_seconds": 0.011}
    kill_and_resume(bench, rng, num_lines=20_000, num_kills=20)


def test_killing_the_engine_alone_costs_only_what_was_in_flight(bench: Bench) -> None:
    bench.model_options = {"step_seconds": 0.01, "slots": 32}
    bench.write_input(2000)
    process = bench.start_run()
    await_true(lambda: bench.ledger.exists() and bench.generated_tokens() > 3000)
    (engine,) = [p for p in tree_of(process) if "engine.host" in p.cmdline()]
    engine.kill()
    assert process.wait(timeout=120) == 0, bench.stderr()
    assert bench.custom_ids() == [f"r{n}" for n in range(2000)]
    repeated = bench.generated_tokens() - bench.usage_tokens()
    # And the token by which the new engine shows that it works.
    assert 0 <= repeated <= 32 * 16 + 1, "at most what the slots held"


def test_ctrl_c_while_the_model_loads_ends_at_once(bench: Bench) -> None:
    bench.model_options = {"load_seconds": 60}
    bench.write_input(10)
    process = bench.start_run()
    await_true(lambda: any("engine.host" in p.cmdline() for p in tree_of(process)))
    tree = tree_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=15) == 130, bench.stderr()
    await_gone(tree)


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(bench: Bench) -> None:
    bench.model_options = {"step_seconds": 0.01}
    bench.write_input(3000)
    process = bench.start_run()
    await_true(lambda: bench.ledger.exists() and bench.generated_tokens() > 5000)
    tree = tree_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130, bench.stderr()
    await_gone(tree)
    assert "--resume" in bench.stderr()
    before = bench.generated_tokens()
    again = bench.start_run("--resume")
    assert again.wait(timeout=120) == 0, bench.stderr()
    assert bench.custom_ids() == [f"r{n}" for n in range(3000)]
    assert bench.generated_tokens() - before < 3000 * 16 - 3000, "it did not start afresh"


def test_a_second_run_of_the_same_folder_is_told_to_wait(bench: Bench) -> None:
    bench.model_options = {"step_seconds": 0.01}
    bench.write_input(3000)
    first = bench.start_run()
    await_true(lambda: bench.ledger.exists() and bench.generated_tokens() > 100)
    second = bench.start_run("--resume")
    assert second.wait(timeout=30) == 8, bench.stderr()
    assert f"process {first.pid}" in bench.stderr()
