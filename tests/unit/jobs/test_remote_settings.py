"""Which server the names of the field mean, and to whom a key is sent."""

# ruff: noqa: ANN401, FBT001 - what a test changes is whatever field there is

import os
from pathlib import Path
from typing import Any

import pytest

from engine.config import RemoteConfig
from jobs import settings
from jobs.aliases import ALIASES
from jobs.domain.errors import InvalidInput
from jobs.settings import load, resolve_model

HERE = "http://127.0.0.1:8000/v1"
VLLM = "http://127.0.0.1:8001"
FAR = "http://10.1.2.3:8000/v1"
CLOUD = "https://api.example.com/v1"
OPENAI = "https://api.openai.com/v1"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ours = {alias.name for alias in ALIASES}
    for name in dict(os.environ):
        if name in ours or name.upper().startswith(settings.PREFIX):
            monkeypatch.delenv(name)


def config_of(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    *,
    model: str = "demo",
    **flags: Any,
) -> RemoteConfig:
    """Return what an engine would be started with in this environment."""
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    _, entry = resolve_model(load(**flags), model, engine="remote")
    config = entry.to_engine_config()
    assert isinstance(config, RemoteConfig)
    return config


BOTH = {
    "VLLM_REMOTE_URL": VLLM,
    "VLLM_REMOTE_API_KEY": "vllm-key",
    "VLLM_REMOTE_TIMEOUT": "77",
    "REMOTE_OPENAI_URL": CLOUD,
    "REMOTE_OPENAI_MODEL": "their-model",
    "OPENAI_API_KEY": "openai-key",
}


def test_backend_decides_between_two_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(monkeypatch, {**BOTH, "LLM_BACKEND": "vllm_remote"})
    assert (config.url, config.api_key, config.served_model) == (VLLM, "vllm-key", None)
    assert (config.native_constraints, config.timeout_seconds) == ("vllm", 77)
    config = config_of(monkeypatch, {**BOTH, "LLM_BACKEND": "remote_openai"})
    assert (config.url, config.api_key, config.served_model) == (CLOUD, "openai-key", "their-model")
    assert (config.native_constraints, config.timeout_seconds) == ("openai", 600)


def test_backend_chooses_the_remote_engine_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_BACKEND", "vllm_remote")
    monkeypatch.setenv("VLLM_REMOTE_URL", VLLM)
    name, entry = resolve_model(load())
    assert (name, entry.engine, entry.url) == ("demo", "remote", VLLM)


def test_url_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(monkeypatch, {"REMOTE_OPENAI_URL": HERE})
    assert (config.url, config.api_key, config.native_constraints) == (HERE, None, "openai")


def test_only_url_there_is_wins_over_the_backends_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(
        monkeypatch,
        {"LLM_BACKEND": "vllm_remote", "REMOTE_OPENAI_URL": HERE, "OPENAI_API_KEY": "k"},
    )
    assert (config.url, config.api_key, config.native_constraints) == (HERE, "k", "vllm")


def test_vllm_server_is_spoken_to_in_its_words_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert config_of(monkeypatch, {"VLLM_REMOTE_URL": VLLM}).native_constraints == "vllm"
    monkeypatch.setenv("BATCHCTL_REMOTE__NATIVE_CONSTRAINTS", "none")
    assert config_of(monkeypatch, {}).native_constraints == "none"


def test_key_of_one_server_is_not_sent_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "VLLM_REMOTE_URL": VLLM,
        "VLLM_REMOTE_API_KEY": "vllm-key",
        "REMOTE_OPENAI_URL": HERE,
    }
    assert config_of(monkeypatch, variables).api_key is None
    monkeypatch.setenv("BATCHCTL_REMOTE__URL", CLOUD)
    config = config_of(monkeypatch, {"REMOTE_OPENAI_API_KEY": "openai-key"})
    assert (config.url, config.api_key, config.native_constraints) == (CLOUD, None, "openai")


