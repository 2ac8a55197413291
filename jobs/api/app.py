"""Puts the REST API together."""

from collections.abc import Callable, Collection
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from jobs.api import batches, files, health, metrics, models, workers
from jobs.api.context import Context
from jobs.api.edge import Edge
from jobs.api.problems import ErrorEnvelope, answer_error
from jobs.app import App
from jobs.domain.errors import BatchctlError

_DESCRIPTION = """\
Batches of language-model requests on your own machines, in the protocol of the OpenAI Files and
Batches API: the official clients work unchanged, with this server as their base URL.
"""


def create_api(
    app: App,
    *,
    api_key: str | None,
    on_work: Callable[[], None] | None = None,
    host_names: Collection[str] = (),
    stall_seconds: float = 60.0,
) -> FastAPI:
    """Return the API over `app`; workers are others' business.

    Args:
        api_key: what callers of /v1 have to send; None: nothing.
        on_work: called after a batch was created or cancelled, beside the App's doorbell.
        host_names: DNS names under which the server may be asked for without a key; addresses
            and localhost always may.
        stall_seconds: how long an upload may send next to nothing, and any other body take.
    """
    api = FastAPI(
        title="batchctl",
        version=_version(),
        description=_DESCRIPTION,
        redirect_slashes=False,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    api.state.context = Context(
        app=app, on_work=on_work, started_at=datetime.now(UTC), stall_seconds=stall_seconds
    )
    api.state.system = metrics.SystemCollector(app.db)
    for handled in (BatchctlError, RequestValidationError, HTTPException):
        api.add_exception_handler(handled, answer_error)
    api.add_middleware(Edge, api_key=api_key, host_names=host_names, body_seconds=stall_seconds)
    failures: dict[int | str, dict[str, Any]] = {
        "default": {"model": ErrorEnvelope, "description": "What went wrong."}
    }
    key = Security(HTTPBearer(auto_error=False, description="The server's api_key, if it has one."))
    for router in (files.router, batches.router, models.router, workers.router):
        api.include_router(router, responses=failures, dependencies=[key])
    api.include_router(metrics.router, dependencies=[key])
    api.include_router(health.router)
    return api


def _version() -> str:
    try:
        return version("batchctl")
    except PackageNotFoundError:
        return "0"
