import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.config import HfConfig, SimulatedConfig
from engine.demo import model_path
from jobs import settings
from jobs.aliases import ALIASES
from jobs.domain.errors import EngineMisconfigured, InvalidInput, NotFound
from jobs.model_settings import ModelSettings
from jobs.settings import Settings, load, origins, render_table, resolve_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings from outside: an empty working directory and none of our variables."""
    monkeypatch.chdir(tmp_path)
    ours = {alias.name for alias in ALIASES}
    for name in dict(os.environ):
        if name in ours or name.upper().startswith(settings.PREFIX):
            monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def _origin(loaded: Settings, name: str) -> settings.Origin:
    return next(one for one in origins(loaded) if one.name == name)


def test_layers_beat_each_other_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "hf.device"
    assert (load().hf.device, _origin(load(), name).origin) == ("auto", "default")

    _set(monkeypatch, {"HF_DEVICE": "cpu"})
    assert (load().hf.device, _origin(load(), name).origin) == ("cpu", "env:HF_DEVICE")

    _set(monkeypatch, {"BATCHCTL_HF__DEVICE": "mps"})
    assert (load().hf.device, _origin(load(), name).origin) == ("mps", "env:BATCHCTL_HF__DEVICE")

    Path("batchctl.toml").write_text('[hf]\ndevice = "cuda"\n')
    assert (load().hf.device, _origin(load(), name).origin) == ("cuda", "file:batchctl.toml")

    flagged = load(hf__device="cuda:1")
    assert (flagged.hf.device, _origin(flagged, name).origin) == ("cuda:1", "flag")


def test_layers_are_merged_field_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("batchctl.toml").write_text("[limits]\nmax_lines = 7\n")
    _set(
        monkeypatch, {"BATCHCTL_LIMITS__MAX_LINES": "8", "BATCHCTL_LIMITS__MAX_LINE_BYTES": "2048"}
    )
    limits = load(limits={"max_reported_errors": 9}).limits
    assert (limits.max_lines, limits.max_line_bytes, limits.max_reported_errors) == (7, 2048, 9)


def test_flag_that_was_not_given_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"BATCHCTL_DEFAULT_MODEL": "simulated"})
    assert load(default_model=None).default_model == "simulated"


def test_flags_of_the_command_that_started_a_process_go_before_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = tmp_path / "other.toml"
    named.write_text('[worker]\nrole = "all"\nmodels = ["a"]\nengines = 2\n')
    environment = settings.inherit(
        named, worker__role="control", worker__models=["b"], worker__engines=None, data=None
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    found = load()
    assert (found.worker.role, found.worker.models, found.worker.engines) == ("control", ("b",), 2)
    assert {one.name: one.origin for one in origins(found)}["worker.role"] == "flag"
    assert load(worker__role="engine").worker.role == "engine"


def test_settings_made_directly_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("batchctl.toml").write_text('default_model = "a"\n')
    _set(monkeypatch, {"BATCHCTL_DEFAULT_MODEL": "b"})
    assert Settings().default_model == "demo"


def test_configuration_file_is_named_by_flag_before_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Path("batchctl.toml").write_text('default_model = "here"\n')
    named = tmp_path / "named.toml"
    named.write_text('default_model = "named"\n')
    flagged = tmp_path / "flagged.toml"
    flagged.write_text('default_model = "flagged"\n')
    _set(monkeypatch, {"BATCHCTL_CONFIG": str(named)})
    assert load().default_model == "named"
    assert load(config=flagged).default_model == "flagged"


def test_named_configuration_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"missing\.toml"):
        load(config=tmp_path / "missing.toml")


def test_broken_toml_names_the_file() -> None:
    Path("batchctl.toml").write_text("data = \n")
    with pytest.raises(InvalidInput, match=r"batchctl\.toml is not TOML"):
        load()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BATCHCTL_DATTA", "BATCHCTL_DATA"),
        ("BATCHCTL_LIMTS__MAX_LINES", "BATCHCTL_LIMITS__MAX_LINES"),
        ("BATCHCTL_LIMITS__MAX_LINE", "BATCHCTL_LIMITS__MAX_LINES"),
        ("BATCHCTL_LIMITS_MAX_LINES", "BATCHCTL_LIMITS__MAX_LINES"),
        ("BATCHCTL_CONFIGURATION", "BATCHCTL_CONFIG"),
        ("BATCHCTL_DATA__FOLDER", "BATCHCTL_BLOBS__FOLDER"),
    ],
)
def test_misspelled_variable_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    _set(monkeypatch, {name: "1"})
    with pytest.raises(InvalidInput) as refused:
        load()
    assert name in refused.value.message
    assert f"{meant!r}" in refused.value.message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("datta = 'x'", ("datta", "'data'")),
        ("[limits]\nmax_line = 3", ("limits.max_line ", "'max_lines'")),
        ("[limitz]\nmax_lines = 3", ("limitz", "'limits'")),
        ("[models.x]\nsauce = 'a/b'", ("models.x.sauce", "'source'")),
        ("[models.x]\nsource = 'a/b'\noptions.slot = 3", ("models.x", "'slots'")),
    ],
)
def test_misspelled_toml_key_is_refused_with_a_suggestion(
    text: str, parts: tuple[str, ...]
) -> None:
    Path("batchctl.toml").write_text(text)
    with pytest.raises(InvalidInput) as refused:
        load()
    assert all(part in refused.value.message for part in (*parts, "file:batchctl.toml"))


def test_wrong_value_names_its_source_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"BATCHCTL_LIMITS__MAX_LINES": "plenty"})
    with pytest.raises(InvalidInput) as refused:
        load()
    assert "limits.max_lines (env:BATCHCTL_LIMITS__MAX_LINES)" in refused.value.message
    assert "plenty" not in refused.value.message


@pytest.mark.parametrize(
    ("variables", "name", "value"),
    [
        ({"LLM_BACKEND": "huggingface"}, "engine", "hf"),
        ({"HF_QUANTIZATION": "4bit"}, "hf.quantization", "nf4"),
        ({"HF_LOAD_4BIT": "true"}, "hf.quantization", "nf4"),
        ({"HF_LOAD_4BIT": "0"}, "hf.quantization", "none"),
        ({"HF_LOAD_4BIT": "1", "HF_QUANTIZATION": "none"}, "hf.quantization", "none"),
        ({"HF_FLASH_ATTENTION": "on"}, "hf.flash_attention", "true"),
        ({"HF_HOME": "/models"}, "hf.cache_folder", "/models/hub"),
        ({"HF_TOKEN": ""}, "hf.token", ""),
    ],
)
def test_names_of_the_field_are_understood(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str, value: str
) -> None:
    _set(monkeypatch, variables)
    assert _origin(load(), name).value == value


@pytest.mark.parametrize(
    ("backend", "engine"),
    [("vllm_local", "vllm"), ("vllm_remote", "remote"), ("remote_openai", "remote")],
)
def test_backend_of_another_name_is_an_engine(
    monkeypatch: pytest.MonkeyPatch, backend: str, engine: str
) -> None:
    _set(monkeypatch, {"LLM_BACKEND": backend})
    assert load().engine == engine


def test_unknown_backend_is_refused_with_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(monkeypatch, {"LLM_BACKEND": "triton"})
    with pytest.raises(InvalidInput, match="should be huggingface, vllm_local"):
        load()


def test_secrets_are_masked_wherever_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(
        monkeypatch,
        {
            "HF_TOKEN": "hush-1",
            "BATCHCTL_API_KEY": "hush-2",
            "BATCHCTL_BLOBS__SECRET_KEY": "hush-3",
            "BATCHCTL_DATABASE__URL": "postgresql://me:hush-4@db/jobs",
        },
    )
    loaded = load()
    assert "hush" not in str(origins(loaded))
    assert "hush" not in repr(loaded)
    assert _origin(loaded, "database.url").value == f"postgresql://me:{settings.MASK}@db/jobs"
    assert _origin(loaded, "hf.token") == ("hf.token", settings.MASK, "env:HF_TOKEN")


@pytest.mark.parametrize("url", ["http://host:1/v1", "http://host:1/v1/", "http://host:1/"])
def test_base_url_is_kept_without_version(url: str) -> None:
    assert Settings(base_url=url).base_url == "http://host:1"


def test_fast_profile_gives_the_clocks_that_are_not_set() -> None:
    loaded = load(leases={"timing_profile": "fast", "stall_seconds": 7})
    assert (loaded.leases.lease_seconds, loaded.leases.stall_seconds) == (3, 7)
    assert _origin(loaded, "leases.lease_seconds").origin == "timing_profile:fast"
    assert _origin(loaded, "leases.stall_seconds").origin == "flag"


def test_lease_has_to_outlast_its_renewal() -> None:
    with pytest.raises(InvalidInput, match="half of lease_seconds"):
        load(leases={"lease_seconds": 10, "renew_seconds": 9})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_may_be_served_without_a_key(host: str) -> None:
    load(server__host=host).check_serving()


def test_other_addresses_need_a_key() -> None:
    with pytest.raises(InvalidInput, match="BATCHCTL_API_KEY"):
        load(server__host="0.0.0.0").check_serving()  # noqa: S104  the point of the test
    load(server__host="0.0.0.0", api_key="k").check_serving()  # noqa: S104  the point of the test


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_none(key: str) -> None:
    settings = load(server__host="0.0.0.0", api_key=key)  # noqa: S104  the point of the test
    assert settings.api_key is None
    with pytest.raises(InvalidInput):
        settings.check_serving()


def test_catalogue_lists_the_demo_model_first() -> None:
    models = load(models={"mine": {"source": "a/b"}}).models
    assert list(models) == ["demo", "simulated", "mine"]
    assert models["demo"].source == str(model_path())


def test_built_in_entry_is_changed_field_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"BATCHCTL_MODELS__DEMO__OPTIONS__SLOTS": "4"})
    _, model = resolve_model(load(), "demo", check_installed=False)
    config = model.to_engine_config()
    assert isinstance(config, HfConfig)
    assert (config.model, config.slots) == (str(model_path()), 4)


def test_entry_goes_before_the_settings_of_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"HF_QUANTIZATION": "nf4", "HF_DEVICE": "cpu", "HF_TOKEN": "t"})
    loaded = load(
        models={"a": {"source": "o/a"}, "b": {"source": "o/b", "quantization": "none"}},
    )
    first = resolve_model(loaded, "a", check_installed=False)[1].to_engine_config()
    second = resolve_model(loaded, "b", check_installed=False)[1].to_engine_config()
    assert isinstance(first, HfConfig)
    assert isinstance(second, HfConfig)
    assert (first.quantization, first.device, first.token) == ("nf4", "cpu", "t")
    assert second.quantization == "none"
    third = resolve_model(loaded, "b", quantization="nf4", check_installed=False)[1]
    assert third.quantization == "nf4"


def test_local_folder_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(InvalidInput, match=r"config\.json"):
        resolve_model(Settings(), "mine", check_installed=False)
    (folder / "config.json").write_text("{}")
    name, model = resolve_model(Settings(), "./mine", check_installed=False)
    assert (name, model.source, model.engine) == ("./mine", str(folder), "hf")


def test_hub_id_is_a_model() -> None:
    name, model = resolve_model(Settings(), "owner/model-1B", check_installed=False)
    assert (name, model.source) == ("owner/model-1B", "owner/model-1B")


def test_unknown_model_is_refused_with_a_suggestion() -> None:
    with pytest.raises(NotFound) as refused:
        resolve_model(Settings(), "dmo")
    assert "'demo'?" in refused.value.message
    assert "simulated" in refused.value.message


def test_any_name_runs_on_the_simulated_engine() -> None:
    name, model = resolve_model(Settings(), "gpt-4", engine="simulated")
    config = model.to_engine_config()
    assert name == "gpt-4"
    assert isinstance(config, SimulatedConfig)


def test_simulated_engine_leaves_out_options_of_another_one() -> None:
    loaded = Settings(models={"m": {"source": "a/b", "options": {"slots": 3, "page_tokens": 16}}})
    config = resolve_model(loaded, "m", engine="simulated")[1].to_engine_config()
    assert isinstance(config, SimulatedConfig)
    assert config.slots == 3


def test_engine_of_the_settings_applies_to_models_that_say_auto() -> None:
    loaded = Settings(
        engine="simulated", models={"a": {"source": "o/a"}, "b": {"source": "o/b", "engine": "hf"}}
    )
    engines = [resolve_model(loaded, n, check_installed=False)[1].engine for n in ("a", "b", "o/c")]
    assert engines == ["simulated", "hf", "simulated"]


def test_missing_engine_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineMisconfigured, match=re.escape("pip install 'batchctl[hf]'")):
        resolve_model(Settings(), "demo")
    assert resolve_model(Settings(), "demo", check_installed=False)[1].engine == "hf"
    assert resolve_model(Settings(), "simulated")[1].engine == "simulated"


def test_completed_model_can_be_completed_again() -> None:
    _, model = resolve_model(Settings(), "demo", check_installed=False)
    again = ModelSettings.model_validate(json.loads(model.model_dump_json()))
    assert again == model


def test_readme_shows_the_settings_there_are() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- settings -->\n", 1)[1].split("<!-- /settings -->", 1)[0]
    assert shown.strip() == render_table().strip(), "run: .venv/bin/python -m jobs.settings"
