import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from jobs.domain.errors import NotFound
from jobs.domain.ids import WorkerId
from storage import models, workers
from storage.models import Model, Rival
from storage.workers import Worker
from tests.conformance.storage.bench import START, Bench


def test_a_model_is_published_in_place_of_its_older_self(bench: Bench) -> None:
    model = Model(
        name="demo", fingerprint="a", capabilities={"n": [1]}, published_at=bench.clock.now
    )
    models.upsert(bench.db, model)
    models.upsert(bench.db, replace(model, fingerprint="b"))
    assert models.get(bench.db, "demo") == replace(model, fingerprint="b")
    assert len(models.list_all(bench.db)) == 1
    for name in ("x", "demo\0"):
        with pytest.raises(NotFound, match="does not exist"):
            models.get(bench.db, name)


def add_worker(bench: Bench, name: str, **changes: Any) -> Worker:  # noqa: ANN401  its fields
    worker = Worker(
        id=WorkerId(name),
        boot_id="b",
        started_at=bench.clock.now,
        heartbeat_at=bench.clock.now,
        **changes,
    )
    workers.heartbeat(bench.db, worker)
    return worker


def publish(bench: Bench, worker: Worker, fingerprint: str) -> Rival | None:
    model = Model(
        name="demo",
        fingerprint=fingerprint,
        capabilities={},
        published_at=bench.clock.now,
        published_by=worker.id,
    )
    return models.publish(bench.db, model, alive_since=bench.clock.now - timedelta(seconds=15))


def test_a_worker_whose_model_differs_from_a_live_one_learns_which(bench: Bench) -> None:
    first = add_worker(bench, "worker_a", host="here", models=("demo",))
    second = add_worker(bench, "worker_b")
    assert publish(bench, first, "one") is None
    assert publish(bench, second, "two") == Rival(
        worker_id=first.id, host="here", fingerprint="one"
    )
    assert models.get(bench.db, "demo").fingerprint == "one"
    assert publish(bench, second, "one") is None
    assert models.get(bench.db, "demo").published_by == second.id


def test_a_model_just_published_counts_as_served_before_the_next_heartbeat(bench: Bench) -> None:
    first, second = add_worker(bench, "worker_a"), add_worker(bench, "worker_b")
    assert publish(bench, first, "one") is None
    rival = publish(bench, second, "two")
    assert rival is not None
    assert rival.worker_id == first.id


def test_a_worker_may_change_its_own_model(bench: Bench) -> None:
    only = add_worker(bench, "worker_a", models=("demo",))
    assert publish(bench, only, "one") is None
    assert publish(bench, only, "two") is None
    assert models.get(bench.db, "demo").fingerprint == "two"


def test_a_model_of_dead_workers_is_replaced(bench: Bench) -> None:
    dead = add_worker(bench, "worker_a", models=("demo",))
    assert publish(bench, dead, "one") is None
    bench.clock.advance(16)
    assert publish(bench, add_worker(bench, "worker_b"), "two") is None
    assert models.get(bench.db, "demo").fingerprint == "two"


def test_of_two_workers_that_publish_different_models_at_once_one_is_refused(
    bench: Bench,
) -> None:
    both = [add_worker(bench, f"worker_{number}") for number in range(2)]
    barrier = threading.Barrier(2)

    def start(number: int) -> Rival | None:
        barrier.wait()
        return publish(bench, both[number], f"fingerprint {number}")

    with ThreadPoolExecutor(2) as pool:
        rivals = list(pool.map(start, range(2)))
    assert [rival is None for rival in rivals].count(True) == 1
    winner = next(number for number, rival in enumerate(rivals) if rival is None)
    assert models.get(bench.db, "demo").fingerprint == f"fingerprint {winner}"


def test_workers_that_were_silent_for_long_are_forgotten(bench: Bench) -> None:
    add_worker(bench, "worker_a")
    bench.clock.advance(10)
    later = add_worker(bench, "worker_b")
    assert workers.remove_silent(bench.db, before=later.heartbeat_at) == 1
    assert workers.list_recent(bench.db, since=START) == [later]


def test_a_worker_is_seen_while_its_heart_beats(bench: Bench) -> None:
    start = bench.clock.now
    worker = add_worker(bench, "worker_a", host="here", pid=7, role="control", gpu="cpu")
    later = replace(
        worker,
        heartbeat_at=start + timedelta(seconds=10),
        state="working",
        models=("demo", "other"),
        model_key="demo",
        num_shards=2,
        tokens_per_second=12.5,
        draining=True,
    )
    workers.heartbeat(bench.db, later)
    assert workers.list_recent(bench.db, since=start + timedelta(seconds=5)) == [later]
    assert workers.list_recent(bench.db, since=start + timedelta(seconds=11)) == []
    workers.remove(bench.db, worker.id)
    assert workers.list_recent(bench.db, since=start) == []
