"""Answers of earlier batches, from planning to the files."""

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from jobs import collector, finalizer, intake, metrics
from jobs.audit import audit
from jobs.domain.batch import BatchStatus
from jobs.domain.errors import BlobCorrupt, EngineDied, LeaseLost
from jobs.domain.ids import BatchId, TenantId
from jobs.domain.request import Capabilities, Constraint, Message, Request, SamplingParams
from jobs.domain.shard import UnitKind
from jobs.intake import PlanLimits
from jobs.reuse import Keys
from storage import answers, batches, files, segments, shards, units
from storage.blobs.base import answers_key
from storage.jsonl import decode_segment
from storage.tables import answers as answers_table
from tests.builders import (
    Bench,
    ScriptedEngine,
    Worker,
    await_set,
    await_true,
    describe,
    ids_of,
    make_line,
    make_request,
)
from tests.reusing import DAY, FLUSH_EACH, GREEDY, Reusing, lines_of


@pytest.fixture
def reusing(bench: Bench) -> Reusing:
    return Reusing(bench)


def contents_of(lines: list[dict[str, Any]]) -> list[str]:
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


def origins_of(lines: list[dict[str, Any]]) -> list[str | None]:
    return [line["response"]["body"].get("batchctl", {}).get("reused_from") for line in lines]


def test_the_second_run_of_a_file_computes_nothing(bench: Bench, reusing: Reusing) -> None:
    lines = lines_of(range(25))
    first = reusing.run(lines)
    assert (reusing.num_run, first.num_reused) == (25, 0)
    second = reusing.run(lines, limits={"shard_lines": 4})
    assert (reusing.num_run, second.num_reused) == (0, 25)
    assert second.status is BatchStatus.COMPLETED
    assert (second.request_counts.completed, second.request_counts.failed) == (25, 0)
    assert second.usage.prompt_tokens == second.usage.completion_tokens == 0
    output = bench.output_of(second)
    assert ids_of(output) == [f"r{n}" for n in range(25)]
    assert contents_of(output) == contents_of(bench.output_of(first))
    assert set(origins_of(output)) == {first.id}
    assert {line["response"]["body"]["usage"]["total_tokens"] for line in output} == {0}
    assert len({line["id"] for line in [*output, *bench.output_of(first)]}) == 50
    assert audit(bench.db, bench.blobs, second.id).violated == ()


def test_half_of_a_file_that_was_run_before_is_computed(bench: Bench, reusing: Reusing) -> None:
    first = reusing.run(lines_of(range(20)))
    second = reusing.run(lines_of(range(10, 30)), limits={"shard_lines": 3})
    assert sorted(reusing.engine.asked) == sorted(f"hello {n}" for n in range(20, 30))
    assert second.num_reused == 10
    output = bench.output_of(second)
    assert ids_of(output) == [f"r{n}" for n in range(10, 30)]
    assert contents_of(output) == [f"re: hello {n}" for n in range(10, 30)]
    assert origins_of(output) == [first.id] * 10 + [None] * 10
    assert audit(bench.db, bench.blobs, second.id).violated == ()


def test_a_batch_that_did_not_ask_takes_and_gives_nothing(bench: Bench, reusing: Reusing) -> None:
    lines = lines_of(range(4))
    reusing.run(lines, reuse=False)
    assert list(bench.blobs.list_keys("reuse/")) == list(bench.blobs.list_keys("plans/")) == []
    reusing.run(lines)
    assert reusing.num_run == 4
    reusing.run(lines, reuse=False)
    assert reusing.num_run == 4


def test_where_nothing_is_found_no_run_order_is_written(bench: Bench, reusing: Reusing) -> None:
    batch = reusing.run(lines_of(range(4)))
    assert [key.rpartition(".")[2] for key in bench.blobs.list_keys("plans/")] == ["keys"]
    assert not any(shard.is_run_order for shard, _ in shards.list_for_batch(bench.db, batch.id))


def test_equal_requests_share_an_answer_of_an_earlier_batch(bench: Bench, reusing: Reusing) -> None:
    reusing.run(lines_of(range(3)))
    again = [make_line(f"s{n}", f"hello {n // 2}", **GREEDY) for n in range(8)]
    batch = reusing.run(again)
    assert reusing.engine.asked == ["hello 3"]
    assert batch.num_reused == 6
    assert ids_of(bench.output_of(batch)) == [f"s{n}" for n in range(8)]
    assert contents_of(bench.output_of(batch)) == [f"re: hello {n // 2}" for n in range(8)]


