"""What `make chaos` would say of files in which a line is missing, doubled or blamed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.client_types import Batch, RequestCounts, Usage
from jobs.domain.plan import MAX_FOLLOWERS
from scripts.chaos_check import Fate, Findings, Job, check_files, check_followers

NUM_LINES = 5
Line = dict[str, Any]


def answer(custom_id: str) -> Line:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"custom_id": custom_id, "response": {"body": {"usage": usage}}, "error": None}


def fault(custom_id: str, code: str) -> Line:
    return {"custom_id": custom_id, "response": None, "error": {"code": code}}


def look(output: list[Line], error: list[Line], *, fate: Fate = "completed") -> Findings:
    """Check files whose batch says of itself what they hold."""
    job = Job(number=7, num_lines=NUM_LINES, fate=fate, path=Path("in.jsonl"), batch_id="batch_x")
    batch = Batch(
        id="batch_x",
        status=fate,
        request_counts=RequestCounts(total=NUM_LINES, completed=len(output), failed=len(error)),
        usage=Usage(input_tokens=3 * len(output), output_tokens=2 * len(output)),
    )
    findings = Findings()
    check_files(findings, job, batch, {"output": output, "error": error})
    return findings


def answers() -> list[Line]:
    return [answer(f"b07-{index}") for index in range(NUM_LINES)]


def test_every_line_once_and_in_order_is_good() -> None:
    findings = look(answers(), [])
    assert findings.is_good
    assert (findings.num_lines, findings.completion_tokens) == (NUM_LINES, 2 * NUM_LINES)


def test_line_that_is_missing_is_lost() -> None:
    findings = look(answers()[1:], [])
    assert findings.lost == ["b07-0"]


@pytest.mark.parametrize("again", [answer, lambda one: fault(one, "batch_cancelled")])
def test_line_that_is_there_twice_is_doubled(again: Callable[[str], Line]) -> None:
    more = again("b07-4")
    output, error = (answers(), [more]) if more["error"] else ([*answers(), more], [])
    assert look(output, error, fate="cancelled").doubled == ["b07-4"]


def test_line_that_is_blamed_for_a_kill_is_a_problem() -> None:
    findings = look(answers()[:4], [fault("b07-4", "engine_crash")])
    assert not findings.lost
    assert findings.problems == [
        "batch 7 (batch_x): error lines: {'engine_crash': 1} instead of {}"
    ]


def test_line_of_a_batch_that_was_stopped_may_have_no_answer() -> None:
    assert look(answers()[:4], [fault("b07-4", "batch_expired")], fate="expired").is_good


def test_lines_out_of_order_and_strange_ones_are_problems() -> None:
    lines = answers()
    assert look([lines[1], lines[0], *lines[2:]], []).problems
    assert look([*lines, answer("b07-5")], []).problems


def test_counts_and_usage_that_do_not_add_up_are_problems() -> None:
    job = Job(number=0, num_lines=0, fate="completed", path=Path("in.jsonl"))
    batch = Batch(
        id="batch_x",
        status="completed",
        request_counts=RequestCounts(total=1, completed=1, failed=0),
        usage=Usage(input_tokens=1, output_tokens=1),
    )
    findings = Findings()
    check_files(findings, job, batch, {"output": [], "error": []})
    assert [problem.split(": ")[1] for problem in findings.problems] == [
        "counts (total, completed, failed)",
        "usage (input, output)",
    ]


def make_job(num_lines: int) -> Job:
    return Job(number=7, num_lines=num_lines, fate="completed", path=Path("in.jsonl"))


def follower(custom_id: str, leader: str, said: str) -> Line:
    one = answer(custom_id)
    one["response"]["body"] |= {"choices": [said], "batchctl": {"same_as": leader}}
    return one


def test_a_third_of_the_lines_repeats_others_and_one_question_has_several_leaders() -> None:
    job = make_job(4000)
    asked = [repr(job.body(index)) for index in range(4000)]
    assert 4000 - len(set(asked)) > job.num_folded > 1000
    assert asked.count(asked[0]) == 400 > MAX_FOLLOWERS + 1


@pytest.mark.parametrize(
    ("lines", "is_good"),
    [
        ([("b07-0", "", "yes"), ("b07-10", "b07-0", "yes")], True),
        ([("b07-0", "", "yes"), ("b07-10", "b07-0", "no")], False),
        ([("b07-1", "", "yes"), ("b07-10", "b07-1", "yes")], False),
        ([("b07-0", "b07-10", "yes"), ("b07-10", "b07-0", "yes")], False),
        ([("b07-3", "", "yes"), ("b07-13", "b07-3", "yes")], False),
    ],
)
def test_a_follower_has_the_answer_to_its_own_question(
    lines: list[tuple[str, str, str]],
    is_good: bool,  # noqa: FBT001
) -> None:
    output = [follower(*line) for line in lines]
    for line in output:
        if not line["response"]["body"]["batchctl"]["same_as"]:
            del line["response"]["body"]["batchctl"]
    findings = Findings()
    check_followers(findings, make_job(20), output)
    assert findings.is_good is is_good
