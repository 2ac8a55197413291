"""Routes for whoever keeps the server running; they need no key."""

from contextlib import suppress
from typing import Literal

import sqlalchemy as sa
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from jobs.api.context import Context, InContext
from jobs.domain.errors import BatchctlError, BlobMissing
from jobs.telemetry import log

router = APIRouter(tags=["health"])
_PROBE_KEY = "probe/ready"
_PROBE = bytes((1 << 20) + 1)
"""More than a writer keeps in memory, so that it reaches the disk; no request to S3."""


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be served, and if not, why."""

    status: Literal["ready", "unavailable"]
    database: str = Field(description="ok, or the code of what is wrong.")
    blobs: str = Field(description="ok, or the code of what is wrong.")


class Welcome(BaseModel):
    """What this is."""

    name: Literal["batchctl"] = "batchctl"
    docs: str = "/docs"
    openapi: str = "/openapi.json"


@router.get("/", operation_id="welcome", summary="What this is")
async def welcome() -> Welcome:
    """Say where the documentation is."""
    return Welcome()


@router.get("/health", operation_id="getHealth", summary="Is it alive")
async def get_health() -> Health:
    """Answer, without looking at anything."""
    return Health()


@router.get(
    "/ready",
    operation_id="getReadiness",
    summary="Can it serve",
    responses={503: {"model": Readiness, "description": "Something it needs does not answer."}},
)
def get_readiness(context: InContext, response: Response) -> Readiness:
    """Ask the database and the blob store."""
    database, blobs = _probe_database(context), _probe_blobs(context)
    is_ready = database == blobs == "ok"
    if not is_ready:
        response.status_code = 503
    return Readiness(status="ready" if is_ready else "unavailable", database=database, blobs=blobs)


def _probe_database(context: Context) -> str:
    try:
        with context.app.db.read() as tx:
            tx.execute(sa.select(1))
    except BatchctlError as error:
        log.warning("not_ready", part="database", code=error.code, reason=error.message)
        return error.code
    return "ok"


def _probe_blobs(context: Context) -> str:
    try:
        with suppress(BlobMissing):  # a bucket that is not there is another error
            context.app.blobs.get(_PROBE_KEY)
        # Left without a commit: shows a full or read-only disk, and leaves nothing.
        with context.app.blobs.open_writer(_PROBE_KEY) as writer:
            writer.write(_PROBE)
    except BatchctlError as error:
        log.warning("not_ready", part="blobs", code=error.code, reason=error.message)
        return error.code
    return "ok"