@pytest.mark.parametrize("fold", ["determined", "all", "none"])
def test_only_determined_answers_are_given_however_requests_are_folded(
    reusing: Reusing, fold: str
) -> None:
    lines = [
        make_line("greedy", "a", temperature=0),
        make_line("seeded", "b", temperature=0.7, seed=3),
        make_line("sampled", "c", temperature=0.7),
        make_line("default", "d"),
    ]
    limits = {"fold": fold}
    reusing.run(lines, limits=limits)
    assert reusing.num_run == 4
    reusing.run(lines, limits=limits)
    assert sorted(reusing.engine.asked) == ["c", "d"]


def test_only_answers_are_given_and_no_errors(bench: Bench, reusing: Reusing) -> None:
    lines = [make_line("bad", "refuse", **GREEDY), make_line("good", "yes", **GREEDY)]
    for expected in (["refuse", "yes"], ["refuse"]):
        batch = reusing.run(lines)
        assert reusing.engine.asked == expected
        assert ids_of(bench.errors_of(batch)) == ["bad"]
        assert ids_of(bench.output_of(batch)) == ["good"]


def test_a_bad_line_fails_the_batch_though_the_rest_is_known(reusing: Reusing) -> None:
    reusing.run(lines_of(range(3)))
    reusing.submit([*lines_of(range(3)), b"{"])
    batch = reusing.plan()
    assert (batch.status, batch.num_errors) == (BatchStatus.FAILED, 1)


def other_model(**changes: object) -> Callable[[str], Capabilities]:
    return lambda name: msgspec.structs.replace(describe(name), **changes)


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"revision": "other"}])
def test_another_model_under_the_name_gives_its_own_answers(
    reusing: Reusing, change: dict[str, str]
) -> None:
    lines = lines_of(range(5))
    reusing.run(lines)
    reusing.run(lines, model=other_model(**change))
    assert reusing.num_run == 5
    reusing.run(lines, model=other_model(**change))
    assert reusing.num_run == 0
    reusing.run(lines)
    assert reusing.num_run == 0, "the first one is back"


def test_a_model_of_unknown_identity_takes_and_gives_nothing(reusing: Reusing) -> None:
    for _ in range(2):
        reusing.run(lines_of(range(3)), model=other_model(fingerprint=""))
        assert reusing.num_run == 3


def test_answers_of_an_engine_that_is_not_what_was_planned_are_not_kept(
    bench: Bench, reusing: Reusing
) -> None:
    """The files changed under a loaded engine: what it says is the old model's."""
    lines = lines_of(range(4))
    reusing.submit(lines)
    reusing.plan()
    old = ScriptedEngine()
    old.capabilities = other_model(revision="old")("simulated")
    with Worker(bench, old) as worker:
        worker.result()
    bench.finalize(reusing.cache)
    reusing.run(lines)
    assert reusing.num_run == 4


def test_of_two_lives_of_an_engine_each_answer_is_told_apart(
    bench: Bench, reusing: Reusing
) -> None:
    """A worker dies half-way, and the model is another one when the next goes on."""
    lines = lines_of(range(8))
    batch = reusing.submit(lines)
    reusing.plan()
    first, second = ScriptedEngine(slots=1), ScriptedEngine()
    second.capabilities = other_model(revision="new")("simulated")
    first.pause_after(3)
    with Worker(bench, first, settings=FLUSH_EACH) as worker:
        await_true(lambda: batches.get(bench.db, batch.id).request_counts.completed == 3)
        worker.stop.set()
        worker.result()
    with Worker(bench, second, settings=FLUSH_EACH) as worker:
        assert worker.result() == 5
    bench.finalize(reusing.cache)
    reusing.run(lines)
    assert sorted(reusing.engine.asked) == [f"hello {n}" for n in range(3, 8)]


