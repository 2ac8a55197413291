"""The corpus of schemas: planned, run on the bundled model, and held against the validators."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import jsonschema_rs
import llguidance
import pytest

from engine.constraints import byte_tokenizer, grammar_of
from engine.sandbox import Sandbox
from tests.corpus import table
from tests.corpus.families import FAMILIES, entries
from tests.corpus.table import HARD, UNSEEN, Entry, family_of

SPELLED_OTHERWISE = ("12345678901234567890", "1e+22")
"""Numbers that the grammar writes in another way than `json.dumps`."""


@pytest.fixture(scope="module")
def corpus() -> list[Entry]:
    return list(entries())


@pytest.fixture(scope="module")
def planned(corpus: list[Entry]) -> dict[str, str]:
    return table.plan(corpus)


def test_corpus_on_disk_is_what_is_made_and_planned_now(
    corpus: list[Entry], planned: dict[str, str]
) -> None:
    assert table.PATH.read_text(encoding="utf-8") == table.spell(corpus, planned)
    assert len(corpus) >= 500
    assert len({json.dumps(entry["schema"]) for entry in corpus}) == len(corpus)


def test_every_schema_that_is_none_or_leads_elsewhere_is_refused_at_planning_with_its_line(
    corpus: list[Entry], planned: dict[str, str], tmp_path: Path
) -> None:
    refused = table.refused_lines(corpus, tmp_path)
    assert refused == {name for name, outcome in planned.items() if outcome == "invalid"}
    due = {entry["id"] for entry in corpus if family_of(entry["id"]) in HARD}
    assert refused == due - UNSEEN


def test_bombs_cost_no_more_than_their_own_lines_in_bounded_time_and_memory() -> None:
    bombs = [
        {"id": f"bomb-{n}", "schema": schema} for n, (schema, *_) in enumerate(FAMILIES["bombs"]())
    ]
    fine: Entry = {"id": "fine-1", "schema": {"type": "object"}}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    with Sandbox() as sandbox:
        verdicts = sandbox.check_many([table.constraint_of(one) for one in (*bombs, fine)])
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert [verdict.outcome for verdict in verdicts] == ["invalid"] * len(bombs) + ["enforced"]
    # No item may take more than the sandbox's own limits; its memory has a limit of 2 GiB.
    assert spent.ru_utime - before.ru_utime < 7 * len(bombs)
    assert time.monotonic() - began < 7 * len(bombs) + 60
    assert spent.ru_maxrss < 2 << 20


def accepts(matcher: llguidance.LLMatcher, text: str) -> bool:
    fresh, given = matcher.deep_copy(), list(text.encode())
    return fresh.try_consume_tokens(given) == len(given) and fresh.is_accepting()


def changed(value: Any) -> list[Any]:  # noqa: ANN401 -- any JSON
    """Return documents that differ from this one in one place."""
    if isinstance(value, dict):
        without = [{k: v for k, v in value.items() if k != key} for key in value]
        inside = [{**value, key: one} for key, part in value.items() for one in changed(part)]
        return [*without, {**value, "unknown": 1}, *inside]
    if isinstance(value, list):
        within = [
            [*value[:place], one, *value[place + 1 :]]
            for place, part in enumerate(value[:3])
            for one in changed(part)
        ]
        return [value[1:], value + value[-1:], *within]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, -value, value * 10, str(value)]
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), 5]
    return [0, "null"]


def test_what_may_be_generated_is_what_the_validator_accepts(
    corpus: list[Entry], planned: dict[str, str]
) -> None:
    num_compared = 0
    differing, mislabelled = [], []
    for entry in corpus:
        if planned[entry["id"]] == "invalid":
            continue
        validator = jsonschema_rs.validator_for(entry["schema"], validate_formats=True)
        good, bad = entry["good"], entry["bad"]
        if not all(map(validator.is_valid, good)) or any(map(validator.is_valid, bad)):
            mislabelled.append(entry["id"])
        if planned[entry["id"]] != "enforced":
            continue
        grammar = grammar_of(table.constraint_of(entry))
        matcher = llguidance.LLMatcher(byte_tokenizer(), grammar, log_level=0)
        for document in [*good, *bad, *(one for value in good[:2] for one in changed(value)[:60])]:
            text = json.dumps(document, ensure_ascii=False)
            if any(number in text for number in SPELLED_OTHERWISE):
                continue
            num_compared += 1
            if accepts(matcher, text) != validator.is_valid(document):
                differing.append((entry["id"], text))
    assert not mislabelled
    assert num_compared > 5_000
    assert not differing


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_answer_to_the_corpus_fits_and_nearly_every_enforceable_schema_has_one(
    corpus: list[Entry], planned: dict[str, str], tmp_path: Path
) -> None:
    running = [e for e in corpus if planned[e["id"]] != "invalid" and e["id"] not in UNSEEN]
    answers, codes = table.run(running, tmp_path)
    print("\n" + table.render(corpus, planned, answers, codes))
    assert not table.misfits(corpus, answers)
    assert set(codes.values()) <= {"truncated", "schema_mismatch"}
    enforced = [e["id"] for e in running if planned[e["id"]] == "enforced"]
    assert sum(name in answers for name in enforced) >= 0.95 * len(enforced)
