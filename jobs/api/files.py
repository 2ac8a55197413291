"""Routes of files: upload, list, look, delete, download."""

import re
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any, Literal
from urllib.parse import quote

import anyio
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from jobs.api.context import Context, InContext, unix, unix_or_none
from jobs.api.problems import Problem
from jobs.api.uploads import clean_filename, receive_form
from jobs.domain.errors import BatchctlError, BlobMissing, NotFound, StorageError
from jobs.domain.ids import FileId, mint_file_id
from jobs.telemetry import log
from storage import answers, files
from storage.blobs.base import BlobReader, input_key
from storage.files import File

DEFAULT_BATCH_SECONDS = 30 * 86_400
"""How long an input of batches is kept when its upload does not say."""
_PIECE_BYTES = 1 << 20
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[ -~]+$",
        description="Repeating a call with the same key returns what the first call made.",
    ),
]


class FileObject(BaseModel):
    """A file; instants are unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="Its size.")
    created_at: int
    filename: str
    purpose: str = Field(description="batch for inputs, batch_output for outputs.")
    status: Literal["processed"] = "processed"
    expires_at: int | None = Field(description="When it will be deleted; null: never.")
    status_details: None = None
    sha256: str = Field(description="Of its bytes, in hexadecimal (an addition of ours).")


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="Whether `after` = `last_id` gives more.")


class DeletedFile(BaseModel):
    """What is left of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


_UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {
                            "type": "string",
                            "description": "batch for the input of a batch.",
                        },
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": 2_592_000,
                        },
                    },
                }
            }
        },
    }
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The bytes of the file.",
        "content": {"application/jsonl": {}, "application/octet-stream": {}},
    },
    206: {"description": "The range that was asked for."},
}

router = APIRouter(prefix="/v1/files", tags=["files"])


def find_file(context: Context, file_id: str, *, param: str = "id") -> File:
    """Return the caller's file.

    Raises:
        Problem: there is none.
    """
    missing = Problem(404, f"No such File object: {file_id[:128]}", param=param)
    if not _ID.fullmatch(file_id):
        raise missing
    try:
        return files.get(context.app.db, FileId(file_id), tenant_id=context.tenant_id)
    except NotFound:
        raise missing from None


@router.post(
    "",
    operation_id="createFile",
    summary="Upload a file",
    openapi_extra=_UPLOAD_FORM,
)
async def create_file(
    request: Request, context: InContext, idempotency_key: IdempotencyKey = None
) -> FileObject:
    """Store a file as it arrives, of any name and with its fields in any order.

    Its lines are looked at when a batch is made of it. An upload that is cut off leaves nothing.
    """
    if not context.uploads.acquire(blocking=False):
        raise Problem(
            429,
            "Too many uploads are running; try again shortly.",
            code="too_many_uploads",
            kind="rate_limit_error",
            headers={"retry-after": "1"},
        )
    try:
        file_id = mint_file_id()
        limit = context.app.settings.limits.max_file_bytes
        form, written = await receive_form(
            request, context, key=input_key(file_id), max_file_bytes=limit
        )
    finally:
        context.uploads.release()

    def record() -> File:
        now = context.app.db.now()
        seconds = form.expires_after_seconds
        if seconds is None and form.fields["purpose"] == "batch":
            seconds = DEFAULT_BATCH_SECONDS
        file = File(
            id=file_id,
            tenant_id=context.tenant_id,
            filename=clean_filename(form.filename),
            purpose=form.fields["purpose"],
            num_bytes=written.num_bytes,
            sha256=written.sha256,
            blob_key=written.key,
            created_at=now,
            expires_at=None if seconds is None else now + timedelta(seconds=seconds),
            idempotency_key=idempotency_key,
        )
        try:
            recorded = files.insert(context.app.db, file)
        except StorageError:
            # Whether there is a row now is not known: what has none goes with the collector.
            raise
        except BaseException:
            _delete_blob(context, file)
            raise
        if recorded.id != file.id:
            _delete_blob(context, file)
            same = (recorded.sha256, recorded.purpose) == (file.sha256, file.purpose)
            if not same:
                raise key_reused("file")
        return recorded

    return _describe(await context.run(record))


