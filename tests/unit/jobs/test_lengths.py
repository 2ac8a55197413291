"""How long answers were decides in which order those of later batches run."""

from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from jobs import lengths
from jobs.app import App
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import DEFAULT_TENANT, TenantId
from jobs.domain.request import Request
from jobs.domain.result import Result, Usage
from jobs.feed import FeedSettings
from jobs.loops.control import ControlLoop
from jobs.loops.turns import Crew
from jobs.settings import Settings
from storage import batches
from storage import lengths as lengths_known
from storage.blobs.base import input_key
from tests.builders import (
    MODEL,
    Bench,
    ScriptedEngine,
    Worker,
    await_set,
    await_true,
    make_line,
    text_of,
)

FLUSH_EACH = FeedSettings(flush_results=1, flush_bytes=1, flush_seconds=0, poll_seconds=0.02)
SHORT, LONG = "Answer with one word. " * 20, "Write a story of many pages. " * 20
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4096}


class WordyEngine(ScriptedEngine):
    """Its answers take as many tokens as their question ends with; from 4,096 on they are cut."""

    @override
    def _answer(self, request: Request) -> Result:
        num_tokens = int(text_of(request).rpartition(" ")[2])
        return Result(
            id=request.id,
            text="…",
            finish_reason="length" if num_tokens >= 4096 else "stop",
            usage=Usage(prompt_tokens=1, completion_tokens=num_tokens),
        )


def make_file(*asked: tuple[str, int], num_turns: int = 10) -> bytes:
    """Return lines with each of these system prompts, in turns, and answers so long."""
    return b"".join(
        make_line(
            f"r{number}-{turn}",
            messages=[
                {"role": "system", "content": system},
                {"role": "user", "content": f"question {turn}.{number} {num_tokens}"},
            ],
            **GREEDY,
        )
        + b"\n"
        for turn in range(num_turns)
        for number, (system, num_tokens) in enumerate(asked)
    )


def run(bench: Bench, content: bytes, **limits: Any) -> tuple[Batch, list[str]]:  # noqa: ANN401
    """Return a batch, finished but not learned from, and its questions as they were asked."""
    bench.submit_planned(content, **{"shard_lines": 4, "by_prefix": False, **limits})
    engine = WordyEngine()
    with Worker(bench, engine) as worker:
        worker.result()
    return bench.finalize(), engine.asked


def learn(bench: Bench, content: bytes) -> int:
    batch, _ = run(bench, content)
    return lengths.learn(bench.db, bench.blobs, batch.id)


def are_long_first(asked: list[str]) -> bool:
    """Return whether the second kind of question came before all others."""
    kinds = [question.split(".")[1].split(" ")[0] for question in asked]
    return kinds == sorted(kinds, reverse=True)


def test_templates_with_long_answers_run_first_in_the_next_batch(bench: Bench) -> None:
    content = make_file((SHORT, 5), (LONG, 900))
    batch, asked = run(bench, content)
    assert not are_long_first(asked)
    assert lengths.learn(bench.db, bench.blobs, batch.id) == 2
    assert sorted(lengths_known.read(bench.db, batch.tenant_id, MODEL).values()) == [5, 900]
    _, asked = run(bench, make_file((SHORT, 7), (LONG, 7)))
    assert are_long_first(asked), "by what was, not by what will be"


def test_it_can_be_switched_off(bench: Bench) -> None:
    learn(bench, make_file((SHORT, 5), (LONG, 900)))
    _, asked = run(bench, make_file((SHORT, 7), (LONG, 7)), by_template=False)
    assert not are_long_first(asked)


def test_another_tenant_learns_nothing_of_it(bench: Bench) -> None:
    learn(bench, make_file((SHORT, 5), (LONG, 900)))
    assert lengths_known.read(bench.db, TenantId("another"), MODEL) == {}
    assert lengths_known.read(bench.db, DEFAULT_TENANT, "another model") == {}


def test_the_last_batch_is_believed(bench: Bench) -> None:
    learn(bench, make_file((SHORT, 900), (LONG, 5)))
    learn(bench, make_file((SHORT, 5), (LONG, 900)))
    _, asked = run(bench, make_file((SHORT, 7), (LONG, 7)))
    assert are_long_first(asked)


@pytest.mark.parametrize(
    "content",
    [
        make_file((LONG, 900), num_turns=lengths.MIN_LINES - 1),
        make_file((LONG, 4096)),
        make_file(("", 900)),
    ],
    ids=["too few answers", "cut off by max_tokens", "no template"],
)
def test_nothing_is_learned_where_there_is_nothing_to_learn(bench: Bench, content: bytes) -> None:
    assert learn(bench, content) == 0


def test_a_shard_that_was_stopped_teaches_nothing(bench: Bench) -> None:
    batch = bench.submit_planned(make_file((LONG, 900), num_turns=60), by_prefix=False)
    engine = WordyEngine()
    engine.pause_after(40)
    with Worker(bench, engine, settings=FLUSH_EACH) as worker:
        await_true(lambda: batches.get(bench.db, batch.id).request_counts.completed == 40)
        batches.request_cancel(bench.db, batch.id)
        await_set(engine.dropped)
        engine.go_on()
        worker.result()
    assert bench.finalize().request_counts.completed >= 40
    assert lengths.learn(bench.db, bench.blobs, batch.id) == 0


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_batch_ends_whether_or_not_anything_can_be_learned_from_it(
    bench: Bench,
    tmp_path: Path,
    *,
    is_gone: bool,
) -> None:
    batch = bench.submit_planned(make_file((SHORT, 5), (LONG, 900)), by_prefix=False)
    with Worker(bench, WordyEngine()) as worker:
        worker.result()
    if is_gone:  # all results are there, so nobody else needs it
        bench.blobs.delete(input_key(batch.input_file_id))
    app = App(
        settings=Settings(),
        folder=tmp_path,
        db=bench.db,
        blobs=bench.blobs,
        doorbell=bench.doorbell,
    )
    assert ControlLoop(Crew(app), checker=bench.sandbox).turn()
    assert batches.get(bench.db, batch.id).status is BatchStatus.COMPLETED
    known = lengths_known.read(bench.db, DEFAULT_TENANT, MODEL)
    assert sorted(known.values()) == ([] if is_gone else [5, 900])
