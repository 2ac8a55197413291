from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from jobs.app import App, open_app
from jobs.domain.errors import EngineMisconfigured, NotFound
from jobs.domain.ids import WorkerId
from jobs.domain.request import Capabilities
from jobs.model_settings import ModelSettings
from jobs.settings import Settings
from jobs.worker import capabilities
from storage import models, workers
from storage.config import DatabaseSettings
from storage.workers import Worker

HERE, THERE = WorkerId("worker_here"), WorkerId("worker_there")


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@contextmanager
def node(url: str, folder: Path, entries: dict[str, ModelSettings]) -> Iterator[App]:
    """Open what a machine with these models in its catalogue works with."""
    settings = Settings(
        data=folder, database=DatabaseSettings.model_validate({"url": url}), models=entries
    )
    with open_app(settings, folder=folder / "server") as app:
        yield app


def simulated(**options: int) -> ModelSettings:
    return ModelSettings(engine="simulated", options=options)


def beat(app: App, worker_id: WorkerId, *names: str, seconds_ago: float = 0) -> None:
    at = app.db.now() - timedelta(seconds=seconds_ago)
    workers.heartbeat(
        app.db,
        Worker(id=worker_id, boot_id="b", host="box", started_at=at, heartbeat_at=at, models=names),
    )


def test_what_a_worker_published_can_be_read_back(database: str, tmp_path: Path) -> None:
    with node(database, tmp_path, {"m": simulated(slots=5)}) as app:
        beat(app, HERE)
        assert capabilities.publish(app, ["m", "demo"], worker_id=HERE) == ("m", "demo")
        row = models.get(app.db, "m")
        assert (row.published_by, row.capabilities["num_slots"]) == (HERE, 5)
        assert msgspec.convert(row.capabilities, Capabilities) == app.describe("m")
        demo = msgspec.convert(models.get(app.db, "demo").capabilities, Capabilities)
        assert demo.tokenizer_hash
        assert demo == app.describe("demo")


def test_a_model_that_is_another_than_a_live_worker_serves_is_refused_and_the_rest_served(
    database: str, tmp_path: Path
) -> None:
    with node(database, tmp_path, {"m": simulated(slots=5), "n": simulated()}) as app:
        beat(app, THERE, "m")
        capabilities.publish(app, ["m"], worker_id=THERE)
        first = models.get(app.db, "m").fingerprint
    with (
        node(database, tmp_path, {"m": simulated(slots=6), "n": simulated()}) as app,
        capture_logs() as logs,
    ):
        beat(app, HERE)
        assert capabilities.publish(app, ["m", "n"], worker_id=HERE) == ("n",)
        assert models.get(app.db, "m").fingerprint == first
        [said] = [entry for entry in logs if entry["event"] == "model_refused"]
        assert said["other_worker"] == THERE
        assert (said["other_host"], said["other_fingerprint"]) == ("box", first)
        assert said["fingerprint"] != first
        logs.clear()
        assert capabilities.publish(app, ["m"], worker_id=HERE, say=False) == ()
        assert logs == []


def test_a_model_of_a_worker_that_was_lost_is_replaced(database: str, tmp_path: Path) -> None:
    with node(database, tmp_path, {"m": simulated(slots=5)}) as app:
        beat(app, THERE, "m", seconds_ago=60)
        capabilities.publish(app, ["m"], worker_id=THERE)
    with node(database, tmp_path, {"m": simulated(slots=6)}) as app:
        beat(app, HERE)
        assert capabilities.publish(app, ["m"], worker_id=HERE) == ("m",)
        assert models.get(app.db, "m").capabilities["num_slots"] == 6


def test_a_model_whose_files_are_not_here_is_left_out(database: str, tmp_path: Path) -> None:
    entries = {"gone": ModelSettings(engine="hf", source=str(tmp_path / "gone"))}
    with node(database, tmp_path, entries) as app, capture_logs() as logs:
        beat(app, HERE)
        assert capabilities.publish(app, ["gone", "simulated"], worker_id=HERE) == ("simulated",)
        said = [entry["model"] for entry in logs if entry["event"] == "model_not_served"]
        assert said == ["gone"]


def test_what_a_loaded_engine_knows_besides_is_published_too(database: str, tmp_path: Path) -> None:
    with node(database, tmp_path, {"m": simulated()}) as app:
        beat(app, HERE)
        capabilities.publish(app, ["m"], worker_id=HERE)
        loaded = msgspec.structs.replace(app.describe("m"), cache_tokens=4096)
        assert capabilities.publish_loaded(app, loaded, worker_id=HERE)
        assert models.get(app.db, "m").capabilities["cache_tokens"] == 4096


def test_a_node_without_a_model_plans_with_what_a_worker_published(
    postgres_url: str, tmp_path: Path
) -> None:
    with node(
        postgres_url, tmp_path, {"m": ModelSettings(engine="simulated", context_tokens=77)}
    ) as app:
        beat(app, HERE)
        capabilities.publish(app, ["m"], worker_id=HERE)
    with node(postgres_url, tmp_path, {}) as app:
        assert app.describe("m").context_tokens == 77
        with pytest.raises(NotFound, match="'other' does not exist"):
            app.describe("other")
    entries = {
        "m": ModelSettings(engine="hf", source=str(tmp_path / "gone")),
        "n": ModelSettings(engine="hf", source=str(tmp_path / "gone")),
    }
    with node(postgres_url, tmp_path, entries) as app:
        assert app.describe("m").context_tokens == 77
        with pytest.raises(EngineMisconfigured, match="There is no folder"):
            app.describe("n")


def test_what_a_newer_worker_says_besides_is_passed_over(postgres_url: str, tmp_path: Path) -> None:
    with node(postgres_url, tmp_path, {"m": simulated()}) as app:
        beat(app, HERE)
        capabilities.publish(app, ["m"], worker_id=HERE)
        row = models.get(app.db, "m")
        newer = {**row.capabilities, "speaks": ["klingon"]}
        models.upsert(app.db, replace(row, capabilities=newer))
        assert app.describe("m").model == "m"
