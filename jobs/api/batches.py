"""Routes of batches: create, list, look, cancel, and their results as they come."""

import re
from contextlib import suppress
from dataclasses import fields as fields_of
from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from jobs import intake
from jobs.api.context import Context, InContext, unix, unix_or_none
from jobs.api.files import IdempotencyKey, find_file, key_reused
from jobs.api.problems import Problem
from jobs.api.results import Kind, ResultLines, follow_lines
from jobs.api.uploads import EXPIRY_SECONDS
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import IllegalTransition, InvalidInput, NotFound
from jobs.domain.ids import BatchId, FileId, mint_batch_id
from jobs.domain.mixed import BATCH_ENDPOINTS
from jobs.settings import resolve_model
from jobs.wakeups import Hint
from storage import batches, models

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_WINDOW = re.compile(r"([0-9]{1,9})([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MAX_WINDOW_SECONDS = 366 * 86_400
_MAX_PAIRS, _MAX_KEY, _MAX_VALUE = 16, 64, 512
_MAX_PRIORITY = 1_000_000

MetadataKey = Annotated[str, Field(max_length=_MAX_KEY)]
MetadataValue = Annotated[str, Field(max_length=_MAX_VALUE)]


class OutputExpiry(BaseModel):
    """How long output files are kept, counted from their creation."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=EXPIRY_SECONDS[0], le=EXPIRY_SECONDS[1], strict=True)


class CreateBatch(BaseModel):
    """A batch to be made; priority, model and what follows are additions of ours."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = Field(description="A file of purpose batch.")
    endpoint: str = Field(
        description=f"One of {', '.join(BATCH_ENDPOINTS)} (each line its own, an addition of ours)."
    )
    completion_window: str = Field(
        description="24h, or any other duration such as 90s, 30m, 2h or 7d."
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        default=None, max_length=_MAX_PAIRS, description="Up to 16 pairs of strings."
    )
    output_expires_after: OutputExpiry | None = None
    priority: int = Field(
        default=0,
        ge=-_MAX_PRIORITY,
        le=_MAX_PRIORITY,
        strict=True,
        description="A higher one runs first.",
    )
    model: str | None = Field(
        default=None, min_length=1, max_length=512, description="Runs the lines whatever they name."
    )
    on_unsupported_schema: Literal["validate", "refuse"] = Field(
        default="validate",
        description="What becomes of a schema that cannot be enforced while generating.",
    )
    reuse: bool = Field(
        default=False,
        strict=True,
        description="Take answers of the caller's earlier batches that asked for the same, and "
        "give this batch's to later ones, until they expire.",
    )

    @field_validator("metadata", "model", mode="after")
    @classmethod
    def _refuse_nul(cls, value: dict[str, str] | str | None) -> dict[str, str] | str | None:
        text = [value] if isinstance(value, str) else [*(value or {}), *(value or {}).values()]
        if any("\0" in part for part in text):
            raise ValueError("a NUL character cannot be kept")
        return value


class BatchProblem(BaseModel):
    """One thing that is wrong with the input."""

    code: str
    message: str
    param: str | None
    line: int | None = Field(description="The line of the input, from 1.")


class BatchProblems(BaseModel):
    """What is wrong with the input."""

    object: Literal["list"] = "list"
    data: list[BatchProblem] = Field(description="The first ones.")
    num_errors: int = Field(description="How many there are (an addition of ours).")


class Counts(BaseModel):
    """How many requests there are, and how many have ended which way."""

    total: int
    completed: int
    failed: int


class InputDetails(BaseModel):
    """Of the input tokens."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Of the output tokens."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of the requests that have ended."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchObject(BaseModel):
    """A batch; instants are unix seconds, null until they come."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = Field(description="Null where the lines run on several.")
    models: list[str] = Field(description="These, where they do (an addition of ours).")
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    usage: BatchUsage
    metadata: dict[str, str] | None
    priority: int = Field(description="An addition of ours.")
    reuse: bool = Field(description="An addition of ours.")
    num_reused: int = Field(
        description="Requests whose answer is an earlier batch's (an addition of ours)."
    )


class BatchList(BaseModel):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="Whether `after` = `last_id` gives more.")


