"""Which worker processes this machine runs: one for each group of GPUs, and one for control."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engine.config import VllmConfig
from engine.devices import Device
from jobs.domain.errors import BatchctlError, EngineMisconfigured, InvalidInput
from jobs.model_settings import did_you_mean
from jobs.settings import PREFIX, Settings, inherit, resolve_model
from jobs.telemetry import log
from jobs.worker.gpu import choose_gpus, describe_group, group_gpus, pin
from jobs.worker.launcher import Command

DRAIN_MARGIN_SECONDS = 40.0
"""Beyond the drain itself: Celery's pool may wait 30 s for its last results to be taken."""

_MAX_PORT = 65535


def plan_commands(
    settings: Settings,
    *,
    found: Sequence[Device],
    host: str,
    config: Path | None = None,
    flags: Mapping[str, object] | None = None,
) -> list[Command]:
    """Return the processes that the settings ask for on a machine with these GPUs.

    Args:
        host: what the machine is called.
        config: the settings file, where a flag named it.
        flags: those of this command, as `jobs.settings.load` takes them.

    Raises:
        InvalidInput: there is no such model or GPU, no database that processes can share, or
            not a port for each worker's metrics.
        EngineMisconfigured: a model needs more GPUs than there are.
    """
    _check_database(settings)
    models = _known_models(settings)
    engines: list[tuple[Device, ...]] = []
    if settings.worker.role != "control":
        gpus = choose_gpus(found, settings.worker.gpus)
        if gpus:
            models, engines = _share_out(settings, models, gpus)
        else:
            engines = [()] * settings.worker.engines
    planned = [("engine", f"engine-{number}", group) for number, group in enumerate(engines)]
    if settings.worker.role != "engine":
        planned.append(("control", "control", ()))
    _check_ports(settings, len(planned))
    commands = []
    for number, (role, name, group) in enumerate(planned):
        decided = {
            "worker__role": role,
            "worker__models": list(models),
            "worker__metrics_port": _metrics_port(settings, number),
        }
        commands.append(
            Command(
                name=name,
                arguments=tuple(_arguments(settings, name, host=host)),
                environment={**pin(group), **inherit(config, **{**(flags or {}), **decided})},
                device=describe_group(group),
            )
        )
    return commands


def _check_database(settings: Settings) -> None:
    if not settings.database.url.startswith("postgres"):
        raise InvalidInput(
            "Workers need a Postgres that the API reaches as well: set database.url "
            f"({PREFIX}DATABASE__URL=postgresql://...). Without one, `batchctl serve` is API and "
            "workers of one machine in one command.",
            param="settings",
        )


def _known_models(settings: Settings) -> tuple[str, ...]:
    """Return the models to serve."""
    known = settings.models
    for name in settings.worker.models:
        if name not in known:
            raise InvalidInput(
                f"worker.models names {name!r}, which the catalogue does not have."
                f"{did_you_mean(name, known)} Known are: {', '.join(known)}.",
                param="settings",
            )
    return tuple(dict.fromkeys(settings.worker.models or known))


def _share_out(
    settings: Settings, models: Sequence[str], gpus: Sequence[Device]
) -> tuple[tuple[str, ...], list[tuple[Device, ...]]]:
    """Return the models that fit on this machine, and groups of GPUs for the largest of them."""
    sizes: dict[str, int] = {}
    for name in models:
        size, why = _group_size(settings, name)
        try:
            group_gpus(gpus, size)
        except EngineMisconfigured as error:
            told = f"The model {name} needs {size} GPUs ({why}). {error.message}"
            if settings.worker.models:
                raise EngineMisconfigured(told) from None
            log.warning("model_not_served", model=name, error=told)
            continue
        sizes[name] = size
    if not sizes:
        raise EngineMisconfigured(
            f"None of the models {', '.join(models)} fits on the {len(gpus)} GPUs of this machine."
        )
    largest = max(sizes.values())
    groups = group_gpus(gpus, largest)
    used = {gpu.uuid for group in groups for gpu in group}
    left_over = [str(gpu.index) for gpu in gpus if gpu.uuid not in used]
    if left_over:
        log.warning("gpus_left_over", gpus=",".join(left_over), group=largest)
    smaller = [name for name, size in sizes.items() if size < largest]
    if smaller:
        log.warning(
            "groups_larger_than_needed",
            models=",".join(smaller),
            group=largest,
            hint="start another worker for them, with --models and --gpus of its own",
        )
    return tuple(sizes), groups


def _group_size(settings: Settings, name: str) -> tuple[int, str]:
    """Return how many GPUs a model runs on, and why; one where a worker will say what is wrong."""
    try:
        _, model = resolve_model(settings, name)
        config = model.to_engine_config()
    except BatchctlError:
        return 1, ""
    if not isinstance(config, VllmConfig):
        return 1, ""
    tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
    return tensor * pipeline, f"tensor parallel {tensor} x pipeline parallel {pipeline}"


def _check_ports(settings: Settings, num_workers: int) -> None:
    first = settings.worker.metrics_port
    if first and first + num_workers - 1 > _MAX_PORT:
        raise InvalidInput(
            f"worker.metrics_port is {first}, and {num_workers} workers need as many ports from "
            f"there: {_MAX_PORT - num_workers + 1} is the last that leaves room for them.",
            param="worker.metrics_port",
        )


def _metrics_port(settings: Settings, number: int) -> int | None:
    first = settings.worker.metrics_port
    return first + number if first else first


def _arguments(settings: Settings, name: str, *, host: str) -> Iterator[str]:
    """Yield the command line of a worker: Celery's, or without a broker one that only polls."""
    yield from (sys.executable, "-m")
    if settings.broker.url is None:
        yield "jobs.worker.process"
        return
    # Pool, concurrency and queues are in the application's settings, which go by role and models.
    # Its banner would stand between log events in JSON.
    yield from ("celery", "-A", "jobs.worker.celery_app", "--quiet", "worker")
    # Two launchers on one machine need two names: Celery tells its workers apart by them.
    yield from ("-n", f"{name}-{os.getpid()}@{host}")
    # Workers have nothing to tell each other.
    yield from ("--without-gossip", "--without-mingle", "--without-heartbeat")
