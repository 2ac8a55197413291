"""The sections of the settings that are of no engine and no storage, with their defaults."""

import ipaddress
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from jobs.broker_url import check_url
from jobs.domain.errors import InvalidInput
from jobs.domain.images import MAX_READABLE_PIXELS
from jobs.domain.models import MAX_MODELS
from jobs.domain.plan import Fold

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
            return {**TIMING_PROFILES.get(str(given.get("timing_profile")), {}), **given}
        return given

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.renew_seconds * 2 > self.lease_seconds:
            raise ValueError("renew_seconds may be half of lease_seconds at most")
        return self


TIMING_PROFILES: Mapping[str, Mapping[str, float]] = {
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