router = APIRouter(prefix="/v1/batches", tags=["batches"])


def parse_window(window: str) -> timedelta:
    """Return the duration that `window` spells: a number and s, m, h or d.

    Raises:
        InvalidInput: it is none, or longer than a year.
    """
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]] if match else 0
    if not 0 < seconds <= _MAX_WINDOW_SECONDS:
        raise InvalidInput(
            "Invalid 'completion_window': it is 24h, or another duration up to 366d such as "
            "90s, 30m, 2h or 7d.",
            param="completion_window",
            error_code="invalid_value",
        )
    return timedelta(seconds=seconds)


@router.post("", operation_id="createBatch", summary="Create a batch")
def create_batch(
    body: CreateBatch,
    context: InContext,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> BatchObject:
    """Record a batch, to be validated and run; whatever is wrong with its lines fails it later.

    The batch of an earlier call with the same key comes with `idempotent-replayed: true`.
    """
    if body.endpoint not in BATCH_ENDPOINTS:
        raise InvalidInput(
            f"Invalid 'endpoint': supported values are {', '.join(BATCH_ENDPOINTS)}.",
            param="endpoint",
            error_code="invalid_value",
        )
    window = parse_window(body.completion_window)
    file = find_file(context, body.input_file_id, param="input_file_id")
    if file.purpose != "batch":
        raise InvalidInput(
            f"File {file.id} has purpose {file.purpose}; upload it with purpose batch.",
            param="input_file_id",
            error_code="invalid_value",
        )
    if body.model is not None:
        _check_model(context, body.model)
    if body.reuse and context.app.cache is None:
        raise InvalidInput(
            "Invalid 'reuse': this server keeps no answers. Its operator would have to set "
            "reuse.expire_days.",
            param="reuse",
            error_code="invalid_value",
        )
    now = context.app.db.now()
    expiry = body.output_expires_after
    batch = Batch(
        id=mint_batch_id(),
        tenant_id=context.tenant_id,
        input_file_id=FileId(file.id),
        endpoint=body.endpoint,
        status=BatchStatus.VALIDATING,
        created_at=now,
        completion_window=body.completion_window,
        deadline_at=now + window,
        model_override=body.model,
        on_unsupported_schema=body.on_unsupported_schema,
        priority=body.priority,
        metadata=body.metadata,
        output_expires_after_seconds=None if expiry is None else expiry.seconds,
        idempotency_key=idempotency_key,
        reuse=body.reuse,
    )
    recorded = intake.submit(context.app.db, context.app.doorbell, batch)
    if recorded.id != batch.id:
        if not _is_same_call(recorded, batch):
            raise key_reused("batch")
        response.headers["idempotent-replayed"] = "true"
    context.announce()
    return _describe(recorded)


def _check_model(context: Context, name: str) -> None:
    """Check that there is such a model; one that a worker published goes before this node's own."""
    if context.app.db.is_postgres:
        with suppress(NotFound):
            models.get(context.app.db, name)
            return
    try:
        resolve_model(context.app.settings, name, check_installed=False)
    except NotFound as error:
        raise Problem(404, error.message, code="model_not_found", param="model") from None


_ASKED = (
    "input_file_id",
    "endpoint",
    "completion_window",
    "model_override",
    "on_unsupported_schema",
    "priority",
    "metadata",
    "output_expires_after_seconds",
    "reuse",
)


def _is_same_call(recorded: Batch, asked: Batch) -> bool:
    return all(getattr(recorded, name) == getattr(asked, name) for name in _ASKED)


@router.get("", operation_id="listBatches", summary="List batches")
def list_batches(
    context: InContext,
    after: Annotated[str | None, Query(description="The id of the last batch seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """List the caller's batches, the newest first."""
    if after and not _ID.fullmatch(after):
        raise _no_batch(after, param="after")
    try:
        found, has_more = batches.list_page(
            context.app.db,
            tenant_id=context.tenant_id,
            after=BatchId(after) if after else None,
            limit=limit,
        )
    except NotFound:
        raise _no_batch(after or "", param="after") from None
    return BatchList(
        data=[_describe(batch) for batch in found],
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
        has_more=has_more,
    )


@router.get("/{batch_id}", operation_id="retrieveBatch", summary="Look at a batch")
def retrieve_batch(batch_id: str, context: InContext) -> BatchObject:
    """Return a batch as it is now."""
    return _describe(_find_batch(context, batch_id))


@router.post("/{batch_id}/cancel", operation_id="cancelBatch", summary="Cancel a batch")
def cancel_batch(batch_id: str, context: InContext) -> BatchObject:
    """Ask a batch to end; what is finished by then is kept. Asking again changes nothing."""
    batch = _find_batch(context, batch_id)
    try:
        asked = batches.request_cancel(context.app.db, batch.id, tenant_id=context.tenant_id)
    except IllegalTransition:
        status = _find_batch(context, batch_id).status
        raise Problem(
            409,
            f"Cannot cancel a batch with status '{status}'.",
            headers={"x-should-retry": "false"},
        ) from None
    context.app.doorbell.hint(Hint.STOPPING, batch.id)
    context.announce()
    return _describe(asked)


@router.get(
    "/{batch_id}/results",
    operation_id="streamResults",
    summary="Read results as they come",
    response_class=Response,
    responses={
        200: {"description": "Result lines.", "content": {"application/jsonl": {}}},
    },
)
async def stream_results(
    batch_id: str,
    context: InContext,
    kind: Annotated[Kind, Query(description="Lines of which file.")] = "all",
    *,
    follow: Annotated[bool, Query(description="Go on until the batch has ended.")] = False,
) -> Response:
    """Stream the lines that the output and error file have, or will have (an addition of ours).

    Each line comes once in a connection, in no particular order, and another connection may have
    another order: tell lines apart by `custom_id`. While nothing happens a blank line is sent now
    and then. With `follow` a body that ends well is complete; when the server goes down first,
    the body is cut off, and a new connection starts over.
    """
    batch = await context.run(_find_batch, context, batch_id)
    lines = ResultLines(context.app, batch, kind=kind)
    pieces = await context.run(lines.look)
    return StreamingResponse(
        follow_lines(context, lines, pieces, follow=follow),
        media_type="application/jsonl",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


def _no_batch(batch_id: str, *, param: str = "id") -> Problem:
    return Problem(404, f"No batch found with id '{batch_id[:128]}'.", param=param)


def _find_batch(context: Context, batch_id: str) -> Batch:
    if not _ID.fullmatch(batch_id):
        raise _no_batch(batch_id)
    try:
        return batches.get(context.app.db, BatchId(batch_id), tenant_id=context.tenant_id)
    except NotFound:
        raise _no_batch(batch_id) from None


_INSTANTS = tuple(
    field.name
    for field in fields_of(Batch)
    if field.name.endswith("_at") and field.name in BatchObject.model_fields
)


def _describe(batch: Batch) -> BatchObject:
    problems = [
        BatchProblem(code=one.code, message=one.message, param=one.param, line=one.line)
        for one in batch.errors
    ]
    counts, usage = batch.request_counts, batch.usage
    instants = {name: unix_or_none(getattr(batch, name)) for name in _INSTANTS}
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model or batch.model_override,
        models=list(batch.models),
        errors=BatchProblems(data=problems, num_errors=batch.num_errors) if problems else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        expires_at=unix(batch.deadline_at),
        request_counts=Counts(total=counts.total, completed=counts.completed, failed=counts.failed),
        usage=BatchUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        ),
        metadata=batch.metadata,
        priority=batch.priority,
        reuse=batch.reuse,
        num_reused=batch.num_reused,
        **instants,
    )
