"""`kill -9` of a run of several models and kinds of lines: nothing lost, nothing twice."""

import json
import random
import time

import pytest

from jobs.domain.mixed import MIXED
from jobs.domain.request import COMPLETIONS
from tests.faults.conftest import Bench, await_gone, await_true, request_line, tree_of

MODELS = ("simulated", "second", "third")


def make_several(number: int) -> str:
    """Return a line of one of three models, every fifth one a completion, every seventh alike."""
    model = MODELS[number % 3]
    if number % 5 == 0:
        asked = json.loads(request_line(number))
        body = {"model": model, "prompt": f"say {number}"}
        return json.dumps(asked | {"url": COMPLETIONS, "body": body})
    if number % 7 == 0:
        alike = [{"role": "user", "content": "hello everybody"}]
        return request_line(number, model=model, temperature=0, messages=alike)
    return request_line(number, model=model)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kills_of_a_run_of_three_models_lose_and_double_nothing(
    bench: Bench, rng: random.Random
) -> None:
    options = {"step_seconds": 0.006, "ledger": str(bench.ledger)}
    entry = {"engine": "simulated", "options": options}
    bench.settings = {"BATCHCTL_MODELS": json.dumps(dict.fromkeys(MODELS, entry))}
    num_lines = 1800
    bench.write_input(num_lines, make_several)
    command = ("run", str(bench.input), "--endpoint", MIXED, "--resume")
    places = ("--output", str(bench.output), "--errors", str(bench.errors))
    for _ in range(3):
        process = bench.start(*command, *places)
        before = bench.generated_tokens()
        await_true(lambda b=before: bench.generated_tokens() > b, seconds=60)  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 1.5))
        assert process.poll() is None, "it was to be killed at work"
        tree = tree_of(process)
        process.kill()
        process.wait()
        await_gone(tree)
    final = bench.start(*command, *places)
    assert final.wait(timeout=120) == 0, bench.stderr()
    assert bench.custom_ids() == [f"r{n}" for n in range(num_lines)]
    answers = [
        json.loads(line)["response"]["body"] for line in bench.output.read_bytes().splitlines()
    ]
    assert [body["model"] for body in answers] == [MODELS[n % 3] for n in range(num_lines)]
    assert [body["object"] == "text_completion" for body in answers] == [
        n % 5 == 0 for n in range(num_lines)
    ]
    assert bench.num_followers() > 0, "what repeats others was not run by itself"
    assert bench.generated_tokens() >= bench.usage_tokens()
