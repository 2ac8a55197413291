"""Settings: the one place where configuration enters.

    flag  >  project TOML  >  BATCHCTL_* environment  >  the field's own names  >  default

A flag may also be that of a command which started this process and passed it on (`inherit`).

The project TOML is `--config PATH`, else `BATCHCTL_CONFIG`, else `batchctl.toml` in the working
directory. `load()` is called once, at an edge; `Settings(...)` itself reads nothing from outside.
"""

import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
from pydantic import (
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from typing_extensions import override

from engine.paths import expand
from jobs import fields
from jobs.aliases import ALIASES, read_aliases
from jobs.broker_url import for_redis_py
from jobs.catalogue import Completed, resolve
from jobs.domain.errors import InvalidInput, NotFound
from jobs.model_settings import (
    BUILT_IN,
    EngineChoice,
    EngineGroups,
    HfSettings,
    Limiter,
    LlamacppSettings,
    ModelSettings,
    RemoteSettings,
    VllmSettings,
    did_you_mean,
)
from jobs.setting_groups import (
    TIMING_PROFILES,
    AuditSettings,
    BrokerSettings,
    CollectSettings,
    LeaseSettings,
    LimitSettings,
    LogSettings,
    PlanningSettings,
    RetrySettings,
    ReuseSettings,
    SandboxSettings,
    SegmentSettings,
    ServerSettings,
    ShardSettings,
    WorkerSettings,
)
from storage.config import BlobSettings, DatabaseSettings

PREFIX = "BATCHCTL_"
CONFIG_VARIABLE = "BATCHCTL_CONFIG"
CONFIG_FILE = "batchctl.toml"
FLAGS_VARIABLE = "_BATCHCTL_FLAGS"
"""Carries the flags of a command to the processes that it starts; see `inherit`."""
MASK = "**********"


class Settings(BaseSettings):
    """Everything an operator may change; read once, at an edge."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    data: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("batchctl"),
        description="folder of the database, files and runs of this machine; "
        "unset: the user's data folder",
    )
    base_url: str = Field(
        default="http://127.0.0.1:8000",
        description="where the client finds the API; with or without `/v1`",
    )
    api_key: SecretStr | None = Field(
        default=None, description="the key that the client sends and the API asks for"
    )
    engine: EngineChoice = Field(
        default="auto",
        description="engine of models that say auto: auto, hf, vllm, llamacpp, remote or simulated",
    )
    default_model: str = Field(default="demo", description="model where none is named")
    models: dict[str, ModelSettings] = Field(
        default={}, description="the catalogue; `demo` and `simulated` are always in it"
    )
    hf: HfSettings = HfSettings()
    vllm: VllmSettings = VllmSettings()
    llamacpp: LlamacppSettings = LlamacppSettings()
    remote: RemoteSettings = RemoteSettings()
    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    blobs: BlobSettings = BlobSettings()
    broker: BrokerSettings = BrokerSettings()
    worker: WorkerSettings = WorkerSettings()
    limits: LimitSettings = LimitSettings()
    shards: ShardSettings = ShardSettings()
    planning: PlanningSettings = PlanningSettings()
    reuse: ReuseSettings = ReuseSettings()
    segments: SegmentSettings = SegmentSettings()
    leases: LeaseSettings = LeaseSettings()
    retries: RetrySettings = RetrySettings()
    sandbox: SandboxSettings = SandboxSettings()
    audit: AuditSettings = AuditSettings()
    collect: CollectSettings = CollectSettings()
    log: LogSettings = LogSettings()

    _layers: tuple["_Layer", ...] = PrivateAttr(default=())

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load() puts the layers together itself, because it has to say where a value came from.
        return (init_settings,)

    @field_validator("data", mode="after")
    @classmethod
    def _expand_home(cls, data: Path) -> Path:
        return expand(data).absolute()

    @field_validator("api_key", mode="after")
    @classmethod
    def _drop_empty(cls, key: SecretStr | None) -> SecretStr | None:
        # Else whoever sends none would have the right one.
        return key if key is not None and key.get_secret_value().strip() else None

    @field_validator("base_url", mode="after")
    @classmethod
    def _strip_version(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("should start with http:// or https://")
        return url.rstrip("/").removesuffix("/v1").rstrip("/")

    @field_validator("models", mode="before")
    @classmethod
    def _add_built_in(cls, given: Any) -> Any:  # noqa: ANN401  what pydantic passes
        if not isinstance(given, Mapping):
            return given
        entries = {
            name: entry.model_dump(exclude_unset=True)
            if isinstance(entry, ModelSettings)
            else entry
            for name, entry in given.items()
        }
        return fields.merge(BUILT_IN, entries)

    @property
    def engine_groups(self) -> EngineGroups:
        """What the models of each engine start from."""
        return EngineGroups(hf=self.hf, vllm=self.vllm, llamacpp=self.llamacpp, remote=self.remote)

    @property
    def limiter(self) -> Limiter | None:
        """Where the workers of a remote server share its limits; None without a broker."""
        broker = self.broker
        if broker.url is None:
            return None
        url = SecretStr(for_redis_py(broker.url.get_secret_value()))
        return Limiter(url=url, prefix=broker.prefix, master=broker.sentinel_master)

    def check_serving(self) -> None:
        """Check that an API with these settings is not open to the world.

        Raises:
            InvalidInput: it would listen beyond this machine without asking for a key.
        """
        if not self.server.is_loopback and self.api_key is None:
            raise InvalidInput(
                f"Listening on {self.server.host} needs an api_key "
                f"({PREFIX}API_KEY); without one only loopback is served.",
                param="api_key",
            )


# --- loading ---


class _Layer(NamedTuple):
    """One source of values, and what to call the origin of each of them."""

    values: Mapping[str, Any]
    origin: Callable[[tuple[str, ...]], str]


def load(config: Path | None = None, **flags: Any) -> Settings:  # noqa: ANN401  typed by Settings
    """Return the settings in force.

    Args:
        config: the project TOML; unset, `BATCHCTL_CONFIG` or `./batchctl.toml`.
        flags: fields of `Settings`, nested ones as dicts or with `__` in the name
            (`server__port=0`); None stands for a flag that was not given.

    Raises:
        InvalidInput: a value is wrong, or a name is unknown; the message says where it stands.
        NotFound: the named TOML file does not exist.
    """
    if sys.flags.optimize:
        raise InvalidInput(
            "Python runs without its checks (-O or PYTHONOPTIMIZE), and libraries that serve "
            "models rely on them; start it without.",
            param="settings",
        )
    given: dict[str, Any] = {}
    inherited: dict[str, Any] = json.loads(os.environ.get(FLAGS_VARIABLE) or "{}")
    for name, value in [*inherited.items(), *flags.items()]:
        if value is not None:
            fields.put(given, tuple(name.split("__")), value)
    layers = (
        _Layer(given, lambda _: "flag"),
        *_read_toml(config),
        _read_environment(os.environ),
    )
    covered = layers[-1].values
    for layer in reversed(layers[:-1]):
        covered = fields.merge(covered, layer.values)
    values, names = read_aliases(os.environ, covered)
    layers = (*layers, _Layer(values, lambda path: f"env:{names.get(path, 'HF_*')}"))
    merged = dict(fields.merge(values, covered))
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        raise InvalidInput(_explain(error, layers), param="settings") from None
    settings._layers = layers  # noqa: SLF001  its own module
    return settings


def inherit(config: Path | None = None, **flags: Any) -> dict[str, str]:  # noqa: ANN401  typed by Settings
    """Return the environment of a process whose `load()` goes by this file and these flags.

    Each setting's own variable would not do: a settings file goes before it.

    Args:
        config: as for `load`.
        flags: as for `load`; what JSON can say, no secrets.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    environment = {FLAGS_VARIABLE: json.dumps(given)}
    if config is not None:
        environment[CONFIG_VARIABLE] = str(config.absolute())
    return environment


def complete_model(
    settings: Settings,
    name: str | None = None,
    *,
    engine: EngineChoice = "auto",
    quantization: str | None = None,
    check_installed: bool = True,
) -> Completed:
    """Return a model with nothing left open, and what was chosen; see `catalogue.resolve`.

    Args:
        name: a name of the catalogue, a local folder, a .gguf file or a hub id; unset, the
            default model.
    """
    name = name or settings.default_model
    entry = settings.models.get(name)
    if engine == "auto" and (entry is None or entry.engine == "auto"):
        engine = settings.engine
    return resolve(
        settings.models,
        name,
        groups=settings.engine_groups,
        engine=engine,
        quantization=quantization,
        check_installed=check_installed,
    )


def resolve_model(
    settings: Settings,
    name: str | None = None,
    *,
    engine: EngineChoice = "auto",
    quantization: str | None = None,
    check_installed: bool = True,
) -> tuple[str, ModelSettings]:
    """Return the name and the completed settings of a model; see `complete_model`."""
    found = complete_model(
        settings,
        name,
        engine=engine,
        quantization=quantization,
        check_installed=check_installed,
    )
    return found.name, found.settings


class Origin(NamedTuple):
    """One setting in force: its name, its value as text (secrets masked) and its source."""

    name: str
    value: str
    origin: str


def origins(settings: Settings) -> list[Origin]:
    """Return each setting with where it came from: flag, file:PATH, env:NAME or default.

    Those that `leases.timing_profile` gave name the profile.
    """
    found = []
    for path, value in fields.leaves(settings):
        origin = _origin_of(path, settings._layers)  # noqa: SLF001  its own module
        group, name = path[0], path[-1]
        if (
            origin == "default"
            and group == "leases"
            and name in TIMING_PROFILES[settings.leases.timing_profile]
        ):
            origin = f"timing_profile:{settings.leases.timing_profile}"
        found.append(Origin(".".join(path), _shown(value), origin))
    return found


def render_table() -> str:
    """Return the Markdown tables of all settings and of the names that are understood as well."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for path, field in fields.fields(Settings):
        default = "" if field.default_factory else _shown(field.get_default())
        cell = f"`{default}`" if default else ""
        lines.append(f"| `{'.'.join(path)}` | {cell} | {field.description or ''} |")
    lines += ["", "| also understood | stands for | values |", "| --- | --- | --- |"]
    lines += [f"| `{alias.name}` | `{'.'.join(alias.path)}` | {alias.note} |" for alias in ALIASES]
    return "\n".join(lines) + "\n"


def _read_toml(config: Path | None) -> tuple[_Layer, ...]:
    named = config or os.environ.get(CONFIG_VARIABLE)
    path = Path(named or CONFIG_FILE)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if named:
            raise NotFound(f"There is no settings file {path}.", param="config") from None
        return ()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}.", param="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}.", param="config") from None
    return (_Layer(values, lambda _: f"file:{path}"),)


def _read_environment(environment: Mapping[str, str]) -> _Layer:
    names: dict[tuple[str, ...], str] = {}
    for name in environment:
        if not name.upper().startswith(PREFIX) or name == CONFIG_VARIABLE:
            continue
        path = tuple(name[len(PREFIX) :].lower().split("__"))
        if fields.annotation_at(Settings, path) is None:
            known = [_variable(one) for one, _ in fields.fields(Settings)]
            raise InvalidInput(
                f"The environment variable {name} is no setting."
                f"{did_you_mean(name.upper(), [*known, CONFIG_VARIABLE])}",
                param="settings",
            )
        names[path] = name
    try:
        values = EnvSettingsSource(Settings)()
    except SettingsError as error:
        raise InvalidInput(f"The environment cannot be read: {error}.", param="settings") from None

    def origin(path: tuple[str, ...]) -> str:
        above = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in names), path)
        return f"env:{names.get(above, _variable(path))}"

    return _Layer(values, origin)


def _explain(error: ValidationError, layers: tuple[_Layer, ...]) -> str:
    """Return one line for each wrong value: its name, where it stands and what is wrong."""
    lines = []
    for problem in error.errors(include_input=False, include_context=False, include_url=False):
        path = tuple(str(part) for part in problem["loc"])
        while path and _origin_of(path, layers) == "default":
            path = path[:-1]  # pydantic adds the branch of a union
        path = path or tuple(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "there is no such setting."
            message += did_you_mean(path[-1], fields.names_at(Settings, path[:-1]))
        lines.append(f"{'.'.join(path)} ({_origin_of(path, layers)}): {message}")
    return "\n".join(lines)


def _origin_of(path: tuple[str, ...], layers: tuple[_Layer, ...]) -> str:
    for layer in layers:
        if fields.get(layer.values, path) is not fields.MISSING:
            return layer.origin(path)
    return "default"


def _variable(path: tuple[str, ...]) -> str:
    return PREFIX + "__".join(path).upper()


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        value = re.sub(r"(://[^/@:]*:).+@", rf"\1{MASK}@", value)
        return re.sub(r"(?i)(password=)[^&]+", rf"\1{MASK}", value)
    return json.dumps(value)


if __name__ == "__main__":
    sys.stdout.write(render_table())
