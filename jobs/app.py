"""Builds database, blob store and doorbell from settings: what every edge works with."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.choice import check_group, look_around
from engine.config import EngineConfig, VllmConfig
from engine.registry import describe_model
from engine.sandbox import Sandbox
from jobs.domain.errors import InvalidInput, NotFound, StorageError
from jobs.domain.images import ImageLimits
from jobs.domain.request import Capabilities
from jobs.intake import PlanLimits
from jobs.model_settings import ModelSettings, did_you_mean
from jobs.reuse import Cache
from jobs.settings import Settings, complete_model, resolve_model
from jobs.telemetry import log
from jobs.wakeups import BrokerConfig, Doorbell
from storage import models
from storage.blobs import open_blobs
from storage.blobs.base import BlobStore
from storage.blobs.local import FolderBlobs
from storage.config import PRIVATE
from storage.database import Database, check_schema, open_database, upgrade


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """Database, blobs and doorbell, over a folder of this machine.

    `any_model` lets a request name a local folder or a hub id, not only what the catalogue has:
    right for the person at this machine, not for whoever can reach a server. `cache_app` is where
    answers for later batches are kept; None: here.
    """

    settings: Settings
    folder: Path
    db: Database
    blobs: BlobStore
    doorbell: Doorbell = field(default_factory=Doorbell)
    any_model: bool = False
    cache_app: "App | None" = None

    @property
    def cache(self) -> Cache | None:
        """Where answers are kept for batches to come; None where the settings want none."""
        reuse, home = self.settings.reuse, self.cache_app or self
        if not reuse.expire_days:
            return None
        return Cache(
            db=home.db,
            blobs=home.blobs,
            expire_seconds=86_400 * reuse.expire_days,
            max_bytes=reuse.max_bytes,
        )

    def describe(self, name: str) -> Capabilities:
        """Return what the model of this name can do, without loading it.

        What a worker of a fleet has published goes before the files and settings of this node,
        which may have neither.

        Raises:
            NotFound: there is no such model.
            EngineMisconfigured: it is there, and cannot be used; the message says why.
        """
        if self.db.is_postgres:
            with suppress(NotFound):
                return msgspec.convert(models.get(self.db, name).capabilities, Capabilities)
        self._check_known(name)
        _, model = resolve_model(self.settings, name, check_installed=False)
        return describe_model(self._config_of(model), name)

    def engine_config(self, name: str) -> EngineConfig:
        """Return how to start an engine for the model of this name.

        Raises:
            NotFound: there is no such model.
            EngineMisconfigured: its engine is not installed, its weights are damaged, or it is to
                run on more GPUs than there are.
            EngineOutOfMemory: it does not fit this machine.
        """
        self._check_known(name)
        _, model, choice = complete_model(self.settings, name)
        if choice is not None and choice.is_notable:
            # A warning, since `batchctl run` shows no less.
            log.warning("engine_chosen", model=name, reason=choice.reason)
        config = self._config_of(model)
        if isinstance(config, VllmConfig):
            num_gpus = config.tensor_parallel_size * config.pipeline_parallel_size
            if num_gpus > 1:
                check_group(name, look_around(), num_gpus=num_gpus)
        return config

    def _config_of(self, model: ModelSettings) -> EngineConfig:
        return model.to_engine_config(limiter=self.settings.limiter)

    def _check_known(self, name: str) -> None:
        known = self.settings.models
        if name not in known and not self.any_model:
            raise NotFound(
                f"The model {name!r} does not exist.{did_you_mean(name, known)} Known are: "
                f"{', '.join(known)}.",
                param="model",
            )

    def open_sandbox(self) -> Sandbox:
        """Return the process that tries schemas, within the limits of the settings; close it."""
        limits = self.settings.sandbox
        return Sandbox(
            cpu_seconds=limits.cpu_seconds,
            wall_seconds=limits.wall_seconds,
            memory_bytes=limits.memory_bytes,
        )

    def remove_leftovers(self) -> None:
        """Free what killed writers left among the blobs; only for the holder of the folder's lock.

        Blobs outside the folder may have other writers, so nothing is done about those.
        """
        if isinstance(self.blobs, FolderBlobs) and self.settings.blobs.folder is None:
            self.blobs.remove_leftovers()

    def plan_limits(self) -> PlanLimits:
        """Return what the settings say about inputs and shards."""
        limits, shards = self.settings.limits, self.settings.shards
        planning = self.settings.planning
        return PlanLimits(
            max_lines=limits.max_lines,
            max_models=limits.max_models,
            max_line_bytes=limits.max_line_bytes,
            max_reported_errors=limits.max_reported_errors,
            shard_lines=shards.max_lines,
            shard_bytes=shards.max_bytes,
            fold=planning.fold,
            by_prefix=planning.by_prefix,
            by_length=planning.by_length,
            by_template=planning.by_length and planning.by_template,
            images=ImageLimits(
                max_images=limits.max_images,
                max_bytes=limits.max_image_bytes,
                max_pixels=limits.max_image_pixels,
            ),
        )


def server_folder(settings: Settings) -> Path:
    """Return the folder that `serve` and the workers of this machine share."""
    return settings.data / "server"


def broker_config(settings: Settings) -> BrokerConfig:
    """Return where the broker is.

    Raises:
        InvalidInput: the settings name none.
    """
    broker = settings.broker
    if broker.url is None:
        raise InvalidInput(
            "No broker is set: say where Redis or Valkey is with broker.url or "
            "BATCHCTL_BROKER__URL, such as redis://127.0.0.1:6379/0.",
            param="broker.url",
        )
    return BrokerConfig(
        url=broker.url.get_secret_value(),
        sentinel_master=broker.sentinel_master,
        prefix=broker.prefix,
    )


@contextmanager
def open_app(settings: Settings, *, folder: Path, any_model: bool = False) -> Iterator[App]:
    """Yield an App over `folder`, its tables created or brought up to date when it is SQLite.

    Args:
        any_model: whether requests may name models that the catalogue does not have.

    Raises:
        StorageError: the folder, the database or the blob store cannot be used.
        InvalidInput: the broker's URL is none, or what it needs is not installed.
    """
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"The data folder {folder} cannot be made: {error.strerror}. Choose another with "
            "--data or BATCHCTL_DATA."
        ) from error
    url = settings.database.resolve_url(folder)
    doorbell = Doorbell()
    with (
        open_database(url, settings=settings.database) as db,
        open_blobs(settings.blobs, folder) as blobs,
        ExitStack() as stack,
    ):
        if db.is_postgres:
            check_schema(db)
            # SQLite is one machine's, whose processes need no broker to hear each other.
            if settings.broker.url is not None:
                stack.enter_context(_open_broker(settings, doorbell, db))
        else:
            upgrade(db)
        yield App(
            settings=settings,
            folder=folder,
            db=db,
            blobs=blobs,
            doorbell=doorbell,
            any_model=any_model,
        )


def _open_broker(
    settings: Settings, doorbell: Doorbell, db: Database
) -> AbstractContextManager[object]:
    try:
        from jobs.broker import Broker  # noqa: PLC0415 - needs an extra
    except ImportError:
        raise InvalidInput(
            "broker.url is set, and Celery and redis are not installed: "
            "pip install 'batchctl[server]', or unset it.",
            param="broker.url",
        ) from None
    return Broker(
        broker_config(settings),
        doorbell=doorbell,
        db=db,
        # Rung for again after three turns of a sweeper, as leases and their clocks go.
        poke_again_seconds=3 * settings.leases.reap_seconds,
    )
