"""Lines that kill, hang or confuse the engine: each costs itself, and a bounded number of lives."""

import json

import pytest

from tests.faults.conftest import Bench, request_line

MAX_STARTS = 40


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "poisoned", [(1000, 4500, 9990), (5000, 5001, 5007)], ids=["apart", "close together"]
)
def test_three_lines_of_10000_that_kill_the_engine_cost_only_themselves(
    bench: Bench, poisoned: tuple[int, ...]
) -> None:
    bench.model_options = {"step_seconds": 0.001}

    def line(number: int) -> str:
        return request_line(number, "[[fault=crash]]" if number in poisoned else "hello")

    bench.write_input(10_000, line)
    process = bench.start_run()
    assert process.wait(timeout=800) == 4, bench.stderr()
    found = errors_of(bench)
    assert found == {f"r{n}": "engine_crash" for n in poisoned}
    assert bench.custom_ids() == [
        *(f"r{n}" for n in range(10_000) if n not in poisoned),
        *found,
    ], "each line once"
    num_deaths = bench.stderr().count("engine_died")
    print(f"\n10,000 lines, 3 of them poison: 9,997 results, {num_deaths} engine restarts")
    assert 9 <= num_deaths <= MAX_STARTS


def errors_of(bench: Bench) -> dict[str, str]:
    """Return the code of each line of the error file, in its order."""
    found = {}
    for text in bench.errors.read_text().splitlines():
        line = json.loads(text)
        found[line["custom_id"]] = line["response"]["body"]["error"]["code"]
    return found


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("crash", "engine_crash"),
        pytest.param("hang", "engine_crash", marks=pytest.mark.slow),
        ("oom", "engine_crash"),
        ("nan", "numerical_error"),
        ("endless", "request_timed_out"),
    ],
)
@pytest.mark.timeout(400)
def test_line_with_a_fault_costs_only_itself(bench: Bench, fault: str, code: str) -> None:
    bench.model_options = {"step_seconds": 0.001, "slots": 8}
    bench.settings = {
        "BATCHCTL_LEASES__TIMING_PROFILE": "fast",
        # Generous for a machine that is busy with other things: the other lines take milliseconds.
        "BATCHCTL_LEASES__STALL_SECONDS": "3",
        "BATCHCTL_LEASES__REQUEST_SECONDS": "10",
    }
    bench.write_input(400, lambda n: request_line(n, f"[[fault={fault}]]" if n == 170 else "hello"))
    process = bench.start_run()
    assert process.wait(timeout=350) == 4, bench.stderr()
    assert errors_of(bench) == {"r170": code}
    assert bench.custom_ids() == [*(f"r{n}" for n in range(400) if n != 170), "r170"]


def test_answers_are_no_longer_than_the_operator_allows(bench: Bench) -> None:
    allowed = {"engine": "simulated", "defaults": {"max_tokens_cap": 3}}
    bench.settings = {"BATCHCTL_MODELS": json.dumps({"simulated": allowed})}
    bench.write_input(20, lambda n: request_line(n, "[[tokens=50]]", max_tokens=10 + n))
    process = bench.start_run()
    assert process.wait(timeout=120) == 0, bench.stderr()
    assert bench.usage_tokens() == 20 * 3
