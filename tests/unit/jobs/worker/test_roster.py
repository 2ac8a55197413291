import sys
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from engine.devices import Device
from jobs.domain.errors import EngineMisconfigured, InvalidInput
from jobs.settings import Settings, load
from jobs.worker.launcher import Command
from jobs.worker.roster import plan_commands


def settings_with(**worker: Any) -> Settings:  # noqa: ANN401
    broker = worker.pop("broker", {"url": "redis://127.0.0.1/0"})
    models = worker.pop("models_known", {})
    database = worker.pop("database", {"url": "postgresql://u@h/d"})
    return Settings.model_validate(
        {"worker": worker, "broker": broker, "models": models, "database": database}
    )


def machine(num_gpus: int) -> list[Device]:
    return [
        Device(index=n, uuid=f"GPU-{n}{n}{n}", name="NVIDIA H100", total_bytes=80, free_bytes=80)
        for n in range(num_gpus)
    ]


def vllm(*, tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    return {"engine": "vllm", "source": "/models/x", "options": sizes}


@pytest.fixture(autouse=True)
def _vllm_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the machine look as if vLLM was installed, which only its presence is asked of."""
    for name in ("vllm", "torch"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")


def plan(settings: Settings, num_gpus: int = 0) -> list[Command]:
    return plan_commands(settings, found=machine(num_gpus), host="box")


def seen(commands: list[Command]) -> list[tuple[str, str]]:
    return [(one.name, one.environment["CUDA_VISIBLE_DEVICES"]) for one in commands]


@pytest.mark.parametrize(
    ("worker", "num_gpus", "processes"),
    [
        ({}, 2, [("engine-0", "GPU-000"), ("engine-1", "GPU-111"), ("control", "")]),
        ({"gpus": "1"}, 2, [("engine-0", "GPU-111"), ("control", "")]),
        ({"gpus": "none"}, 2, [("engine-0", ""), ("control", "")]),
        ({"engines": 2, "role": "engine"}, 0, [("engine-0", ""), ("engine-1", "")]),
        ({"role": "control"}, 2, [("control", "")]),
        ({"role": "control", "gpus": "5"}, 2, [("control", "")]),
    ],
)
def test_a_machine_runs_an_engine_on_each_gpu_and_one_control_worker(
    worker: dict[str, Any], num_gpus: int, processes: list[tuple[str, str]]
) -> None:
    assert seen(plan(settings_with(**worker), num_gpus)) == processes


def test_gpus_are_grouped_by_the_largest_model_and_the_rest_is_named() -> None:
    known = {"big": vllm(tensor=2), "small": vllm()}
    with capture_logs() as logs:
        commands = plan(settings_with(role="engine", models_known=known), 5)
    assert seen(commands) == [("engine-0", "GPU-000,GPU-111"), ("engine-1", "GPU-222,GPU-333")]
    assert {entry["event"]: entry for entry in logs}["gpus_left_over"]["gpus"] == "4"
    assert (
        "small" in {entry["event"]: entry for entry in logs}["groups_larger_than_needed"]["models"]
    )


def test_a_model_that_was_asked_for_and_needs_more_gpus_is_refused_with_the_reason() -> None:
    known = {"big": vllm(tensor=2, pipeline=2)}
    with pytest.raises(EngineMisconfigured, match="big needs 4 GPUs"):
        plan(settings_with(models=["big"], models_known=known), 3)


def test_a_model_of_the_catalogue_that_needs_more_gpus_is_left_out() -> None:
    with capture_logs() as logs:
        commands = plan(settings_with(models_known={"big": vllm(tensor=4)}), 1)
    assert served(commands[0]) == ("demo", "simulated")
    said = [entry["model"] for entry in logs if entry["event"] == "model_not_served"]
    assert said == ["big"]


def served(command: Command) -> tuple[str, ...]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in command.environment.items():
            patch.setenv(name, value)
        return load().worker.models


def test_parallel_models_run_on_the_cpu_of_a_machine_without_gpus() -> None:
    assert len(plan(settings_with(models=["big"], models_known={"big": vllm(tensor=4)}))) == 2


def test_processes_go_by_what_the_command_was_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "batchctl.toml"
    file.write_text('[worker]\nrole = "all"\nmodels = ["demo"]\nmetrics_port = 9000\n')
    flags = {"data": str(tmp_path / "d"), "worker__models": ["simulated"]}
    monkeypatch.setenv("BATCHCTL_DATABASE__URL", "postgresql://u@h/d")
    commands = plan_commands(
        load(file, **flags), found=machine(1), host="box", config=file, flags=flags
    )
    found = []
    for command in commands:
        with monkeypatch.context() as patch:
            for name, value in command.environment.items():
                patch.setenv(name, value)
            found.append(load())
    assert [one.worker.role for one in found] == ["engine", "control"]
    assert [one.worker.models for one in found] == [("simulated",)] * 2
    assert [one.worker.metrics_port for one in found] == [9000, 9001]
    assert {one.data for one in found} == {tmp_path / "d"}
    assert {command.device for command in commands} == {"cuda:0 NVIDIA H100 (GPU-000)", "cpu"}


def test_workers_of_a_broker_are_celerys_and_without_one_they_poll() -> None:
    with_broker = plan(settings_with())[0].arguments
    assert with_broker[:5] == (sys.executable, "-m", "celery", "-A", "jobs.worker.celery_app")
    assert any(word.startswith("engine-0-") and word.endswith("@box") for word in with_broker)
    without = plan(settings_with(broker={}))[0].arguments
    assert without == (sys.executable, "-m", "jobs.worker.process")


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        ({"models": ["dmo"]}, "Did you mean 'demo'"),
        ({"gpus": "2"}, "There is no GPU 2"),
        ({"database": {}}, "Workers need a Postgres"),
        ({"database": {"url": "sqlite:////tmp/x.db"}}, "Workers need a Postgres"),
    ],
)
def test_what_a_machine_cannot_do_is_one_sentence(worker: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as refused:
        plan(settings_with(**worker), 1)
    assert refused.value.param == "settings"


def test_metrics_ports_that_there_are_not_are_refused() -> None:
    assert len(plan(settings_with(metrics_port=65533), num_gpus=2)) == 3
    with pytest.raises(InvalidInput, match="65533 is the last") as refused:
        plan(settings_with(metrics_port=65534), num_gpus=2)
    assert "\n" not in refused.value.message