def test_a_segment_with_answers_of_two_models_is_nobodys(bench: Bench, reusing: Reusing) -> None:
    lines = lines_of(range(6))
    batch = reusing.submit(lines)
    reusing.plan()
    engine = ScriptedEngine(slots=1)
    lives = iter(["one", "two"])

    def begin() -> ScriptedEngine:
        engine.capabilities = other_model(revision=next(lives))("simulated")
        return engine

    died: list[Request] = []
    answer = engine._answer  # noqa: SLF001  as its test

    def answer_or_die(request: Request) -> Any:  # noqa: ANN401
        if engine.num_answered == 3 and not died:
            died.append(request)
            raise EngineDied("It died.", suspects=frozenset())
        return answer(request)

    engine._answer = answer_or_die  # type: ignore[method-assign]  # noqa: SLF001
    with Worker(bench, engine, start=begin) as worker:
        assert worker.result() == 6
    assert [one.identity for one in segments.iterate_for_batch(bench.db, batch.id)] == [None]


def test_tenants_do_not_see_each_others_answers(reusing: Reusing) -> None:
    lines = lines_of(range(3))
    reusing.run(lines, tenant_id="one")
    reusing.run(lines, tenant_id="two")
    assert reusing.num_run == 3
    reusing.run(lines, tenant_id="one")
    assert reusing.num_run == 0


def test_an_answer_expires_so_long_after_it_was_computed(bench: Bench, reusing: Reusing) -> None:
    lines = lines_of(range(3))
    reusing.run(lines)
    bench.clock.advance(0.9 * DAY)
    reusing.run(lines)
    assert reusing.num_run == 0
    bench.clock.advance(0.2 * DAY)
    reusing.run(lines)
    assert reusing.num_run == 3, "to be used does not keep it longer"


def test_what_expires_while_a_batch_runs_is_its_own_by_then(bench: Bench, reusing: Reusing) -> None:
    first = reusing.run(lines_of(range(3)))
    reusing.submit(lines_of(range(3)))
    reusing.plan()
    bench.blobs.delete(reusing.blob(first).blob_key)
    bench.clock.advance(2 * DAY)
    collector.collect(bench.db, bench.blobs, collector.Rules())
    batch = bench.finalize(reusing.cache)
    assert len(bench.output_of(batch)) == 3


# --- what is damaged or gone ---


def damage_gone(bench: Bench, key: str) -> None:
    bench.blobs.delete(key)


def damage_cut(bench: Bench, key: str) -> None:
    bench.blobs.put(key, bench.blobs.get(key)[:-100])


def damage_noise(bench: Bench, key: str) -> None:
    bench.blobs.put(key, bytes(n * 37 % 256 for n in range(len(bench.blobs.get(key)))))


def damage_index(bench: Bench, key: str) -> None:
    content = bytearray(bench.blobs.get(key))
    content[-20:-12] = b"\xff" * 8  # where the last answer begins and how long it is
    bench.blobs.put(key, bytes(content))


@pytest.mark.parametrize("damage", [damage_gone, damage_cut, damage_noise])
def test_damaged_answers_are_computed_again(
    bench: Bench, reusing: Reusing, damage: Callable[[Bench, str], None]
) -> None:
    lines = lines_of(range(6))
    damage(bench, reusing.blob(reusing.run(lines)).blob_key)
    batch = reusing.run(lines)
    assert (reusing.num_run, batch.status) == (6, BatchStatus.COMPLETED)
    assert contents_of(bench.output_of(batch)) == [f"re: hello {n}" for n in range(6)]


def test_of_damaged_answers_the_others_are_used(bench: Bench, reusing: Reusing) -> None:
    lines = lines_of(range(6))
    key = reusing.blob(reusing.run(lines)).blob_key
    content = bytearray(bench.blobs.get(key))
    content[2] ^= 1  # in the first answer
    bench.blobs.put(key, bytes(content))
    damage_index(bench, key)
    batch = reusing.run(lines)
    assert sorted(reusing.engine.asked) == ["hello 0", "hello 5"]
    assert contents_of(bench.output_of(batch)) == [f"re: hello {n}" for n in range(6)]


@pytest.mark.parametrize(("left", "num_kept"), [(None, 0), (0, 0), (40, 2)])
def test_lost_keys_cost_the_answers_and_not_the_batch(
    bench: Bench, reusing: Reusing, left: int | None, num_kept: int
) -> None:
    reusing.submit(lines_of(range(3)))
    reusing.plan()
    (key,) = bench.blobs.list_keys("plans/")
    if left is None:
        bench.blobs.delete(key)
    else:
        bench.blobs.put(key, bench.blobs.get(key)[:left])
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    batch = bench.finalize(reusing.cache)
    assert batch.status is BatchStatus.COMPLETED
    reusing.run(lines_of(range(3)))
    assert reusing.num_run == 3 - num_kept


