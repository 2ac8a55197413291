"""Settings: the one place where configuration enters.

    flag  >  project TOML  >  BATCHCTL_* environment  >  the field's own names  >  default

A flag may also be that of a command which started this process and passed it on (`inherit`).

The project TOML is `--config PATH`, else `BATCHCTL_CONFIG`, else `batchctl.toml` in the working
directory. `load()` is called once, at an edge; `Settings(...)` itself reads nothing from outside.
"""

import ipaddress
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import platformdirs
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from typing_extensions import override

from jobs import fields
from jobs.aliases import ALIASES, read_aliases
from jobs.broker_url import check_url, for_redis_py
from jobs.catalogue import (
    BUILT_IN,
    Completed,
    EngineChoice,
    EngineGroups,
    HfSettings,
    Limiter,
    LlamacppSettings,
    ModelSettings,
    RemoteSettings,
    VllmSettings,
    did_you_mean,
    resolve,
)
from jobs.domain.errors import InvalidInput, NotFound
from jobs.domain.images import MAX_READABLE_PIXELS
from jobs.domain.models import MAX_MODELS
from jobs.domain.plan import Fold
from storage.config import BlobSettings, DatabaseSettings

PREFIX = "BATCHCTL_"
CONFIG_VARIABLE = "BATCHCTL_CONFIG"
CONFIG_FILE = "batchctl.toml"
FLAGS_VARIABLE = "_BATCHCTL_FLAGS"
"""Carries the flags of a command to the processes that it starts; see `inherit`."""
MASK = "**********"

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Group):
    """Where the API listens."""

    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; another one than loopback needs an `api_key`",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class LimitSettings(_Group):
    """What an upload and a batch may have; OpenAI has 50,000 lines and 200 MB, this has more."""

    max_file_bytes: int = Field(default=200 * _GIB, ge=1, description="size of an uploaded file")
    max_lines: int = Field(default=10_000_000, ge=1, description="requests in one batch")
    max_models: int = Field(
        default=16, ge=1, le=MAX_MODELS, description="models that one batch may run on"
    )
    max_line_bytes: int = Field(
        default=8 * _MIB, ge=_KIB, description="size of one request line; a longer one is an error"
    )
    max_reported_errors: int = Field(
        default=100, ge=1, description="bad lines that a refused batch lists; all are counted"
    )
    max_images: int = Field(default=16, ge=0, description="images in one line; 0: none")
    max_image_bytes: int = Field(
        default=8 * _MIB, ge=1, le=256 * _MIB, description="size of all images of one line"
    )
    max_image_pixels: int = Field(
        default=16 * _MIB,
        ge=1,
        le=MAX_READABLE_PIXELS,
        description="pixels of one image, which take four bytes each once it is decoded",
    )


class ShardSettings(_Group):
    """How large a shard may become, whichever comes first."""

    max_lines: int = Field(default=1000, ge=1, description="request lines in one shard")
    max_bytes: int = Field(
        default=16 * _MIB, ge=1, description="bytes of request lines in one shard"
    )


class PlanningSettings(_Group):
    """In which order the lines of a batch run; answers and files are the same in any."""

    fold: Fold = Field(
        default="determined",
        description="which equal requests run once for all of them: determined (greedy or "
        "seeded), all, or none",
    )
    by_prefix: bool = Field(
        default=True, description="run prompts that begin alike together, where that saves work"
    )
    by_length: bool = Field(
        default=True, description="run what may have long answers first, where lengths differ"
    )
    by_template: bool = Field(
        default=True,
        description="judge that also by the answers that the tenant's earlier batches got to the "
        "same system prompts",
    )


class ReuseSettings(_Group):
    """Answers of earlier batches, for those that ask for it (`--reuse`, `reuse` in the API)."""

    expire_days: float = Field(
        default=0,
        ge=0,
        le=3650,
        description="how long answers are kept for later batches of the same tenant; 0: none are",
    )
    max_bytes: int = Field(
        default=10 * _GIB,
        ge=_MIB,
        description="what a tenant may have of them; the oldest make way",
    )


class SegmentSettings(_Group):
    """When results are made durable, whichever comes first; also what a kill can cost."""

    max_results: int = Field(default=256, ge=1, description="results in one segment")
    max_bytes: int = Field(default=8 * _MIB, ge=1, description="bytes in one segment")
    max_age_seconds: float = Field(
        default=1.0, ge=0, description="how long a finished result may wait"
    )


