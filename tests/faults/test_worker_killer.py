"""A line that kills the whole worker, engine and all: found by whoever takes over, and isolated."""

import json

import pytest

from tests.faults.conftest import Bench, await_gone, request_line, tree_of

POISON = 70
MAX_DEATHS = 16
"""Two until lines are suspected, one of a group of 32, five to halve it, three alone, and room."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_line_that_kills_the_process_of_a_run_costs_only_itself(bench: Bench) -> None:
    bench.model_options = {"step_seconds": 0.001}

    def line(number: int) -> str:
        return request_line(number, "[[fault=crash-worker]]" if number == POISON else "hello")

    bench.write_input(200, line)
    deaths = 0
    while True:
        process = bench.start_run("--resume")
        tree = tree_of(process)
        if (ended := process.wait(timeout=120)) != -9:
            break
        deaths += 1
        await_gone(tree)
        assert deaths <= MAX_DEATHS, bench.stderr()
    assert ended == 4, bench.stderr()
    print(f"\nthe line was found after {deaths} deaths of the process")
    assert sorted(bench.custom_ids()) == sorted(f"r{n}" for n in range(200))
    (error,) = map(json.loads, bench.errors.read_text().splitlines())
    assert error["custom_id"] == f"r{POISON}"
    assert error["response"]["body"]["error"]["code"] == "worker_crash"