def test_a_full_disk_for_temporary_files_costs_the_answers_and_not_the_batch(
    bench: Bench, reusing: Reusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jobs.reuse.Harvest._write", fail)
    batch = reusing.run(lines_of(range(3)))
    assert batch.status is BatchStatus.COMPLETED
    assert list(bench.blobs.list_keys("reuse/")) == []


def test_results_that_are_lost_are_computed_where_they_were_taken_before(
    bench: Bench, reusing: Reusing
) -> None:
    reusing.run(lines_of(range(6)))
    batch = reusing.submit(lines_of(range(6)))
    reusing.plan(shard_lines=3)
    first = next(iter(segments.iterate_for_batch(bench.db, batch.id)))
    bench.blobs.put(first.blob_key, b"something else")
    lease = bench.claim(UnitKind.FINALIZE)
    with pytest.raises(BlobCorrupt):
        finalizer.finalize(bench.db, bench.blobs, lease, cache=reusing.cache)
    assert finalizer.run_lost_again(bench.db, bench.blobs, lease)
    engine = ScriptedEngine()
    with Worker(bench, engine) as worker:
        assert worker.result() == 3
    ended = bench.finalize(reusing.cache)
    assert ids_of(bench.output_of(ended)) == [f"r{n}" for n in range(6)]
    assert audit(bench.db, bench.blobs, ended.id).violated == ()


# --- while it runs ---


def test_reused_answers_are_there_from_the_start_and_survive_a_cancel(
    bench: Bench, reusing: Reusing
) -> None:
    reusing.run(lines_of(range(6)))
    batch = reusing.submit(lines_of(range(3, 12)))
    planned = reusing.plan()
    assert (planned.request_counts.completed, planned.request_counts.total) == (3, 9)
    assert audit(bench.db, bench.blobs, batch.id).violated == ()
    found = [
        index
        for segment in segments.iterate_for_batch(bench.db, batch.id)
        for index, _, _ in decode_segment(bench.blobs.get(segment.blob_key))
    ]
    assert found == [0, 1, 2]
    batches.request_cancel(bench.db, batch.id)
    ended = bench.finalize(reusing.cache)
    assert ended.status is BatchStatus.CANCELLED
    assert ids_of(bench.output_of(ended)) == ["r3", "r4", "r5"]
    assert ids_of(bench.errors_of(ended)) == [f"r{n}" for n in range(6, 12)]
    assert audit(bench.db, bench.blobs, ended.id).violated == ()


def test_a_cancelled_batch_gives_what_it_has(bench: Bench, reusing: Reusing) -> None:
    batch = reusing.submit(lines_of(range(8)))
    reusing.plan()
    engine = ScriptedEngine(slots=1)
    engine.pause_after(3)
    with Worker(bench, engine, settings=FLUSH_EACH) as worker:
        await_true(lambda: batches.get(bench.db, batch.id).request_counts.completed == 3)
        batches.request_cancel(bench.db, batch.id)
        await_set(engine.dropped)
        worker.result()
    bench.finalize(reusing.cache)
    reusing.run(lines_of(range(8)))
    assert reusing.num_run == 5


def test_a_planner_that_dies_leaves_nothing_that_counts(bench: Bench, reusing: Reusing) -> None:
    reusing.run(lines_of(range(6)))
    reusing.submit(lines_of(range(9)))

    class Killed(Exception):
        pass

    for deadly in range(1, 12):
        lease = bench.claim(UnitKind.PLAN)
        calls = iter(range(1, 100))

        def die(_number: int, deadly: int = deadly, calls: Iterator[int] = calls) -> None:
            if next(calls) == deadly:
                raise Killed

        with suppress(Killed):
            intake.plan(
                bench.db,
                bench.blobs,
                lease,
                describe=describe,
                checker=bench.sandbox,
                limits=PlanLimits(),
                cache=reusing.cache,
                on_progress=die,
            )
            break
        bench.clock.advance(2 * 3600)
        units.reap(bench.db)
        bench.clock.advance(3600)
    else:
        pytest.fail("it died each time")
    assert deadly > 3, "it was killed in several places"
    reusing.engine = ScriptedEngine()
    with Worker(bench, reusing.engine) as worker:
        assert worker.result() == 3
    batch = bench.finalize(reusing.cache)
    assert ids_of(bench.output_of(batch)) == [f"r{n}" for n in range(9)]
    assert audit(bench.db, bench.blobs, batch.id).violated == ()


def test_of_two_planners_the_one_that_lost_its_lease_changes_nothing(
    bench: Bench, reusing: Reusing
) -> None:
    reusing.run(lines_of(range(6)))
    batch = reusing.submit(lines_of(range(6)))
    late = bench.claim(UnitKind.PLAN)
    bench.clock.advance(2 * 3600)
    units.reap(bench.db)
    bench.clock.advance(3600)
    reusing.plan()
    before = {one.blob_key for one in segments.iterate_for_batch(bench.db, batch.id)}
    with pytest.raises(LeaseLost):
        bench.plan(late, cache=reusing.cache)
    assert {one.blob_key for one in segments.iterate_for_batch(bench.db, batch.id)} == before
    assert len(bench.output_of(bench.finalize(reusing.cache))) == 6


def test_a_finalizer_that_dies_after_it_gave_answers_is_repeated(
    bench: Bench, reusing: Reusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    reusing.submit(lines_of(range(4)))
    reusing.plan()
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    with monkeypatch.context() as patch:
        patch.setattr(batches, "complete", _die)
        with pytest.raises(KeyboardInterrupt):
            bench.finalize(reusing.cache)
    bench.clock.advance(2 * 3600)
    units.reap(bench.db)
    bench.clock.advance(3600)
    batch = bench.finalize(reusing.cache)
    found = reusing.blob(batch)
    assert list(bench.blobs.list_keys("reuse/")) == [found.blob_key], "the other made way"
    reusing.run(lines_of(range(4)))
    assert reusing.num_run == 0


def _die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# --- how they go ---


def test_to_delete_a_file_takes_what_its_batch_gave(bench: Bench, reusing: Reusing) -> None:
    lines = lines_of(range(3))
    for name in ("input_file_id", "output_file_id"):
        batch = reusing.run(lines)
        assert reusing.num_run == 3, name
        files.mark_deleted(bench.db, getattr(batch, name))
        with pytest.raises(ValueError, match="not enough values"):
            reusing.blob(batch)


def test_a_late_finalizer_keeps_nothing_of_a_batch_that_has_ended(
    bench: Bench, reusing: Reusing
) -> None:
    batch = reusing.run(lines_of(range(3)))
    found = reusing.blob(batch)
    files.mark_deleted(bench.db, batch.input_file_id)
    late = replace(found, blob_key=answers_key(batch.id, 99))
    assert answers.record(bench.db, late, max_bytes=1 << 30) == [late.blob_key]
    assert answers.list_of_file(bench.db, batch.input_file_id, "files/x") == []


def test_collector_removes_expired_answers_and_leaves_the_others(
    bench: Bench, reusing: Reusing
) -> None:
    old = reusing.blob(reusing.run(lines_of(range(3))))
    bench.clock.advance(0.6 * DAY)
    reusing.run(lines_of(range(3, 6)))
    bench.clock.advance(0.6 * DAY)
    rules = collector.Rules(orphan_seconds=3600)
    assert collector.collect(bench.db, bench.blobs, rules, dry_run=True).expired_answers == 1
    assert bench.blobs.exists(old.blob_key)
    assert collector.collect(bench.db, bench.blobs, rules).expired_answers == 1
    (kept,) = bench.blobs.list_keys("reuse/")
    assert kept != old.blob_key
    reusing.run(lines_of(range(6)))
    assert reusing.num_run == 3


def test_collector_keeps_what_a_plan_and_a_finalizer_wrote_until_their_batch_is_through(
    bench: Bench, reusing: Reusing
) -> None:
    reusing.run(lines_of(range(3)))
    batch = reusing.submit(lines_of(range(6)))
    reusing.plan()
    stray = answers_key(BatchId("batch_gone"), 1)
    bench.blobs.put(stray, b"x")
    before = set(bench.blobs.list_keys())
    bench.clock.advance(0.5 * DAY)
    collector.collect(bench.db, bench.blobs, collector.Rules(orphan_seconds=3600))
    assert before - set(bench.blobs.list_keys()) == {stray}
    with Worker(bench, ScriptedEngine()) as worker:
        worker.result()
    ended = bench.finalize(reusing.cache)
    bench.clock.advance(2 * DAY)
    for _ in range(2):
        collector.collect(bench.db, bench.blobs, collector.Rules(orphan_seconds=3600))
    left = [key.partition("/")[0] for key in bench.blobs.list_keys()]
    assert set(left) == {"files", "outputs"}
    assert audit(bench.db, bench.blobs, ended.id).violated == ()
    assert batch.id == ended.id


def test_the_oldest_answers_of_a_tenant_make_way(bench: Bench, reusing: Reusing) -> None:
    size = reusing.blob(reusing.run(lines_of(range(4)), tenant_id="default")).num_bytes
    reusing.run(lines_of(range(4)), tenant_id="other")
    reusing.cache = replace(reusing.cache, max_bytes=2 * size + size // 2)
    for first in (10, 20):
        bench.clock.advance(60)
        reusing.run(lines_of(range(first, first + 4)))
    assert len(list(bench.blobs.list_keys("reuse/"))) == 3
    reusing.run(lines_of(range(10, 24)))
    assert sorted(reusing.engine.asked) == [f"hello {n}" for n in range(14, 20)]
    reusing.run(lines_of(range(4)), tenant_id="other")
    assert reusing.num_run == 0


def test_a_batch_gives_no_more_than_there_is_room_for(bench: Bench, reusing: Reusing) -> None:
    size = reusing.blob(reusing.run(lines_of(range(4)))).num_bytes
    reusing.cache = replace(reusing.cache, max_bytes=size)
    reusing.run(lines_of(range(10, 30)))
    with bench.db.read() as tx:
        rows = tx.execute(sa.select(answers_table)).mappings().all()
    assert [0 < row["num_bytes"] <= size for row in rows] == [True]
    reusing.run(lines_of(range(10, 30)))
    assert 0 < 20 - reusing.num_run <= 5


# --- keys ---


def key_of(
    request: Request | None = None, *, tenant_id: str = "default", identity: str = "a/b"
) -> bytes:
    keys = Keys(TenantId(tenant_id))
    keys.add(msgspec.msgpack.encode(request or make_request(0)), identity)
    return keys.key_of(0)


def test_a_key_is_of_everything_that_decides_an_answer() -> None:
    base = make_request(0)
    params: dict[str, Any] = {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 1,
        "stop": ("x",),
        "ignore_eos": True,
        "n": 2,
        "logprobs": 0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "min_p": 0.5,
        "min_tokens": 2,
        "logit_bias": ((3, 1.0),),
        "stop_token_ids": (3,),
        "bad_words": ("x",),
    }
    found = {
        key_of(),
        key_of(tenant_id="other"),
        key_of(identity="a/c"),
        key_of(identity="a2/b"),
        key_of(make_request(0, "hello ")),
        key_of(Request(id=0, messages=(Message("system", "hello"),))),
        key_of(Request(id=0, messages=(Message("user", "hello", "me"),))),
        key_of(Request(id=0, prompt="hello")),
        key_of(Request(id=0, prompt=(1, 2))),
        key_of(Request(id=0, prompt=(1, 3))),
        *(key_of(make_request(0, **{name: value})) for name, value in params.items()),
        *(
            key_of(msgspec.structs.replace(base, constraint=Constraint(*spec)))
            for spec in (("json_object", ""), ("json_schema", "{}"), ("regex", "{}"))
        ),
    }
    assert len(found) == 10 + len(SamplingParams.__struct_fields__) + 3
    assert key_of() == key_of(make_request(0))


def test_a_line_without_a_key_is_nobodys_equal() -> None:
    keys = Keys(TenantId("t"))
    keys.add(None, "a")
    keys.add(b"x", "")
    assert bytes(keys.content) == bytes(32)


def test_completed_and_reused_requests_are_counted(reusing: Reusing) -> None:
    reusing.run(lines_of(range(3)))
    before = counted()
    reusing.run(lines_of(range(5)))
    after = counted()
    assert (after[0] - before[0], after[1] - before[1]) == (5, 3)


def counted() -> tuple[float, float]:
    text = metrics.render().decode()
    numbers = [0.0, 0.0]
    for line in text.splitlines():
        if line.startswith('batchctl_requests_total{model="simulated",outcome="completed"}'):
            numbers[0] = float(line.split()[-1])
        if line.startswith('batchctl_reused_requests_total{model="simulated"}'):
            numbers[1] = float(line.split()[-1])
    return numbers[0], numbers[1]
