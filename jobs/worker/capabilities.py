"""What a worker says its models can do, so that planning needs neither torch nor their files."""

from collections.abc import Iterable
from datetime import timedelta

import msgspec

from engine.registry import describe_model
from jobs.app import App
from jobs.domain.errors import BatchctlError
from jobs.domain.ids import WorkerId
from jobs.domain.request import Capabilities
from jobs.telemetry import log
from storage import models
from storage.models import Model


def publish(
    app: App, names: Iterable[str], *, worker_id: WorkerId, say: bool = True
) -> tuple[str, ...]:
    """Return those of the models that this worker may serve, after publishing them.

    A model that cannot run here is left out, and so is one that is not the model which a live
    worker serves under the same name: planning and answers would depend on who is asked. Either
    is logged in one line. Safe to repeat.

    Args:
        worker_id: of a worker whose first heartbeat is written.
        say: whether to log what is left out; one who tries again has said it before.
    """
    served = []
    for name in names:
        try:
            found = describe_model(app.engine_config(name), name)
        except BatchctlError as error:
            if say:
                log.error("model_not_served", model=name, code=error.code, error=error.message)
            continue
        if _publish(app, found, worker_id=worker_id, say=say):
            served.append(name)
    return tuple(served)


def publish_loaded(app: App, found: Capabilities, *, worker_id: WorkerId) -> bool:
    """Publish what an engine that is loaded says of itself; return whether it may serve.

    It knows what files do not tell, such as the tokens that its cache holds.
    """
    return _publish(app, found, worker_id=worker_id, say=True)


def _publish(app: App, found: Capabilities, *, worker_id: WorkerId, say: bool) -> bool:
    now = app.db.now()
    rival = models.publish(
        app.db,
        Model(
            name=found.model,
            fingerprint=found.fingerprint,
            capabilities=msgspec.to_builtins(found),
            published_at=now,
            published_by=worker_id,
        ),
        alive_since=now - timedelta(seconds=app.settings.worker.lost_seconds),
    )
    if rival is None:
        return True
    if not say:
        return False
    log.error(
        "model_refused",
        model=found.model,
        fingerprint=found.fingerprint,
        other_fingerprint=rival.fingerprint,
        other_worker=rival.worker_id,
        other_host=rival.host,
        error=f"Worker {rival.worker_id} on {rival.host or 'an unknown host'} serves another model "
        f"under the name {found.model}; give both the same files and settings, stop that worker, "
        "or choose another name.",
    )
    return False