@router.get("", operation_id="listFiles", summary="List files")
def list_files(
    context: InContext,
    after: Annotated[str | None, Query(description="The id of the last file seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="By creation.")] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    """List the caller's files, the newest first."""
    if after and not _ID.fullmatch(after):
        raise Problem(404, f"No such File object: {after[:128]}", param="after")
    try:
        found, has_more = files.list_page(
            context.app.db,
            tenant_id=context.tenant_id,
            purpose=purpose and purpose.replace("\0", ""),
            after=FileId(after) if after else None,
            limit=limit,
            order=order,
        )
    except NotFound:
        raise Problem(404, f"No such File object: {after}", param="after") from None
    return FileList(
        data=[_describe(file) for file in found],
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
        has_more=has_more,
    )


@router.get("/{file_id}", operation_id="retrieveFile", summary="Look at a file")
def retrieve_file(file_id: str, context: InContext) -> FileObject:
    """Return what is known of a file."""
    return _describe(find_file(context, file_id))


@router.delete("/{file_id}", operation_id="deleteFile", summary="Delete a file")
def delete_file(file_id: str, context: InContext) -> DeletedFile:
    """Delete a file, unless a batch that has not ended reads it.

    What its batch gave to later ones goes as well.
    """
    file = find_file(context, file_id)
    given = answers.list_of_file(context.app.db, file.id, file.blob_key)
    try:
        files.mark_deleted(context.app.db, file.id, tenant_id=context.tenant_id)
    except NotFound:  # deleted by another call in this moment
        raise Problem(404, f"No such File object: {file_id}", param="id") from None
    _delete_blob(context, file)
    for one in given:
        with suppress(BatchctlError):  # nobody finds them any more; the collector comes later
            context.app.blobs.delete(one.blob_key)
    return DeletedFile(id=file.id)


@router.get(
    "/{file_id}/content",
    operation_id="downloadFile",
    summary="Download a file",
    response_class=Response,
    responses=_CONTENT,
)
async def download_file(
    file_id: str,
    context: InContext,
    asked: Annotated[
        str | None, Header(alias="Range", description="One range of bytes; others are ignored.")
    ] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
) -> Response:
    """Stream the bytes of a file."""
    file = await context.run(find_file, context, file_id)
    tag = f'"{file.sha256}"'
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "no-store",
        "content-disposition": render_disposition(file.filename),
        "etag": tag,
    }
    start, end, status = 0, file.num_bytes, 200
    if asked is not None and if_range in {None, tag}:
        part = parse_range(asked, num_bytes=file.num_bytes)
        if part is not None:
            start, end = part
            status = 206
            headers["content-range"] = f"bytes {start}-{end - 1}/{file.num_bytes}"
    headers["content-length"] = str(end - start)
    try:
        reader = await context.run(
            context.app.blobs.open_reader, file.blob_key, start=start, length=end - start
        )
    except BlobMissing:
        raise Problem(
            404, f"The content of file {file_id} is gone; upload it again.", param="id"
        ) from None
    return StreamingResponse(
        read_pieces(context, reader),
        status_code=status,
        headers=headers,
        media_type=_media_type(file),
    )


async def read_pieces(context: Context, reader: BlobReader) -> AsyncIterator[bytes]:
    """Yield what `reader` has, in large pieces, and close it."""
    try:
        while piece := await context.run(reader.read, _PIECE_BYTES):
            yield piece
    finally:
        with anyio.CancelScope(shield=True):
            await context.run(reader.__exit__, None, None, None)


def parse_range(asked: str, *, num_bytes: int) -> tuple[int, int] | None:
    """Return begin and end of the one range that is asked for; None sends everything.

    Raises:
        Problem: it begins behind the end.

    Source: RFC 9110, section 14; what is not understood is ignored.
    """
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1, num_bytes) if last else num_bytes
        if last and int(last) < start:
            return None
    else:
        start, end = max(num_bytes - int(last), 0), num_bytes
    if start >= end:
        raise Problem(
            416,
            f"The file has {num_bytes} bytes.",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{num_bytes}"},
        )
    return start, end


def render_disposition(filename: str) -> str:
    """Return a Content-Disposition that makes a browser save the file, whatever its name.

    Source: RFC 6266; the plain name is for clients that do not know the encoded one.
    """
    plain = re.sub(r"[^A-Za-z0-9 ._()+=@-]", "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def key_reused(what: str) -> Problem:
    """Return what is answered to an idempotency key that stands for another call."""
    return Problem(
        409,
        f"This Idempotency-Key was used for another {what}; take a new one.",
        code="idempotency_key_reused",
        headers={"x-should-retry": "false"},
    )


def _media_type(file: File) -> str:
    is_lines = file.purpose in {"batch", "batch_output"} or file.filename.endswith(".jsonl")
    return "application/jsonl" if is_lines else "application/octet-stream"


def _delete_blob(context: Context, file: File) -> None:
    """Delete bytes that no row refers to; where that fails, the collector will."""
    with suppress(BatchctlError):
        context.app.blobs.delete(file.blob_key)
        return
    log.warning("blob_left", file_id=file.id)


def _describe(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.num_bytes,
        created_at=unix(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        expires_at=unix_or_none(file.expires_at),
        sha256=file.sha256,
    )