class LeaseSettings(_Group):
    """The clocks of leases and loops; `timing_profile` gives those that are not set."""

    timing_profile: Literal["default", "fast"] = Field(
        default="default", description="fast has 3 s leases, for tests of crashes"
    )
    lease_seconds: float = Field(default=60, gt=0, description="how long a claim lasts unrenewed")
    renew_seconds: float = Field(default=10, gt=0, description="pause between renewals")
    reap_seconds: float = Field(
        default=10, gt=0, description="pause between looks for expired leases"
    )
    stall_seconds: float = Field(
        default=180, gt=0, description="an engine without progress for this long is ended"
    )
    load_seconds: float = Field(
        default=900, gt=0, description="an engine that has not loaded its model by then is ended"
    )
    request_seconds: float = Field(
        default=21600, gt=0, description="a request that runs for longer ends with an error"
    )
    watch_seconds: float = Field(
        default=2, gt=0, description="pause between looks for a cancelled batch"
    )
    idle_poll_seconds: float = Field(
        default=1, gt=0, description="pause between looks for work when nothing rang"
    )
    drain_seconds: float = Field(
        default=20, gt=0, description="how long a worker that stops may take to write what it has"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_profile(cls, given: Any) -> Any:  # noqa: ANN401  what pydantic passes
        if isinstance(given, Mapping):
            return {**_PROFILES.get(str(given.get("timing_profile")), {}), **given}
        return given

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.renew_seconds * 2 > self.lease_seconds:
            raise ValueError("renew_seconds may be half of lease_seconds at most")
        return self


_PROFILES: Mapping[str, Mapping[str, float]] = {
    "default": {},
    "fast": {
        "lease_seconds": 3,
        "renew_seconds": 0.5,
        "reap_seconds": 0.5,
        "stall_seconds": 9,
        "watch_seconds": 0.2,
        "idle_poll_seconds": 0.1,
        "drain_seconds": 5,
    },
}


class RetrySettings(_Group):
    """How often a shard is tried again."""

    max_attempts: int = Field(
        default=10, ge=1, description="attempts of a shard before its missing lines become errors"
    )
    base_seconds: float = Field(
        default=1, ge=0, description="first pause, doubled with each attempt"
    )
    max_seconds: float = Field(default=60, ge=0, description="longest pause")


class BrokerSettings(_Group):
    """Redis or Valkey: rings for work, cancellation and watchers, and limits that are shared."""

    url: SecretStr | None = Field(
        default=None,
        description="`redis://`, `rediss://` (TLS) or `sentinel://`; unset: workers only poll",
    )
    sentinel_master: str = Field(
        default="mymaster", description="name of the master, with `sentinel://`"
    )
    prefix: str = Field(
        default="batchctl",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="what queues and keys begin with; two systems on one Redis need two",
    )

    @field_validator("url", mode="after")
    @classmethod
    def _check_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            try:
                check_url(url.get_secret_value())
            except InvalidInput as error:
                raise ValueError(error.message.removeprefix("broker.url ")) from None
        return url


class WorkerSettings(_Group):
    """What `batchctl worker` starts, and how workers show that they are there."""

    gpus: str = Field(default="all", description="all, none, or indices such as 0,1")
    models: tuple[str, ...] = Field(
        default=(), description="models to serve; empty: every model of the catalogue"
    )
    role: Literal["engine", "control", "all"] = Field(
        default="all", description="engine, control (plans, finalizes, sweeps) or all"
    )
    engines: int = Field(default=1, ge=1, description="engine workers on a machine without GPUs")
    heartbeat_seconds: float = Field(
        default=5, gt=0, description="pause between a worker's signs of life"
    )
    model_stay_seconds: float = Field(
        default=60, gt=0, description="how long a model keeps an engine while another one waits"
    )
    max_engine_deaths: int = Field(
        default=3,
        ge=1,
        description="engine deaths within `engine_death_window_seconds` that no request explains, "
        "after which a worker rests",
    )
    engine_death_window_seconds: float = Field(
        default=1800, gt=0, description="how long such a death counts, and so how long it rests"
    )
    metrics_host: str = Field(
        default="127.0.0.1", description="address of a worker's metrics and health"
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of the first worker's metrics and health, the next ones follow; "
        "unset: none; 0 takes free ones",
    )

    @property
    def lost_seconds(self) -> float:
        """How long after its last heartbeat a worker is taken for lost."""
        return max(3 * self.heartbeat_seconds, 15.0)


class SandboxSettings(_Group):
    """What the trial compilation of one schema, regex or grammar may use."""

    cpu_seconds: int = Field(default=5, ge=1, description="processor time")
    wall_seconds: float = Field(default=15, gt=0, description="time on the clock")
    memory_bytes: int = Field(default=1 * _GIB, ge=64 * _MIB, description="memory")


class AuditSettings(_Group):
    """How often batches are proved to be complete; see `batchctl audit`."""

    every_seconds: float = Field(
        default=3600, ge=0, description="pause between audits of the whole system; 0: none"
    )
    num_batches: int = Field(
        default=4, ge=1, description="batches in one audit, running ones and recently ended ones"
    )


class CollectSettings(_Group):
    """When what nobody needs any more is removed; see `batchctl collect`."""

    every_seconds: float = Field(default=3600, ge=0, description="pause between turns; 0: never")
    orphan_seconds: float = Field(
        default=86_400,
        ge=3600,
        description="age of bytes without a row, and of logs of lost workers, before they go",
    )
    segment_seconds: float = Field(
        default=86_400, ge=0, description="how long segments stay after the end of their batch"
    )
    max_blobs: int = Field(
        default=100_000, ge=1000, description="blobs one turn looks at; the next one goes on"
    )


class LogSettings(_Group):
    """What is logged; never prompts or answers."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error"
    )
    format: Literal["auto", "console", "json"] = Field(
        default="auto", description="console or json; auto is console on a terminal"
    )


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
        return data.expanduser().absolute()

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
            and name in _PROFILES[settings.leases.timing_profile]
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
