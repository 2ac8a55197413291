"""What can be known of the containers without Docker: nothing is loose, open or without a check."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.testing
import yaml

from jobs import fields
from jobs.aliases import ALIASES
from jobs.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
ENV_TEXT = (ROOT / ".env.example").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()

ONE_SHOT = {"migrate"}
OURS = {name for name, service in SERVICES.items() if "build" in service}
ENV = dict(
    line.split("=", 1) for line in ENV_TEXT.splitlines() if line and not line.startswith("#")
)
USED = re.findall(r"\$\{([A-Z0-9_]+)(:-|:\?)?([^}]*)\}", COMPOSE_TEXT)


def environment(service: str) -> dict[str, str]:
    found: dict[str, str] = SERVICES[service].get("environment", {})
    return found


def test_the_file_has_the_whole_system() -> None:
    assert set(SERVICES) == {
        *("postgres", "valkey", "s3", "migrate", "api", "control", "engine", "engine-gpu")
    }
    assert {"migrate", "api", "control", "engine", "engine-gpu"} == OURS


def test_every_variable_is_explained_and_every_explained_one_is_used() -> None:
    assert {name for name, _, _ in USED} == set(ENV)


def test_secrets_have_no_default_and_are_asked_for() -> None:
    secret = {name for name in ENV if re.search("PASSWORD|KEY$", name)}
    assert secret == {
        *("BATCHCTL_API_KEY", "POSTGRES_PASSWORD", "VALKEY_PASSWORD"),
        *("S3_ACCESS_KEY", "S3_SECRET_KEY"),
    }
    for name, how, text in USED:
        if name in secret:
            assert how == ":?", f"{name} is not asked for"
            assert name in text
        else:
            assert how == ":-", f"{name} has no default"
    assert all(ENV[name] == "" for name in secret), "an example is a password that somebody keeps"


def test_defaults_are_those_of_the_example() -> None:
    for name, how, text in USED:
        if how == ":-":
            assert text == ENV[name].strip("'"), name


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_images_are_pinned_to_a_version(service: str) -> None:
    image = SERVICES[service]["image"]
    if service in OURS:
        assert re.fullmatch(r"batchctl-[a-z0-9]+", image)
        return
    assert re.fullmatch(r"[a-z0-9/]+:\d+\.\d+(\.\d+)?(-trixie)?", image), image


def test_base_images_are_pinned_to_a_version() -> None:
    bases = re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.search(r":v?\d+\.\d+\.\d+", base) for base in bases), bases
    arguments = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert set(arguments) == {"${PYTHON_IMAGE}", "${VLLM_IMAGE}", "base"}


def test_the_vllm_image_is_a_version_that_we_support() -> None:
    found = re.search(r"vllm-openai:v(\d+)\.(\d+)", DOCKERFILE)
    assert found is not None
    assert (0, 32) <= tuple(map(int, found.groups())) < (0, 34)


@pytest.mark.parametrize("service", sorted(set(SERVICES) - ONE_SHOT))
def test_services_have_a_health_check_and_start_again(service: str) -> None:
    found = SERVICES[service]
    health = found["healthcheck"]
    assert health["test"][0] in {"CMD", "CMD-SHELL"}
    assert {"interval", "timeout", "retries", "start_period"} <= set(health)
    assert found["restart"] == "unless-stopped"


def test_the_migration_runs_once_and_before_everybody() -> None:
    assert SERVICES["migrate"]["restart"] == "no"
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for service in OURS - ONE_SHOT:
        conditions = {
            name: one["condition"] for name, one in SERVICES[service]["depends_on"].items()
        }
        assert conditions == {
            "migrate": "service_completed_successfully",
            "postgres": "service_healthy",
            "valkey": "service_healthy",
            "s3": "service_healthy",
        }


def test_only_the_api_is_published_and_on_loopback_by_default() -> None:
    published = {name: one["ports"] for name, one in SERVICES.items() if "ports" in one}
    assert published == {"api": ["${API_ADDRESS:-127.0.0.1}:${API_PORT:-8000}:8000"]}
    assert not [name for name, one in SERVICES.items() if "network_mode" in one]


@pytest.mark.parametrize("service", sorted(OURS))
def test_our_containers_have_time_to_drain_and_no_privileges(service: str) -> None:
    found = SERVICES[service]
    assert found["stop_grace_period"] == "90s"
    assert found["init"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in found


@pytest.mark.parametrize("stage", ["api", "hf", "vllm"])
def test_images_end_as_a_user_that_is_not_root(stage: str) -> None:
    lines = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    text = next(one for one in lines if one.splitlines()[0].endswith(f" AS {stage}"))
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users[-1] == "batchctl"
    assert 'ENTRYPOINT ["batchctl"]' in text


def test_services_use_stages_that_there_are() -> None:
    stages = set(re.findall(r" AS (\w+)$", DOCKERFILE, re.MULTILINE))
    targets = {name: SERVICES[name]["build"]["target"] for name in OURS}
    assert set(targets.values()) == {"api", "hf", "vllm"}
    assert set(targets.values()) <= stages
    assert {targets[name] for name in ("migrate", "api", "control")} == {"api"}, "no torch there"


@pytest.mark.parametrize("service", sorted(OURS))
def test_settings_of_containers_are_settings(service: str) -> None:
    aliases = {alias.name for alias in ALIASES}
    for name in set(environment(service)) - aliases:
        path = tuple(name.removeprefix(PREFIX).lower().split("__"))
        assert fields.annotation_at(Settings, path) is not None, name
    assert environment(service)["BATCHCTL_BLOBS__KIND"] == "s3"


@pytest.mark.parametrize("service", sorted(OURS))
def test_commands_of_containers_are_commands(service: str) -> None:
    from jobs.cli.main import app  # noqa: PLC0415  it sets up the command line

    command = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in SERVICES[service]["command"]]
    asked = typer.testing.CliRunner().invoke(app, [*command, "--help"])
    assert asked.exit_code == 0, asked.output
    options = {word for word in command if word.startswith("--")}
    shown = re.sub(r"\x1b\[[0-9;]*m", "", asked.output)
    assert all(option in shown for option in options)


def test_databases_keep_their_data() -> None:
    mounts = {
        name: [mount.split(":") for mount in SERVICES[name]["volumes"]]
        for name in ("postgres", "valkey", "s3")
    }
    # As of version 18 the volume of this image is the parent of the data folder.
    assert mounts["postgres"] == [["postgres", "/var/lib/postgresql"]]
    assert mounts["valkey"] == [["valkey", "/data"]]
    assert mounts["s3"] == [["s3", "/data"]]
    assert set(COMPOSE["volumes"]) == {"postgres", "valkey", "s3", "weights"}


def test_the_broker_keeps_its_queues_and_evicts_nothing() -> None:
    words = " ".join(SERVICES["valkey"]["command"])
    assert "--appendonly yes" in words
    assert "--maxmemory-policy noeviction" in words
    assert "--requirepass" in words


def test_gpus_are_asked_for_in_their_profile_only() -> None:
    gpu = SERVICES["engine-gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert gpu["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    ]
    assert "shm_size" in gpu
    assert gpu["healthcheck"]["start_period"] == "10m"
    assert gpu["volumes"] == ["weights:/cache"]
    assert environment("engine-gpu")["HF_HOME"] == "/cache"
    others = [name for name, one in SERVICES.items() if name != "engine-gpu" and "deploy" in one]
    assert others == []


def test_the_build_context_has_what_the_dockerfile_copies_and_nothing_secret() -> None:
    kept = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = {
        word
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == set(kept)
    assert all((ROOT / name).exists() for name in kept)
    assert ".env" not in kept