@pytest.mark.parametrize(
    ("url", "is_sent"), [(HERE, True), ("http://[::1]:1/", True), (CLOUD, True), (FAR, False)]
)
def test_openai_key_goes_only_where_nobody_can_read_it(
    monkeypatch: pytest.MonkeyPatch, url: str, is_sent: bool
) -> None:
    config = config_of(monkeypatch, {"REMOTE_OPENAI_URL": url, "OPENAI_API_KEY": "openai-key"})
    assert config.api_key == ("openai-key" if is_sent else None)
    # Told explicitly, it goes anywhere.
    config = config_of(monkeypatch, {"REMOTE_OPENAI_API_KEY": "told"})
    assert config.api_key == "told"


def test_openai_key_is_kept_from_a_url_of_the_settings_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(monkeypatch, {"OPENAI_API_KEY": "key"}, remote={"url": FAR})
    assert (config.url, config.api_key) == (FAR, None)


@pytest.mark.parametrize(
    ("shared", "own", "is_sent"),
    [
        (CLOUD, None, True),
        (CLOUD, "https://api.example.com/other/v1", True),
        (CLOUD, "https://api.example.org/v1", False),
        (CLOUD, "http://api.example.com/v1", False),
        (None, CLOUD, False),
        (None, HERE, False),
        (None, FAR, False),
        (None, OPENAI, True),
        (None, "http://api.openai.com/v1", False),
        (None, "https://api.openai.com@example.com/v1", False),
        (CLOUD, OPENAI, False),
    ],
)
def test_shared_key_is_for_the_shared_server(
    monkeypatch: pytest.MonkeyPatch, shared: str | None, own: str | None, is_sent: bool
) -> None:
    remote = {"api_key": "shared-key", **({"url": shared} if shared else {})}
    models = {"far": {"engine": "remote", **({"url": own} if own else {})}}
    config = config_of(monkeypatch, {}, model="far", remote=remote, models=models)
    assert config.api_key == ("shared-key" if is_sent else None)
    models["far"]["api_key"] = "own-key"
    config = config_of(monkeypatch, {}, model="far", remote=remote, models=models)
    assert config.api_key == "own-key"


@pytest.mark.parametrize(
    ("name", "own", "is_sent"),
    [
        ("OPENAI_API_KEY", CLOUD, False),
        ("OPENAI_API_KEY", OPENAI, True),
        ("REMOTE_OPENAI_API_KEY", CLOUD, False),
        ("VLLM_REMOTE_API_KEY", CLOUD, False),
        ("VLLM_REMOTE_API_KEY", OPENAI, False),
    ],
)
def test_key_of_the_environment_goes_to_no_server_that_only_a_model_names(
    monkeypatch: pytest.MonkeyPatch, name: str, own: str, is_sent: bool
) -> None:
    models = {"far": {"url": own}}
    config = config_of(monkeypatch, {name: "ambient"}, model="far", models=models)
    assert config.api_key == ("ambient" if is_sent else None)


def test_server_may_know_any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_OPENAI_URL", HERE)
    loaded = load(engine="remote", models={"m": {"engine": "remote", "served_model": "org/theirs"}})
    for asked, served in (("some/model-name", None), ("m", "org/theirs")):
        name, entry = resolve_model(loaded, asked)
        config = entry.to_engine_config()
        assert isinstance(config, RemoteConfig)
        assert (name, config.served_model) == (asked, served)


def test_remote_engine_without_a_url_says_what_to_set() -> None:
    with pytest.raises(InvalidInput, match=r"needs the url of a server: set `remote.url`"):
        resolve_model(load(), "demo", engine="remote")


def test_url_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_OPENAI_URL", "localhost:8000")
    with pytest.raises(InvalidInput, match="should be the URL of a server"):
        resolve_model(load(), "demo", engine="remote")


def test_workers_share_limits_where_there_is_a_broker() -> None:
    assert load().limiter is None
    loaded = load(
        broker={"url": "redis://127.0.0.1:6379/2", "prefix": "mine"},
        remote={"url": HERE, "requests_per_minute": 60, "patience_seconds": 5},
    )
    _, entry = resolve_model(loaded, "demo", engine="remote")
    config = entry.to_engine_config(limiter=loaded.limiter)
    assert isinstance(config, RemoteConfig)
    assert config.limiter_url == "redis://127.0.0.1:6379/2"
    assert (config.limiter_prefix, config.limiter_master) == ("mine", "mymaster")
    assert (config.requests_per_minute, config.patience_seconds) == (60, 5)
    assert "redis://" not in repr(config)
