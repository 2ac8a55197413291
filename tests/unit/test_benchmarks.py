"""The parts of the benchmarks that a wrong figure could hide behind."""

import json
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from jobs.domain.request import CHAT, parse_line
from tests.benchmarks import plot, suite
from tests.benchmarks.measuring import Row
from tests.benchmarks.reasons import REASONS, UNKNOWN, reason_of
from tests.benchmarks.workloads import WORKLOADS, duplicates, shared_prefix


def make_row(*values: float, **changes: object) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": "C1", "what": "a ÷ b", "must": 1.0, "goal": 2.0, **changes}
    return Row(values=values, **fields).summary() | {"load": 0.1, "at": "2026-01-01"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_good_lines_and_the_same_for_a_seed(name: str) -> None:
    make = WORKLOADS[name]
    lines = list(make(40, seed=1, shrink=0.2))
    assert lines == list(make(40, seed=1, shrink=0.2))
    assert lines != list(make(40, seed=2, shrink=0.2))
    assert [parse_line(line, endpoint=CHAT).custom_id for line in lines] == [
        f"r{number}" for number in range(40)
    ]


def test_half_of_the_duplicates_repeat_the_other_half() -> None:
    bodies = [json.dumps(json.loads(line)["body"]) for line in duplicates(60, share=0.5)]
    assert len(set(bodies)) == 30


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_groups_share_as_much_of_their_prompts_as_they_should(share: float) -> None:
    for line in shared_prefix(50, share=share):
        system, user = json.loads(line)["body"]["messages"]
        found = len(system["content"]) / (len(system["content"]) + len(user["content"]))
        assert found == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (make_row(0.9), "MISSED"),
        (make_row(0.9, 1.5, 1.6), "must met"),
        (make_row(2.0), "goal met"),
        (make_row(1.2, must=1.1, goal=1.05, less=True), "MISSED"),
        (make_row(1.04, must=1.1, goal=1.05, less=True), "goal met"),
        (make_row(1.0, must=None), "goal missed"),
        (make_row(1.0, must=None, goal=None), ""),
    ],
)
def test_a_row_says_what_it_reached(row: dict[str, Any], said: str) -> None:
    assert suite.verdict(row) == said
    assert said in suite.render([row])


def test_a_row_that_misses_its_goal_is_told_with_the_reason() -> None:
    missed, met = make_row(1.2, id="C10 engine", must=1.3, goal=1.1, less=True), make_row(3.0)
    told = suite.render([missed, met])
    assert f"\nC10 engine: {REASONS['C10']}" in told
    assert f"- **C10 engine** {REASONS['C10']}" in plot.table([missed, met])
    assert UNKNOWN not in told
    assert UNKNOWN in suite.render([make_row(0.9, id="C100")])
    assert reason_of("C10 ordered engine") == REASONS["C10 ordered"]
    assert suite.render([met]).count("\n") == 1


def test_a_plot_is_an_image_with_every_row() -> None:
    rows = [make_row(0.9, 1.2), make_row(1e-9, id="C2"), make_row(1.0, id="<C3>", less=True)]
    drawn = ET.fromstring(plot.draw(rows))  # noqa: S314  our own
    marks = 1 + 3  # the paper, and what the colours mean
    assert sum(one.tag.endswith("rect") for one in drawn.iter()) == marks + len(rows)


def test_a_table_is_written_between_its_marks_again_and_again() -> None:
    page = "before\n<!-- begin: rows -->\nold\n<!-- end: rows -->\nafter\n"
    once = plot.replace_between(page, "rows", "new")
    assert once == plot.replace_between(once, "rows", "new")
    assert once.startswith("before\n<!-- begin: rows -->\n\nnew\n")
    assert once.endswith("<!-- end: rows -->\nafter\n")
    assert "old" not in once
