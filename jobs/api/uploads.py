"""An upload's form, parsed as it arrives; its file goes straight into the blob store.

Nothing is kept but a piece of the file, and nothing is written twice. Fields come in any order.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator

import anyio
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from jobs.api.context import Context
from jobs.api.problems import Problem
from storage.blobs.base import BlobInfo, BlobWriter

# It logs bytes of bodies that it cannot parse.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
EXPIRY_SECONDS = (3600, 2_592_000)
PIECE_BYTES = 1 << 20
_FORM_BYTES = 1 << 20
"""How much larger than its file a form may be."""
_MIN_PROGRESS_BYTES = 4096
"""What has to arrive in the time that an upload may stall, so that it cannot stall by drops."""
_MAX_PARTS = 32
_MAX_FIELD_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 15
_MAX_NAME_BYTES = 255
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Form:
    """What has arrived of a form with one file; `feed` takes the next bytes.

    Attributes:
        fields: the values of all parts but the file.
        filename: as it was sent, None where there was none.
        pending: bytes of the file that were not taken yet.
        ended: whether the closing boundary was seen.
        expires_after_seconds: how long the file is to be kept; known after `check`.
    """

    def __init__(self, content_type: str | None, *, max_file_bytes: int) -> None:
        """Expect a form of this content type.

        Raises:
            Problem: it is none.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise Problem(
                400, "An upload is a form: Content-Type multipart/form-data with a boundary."
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.has_file = False
        self.pending = bytearray()
        self.ended = False
        self.expires_after_seconds: int | None = None
        self._max_file_bytes = max_file_bytes
        self._num_bytes = 0
        self._num_file_bytes = 0
        self._num_parts = 0
        self._name = ""
        self._value = bytearray()
        self._header = bytearray()
        self._header_value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._add_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
                max_header_size=_MAX_HEADER_BYTES,
            )
        except FormParserError:
            raise _malformed() from None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            Problem: this is no form, or it is too large.
        """
        self._num_bytes += len(data)
        if self._num_bytes > self._max_file_bytes + _FORM_BYTES:
            raise too_large(self._max_file_bytes)
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None

    def check(self) -> None:
        """Check that everything has arrived, and means something.

        Raises:
            Problem: it has not, or does not.
        """
        if not self.ended:
            raise Problem(
                400, "The form ends before its closing boundary.", code="invalid_multipart"
            )
        if not self.has_file:
            raise _missing("file")
        if "purpose" not in self.fields:
            raise _missing("purpose")
        self.check_purpose()
        self.expires_after_seconds = self._read_expiry()

    def check_purpose(self) -> None:
        """Check the purpose, where it has arrived already.

        Raises:
            Problem: there is no such purpose of an upload.
        """
        purpose = self.fields.get("purpose")
        if purpose is not None and purpose not in PURPOSES:
            raise Problem(
                400,
                f"Invalid 'purpose': use one of {', '.join(PURPOSES)}.",
                code="invalid_value",
                param="purpose",
            )

    def _read_expiry(self) -> int | None:
        anchor = self.fields.get("expires_after[anchor]")
        seconds = self.fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise Problem(
                400,
                "Invalid 'expires_after.anchor': it is created_at.",
                code="invalid_value",
                param="expires_after.anchor",
            )
        lowest, highest = EXPIRY_SECONDS
        if (
            seconds is None
            or not re.fullmatch(r"[0-9]{1,9}", seconds)
            or not lowest <= int(seconds) <= highest
        ):
            raise Problem(
                400,
                f"Invalid 'expires_after.seconds': it is between {lowest} and {highest}.",
                code="invalid_value",
                param="expires_after.seconds",
            )
        return int(seconds)

    def take(self) -> bytes:
        """Return the pending bytes of the file; they are the caller's from now on."""
        taken = bytes(self.pending)
        self.pending.clear()
        return taken

    @property
    def _in_file(self) -> bool:
        return self._name == "file"

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise Problem(400, f"The form has more than {_MAX_PARTS} parts.")
        self._name = ""
        self._value.clear()
        self._header.clear()
        self._header_value.clear()

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            if self._in_file and b"filename" in options:
                self.filename = options[b"filename"].decode("utf-8", "replace")
        self._header.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        if not self._name:
            raise Problem(400, "A part of the form has no name.")
        if not self._in_file:
            return
        if self.has_file:
            raise Problem(400, "The form has more than one file.", param="file")
        self.has_file = True

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._num_file_bytes += end - start
            if self._num_file_bytes > self._max_file_bytes:
                raise too_large(self._max_file_bytes)
            self.pending += memoryview(data)[start:end]
            return
        if len(self._value) + end - start > _MAX_FIELD_BYTES:
            raise Problem(400, "A field of the form is too long.", param=self._name[:64])
        self._value += data[start:end]

    def _end_part(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.ended = True


def too_large(max_file_bytes: int) -> Problem:
    """Return what is answered to a file that is larger than the settings allow."""
    return Problem(
        413, f"The file has more than {max_file_bytes} bytes.", code="file_too_large", param="file"
    )


def _missing(name: str) -> Problem:
    return Problem(
        400,
        f"Missing required parameter: '{name}'.",
        code="missing_required_parameter",
        param=name,
    )


def _malformed() -> Problem:
    return Problem(400, "The body is not a well-formed multipart form.", code="invalid_multipart")


def clean_filename(name: str | None) -> str:
    """Return a file name that is safe to show and to save under: never a path, never empty."""
    name = _CONTROLS.sub("", (name or "").replace("\\", "/")).rpartition("/")[2].strip()
    encoded = name.encode()
    if len(encoded) > _MAX_NAME_BYTES:
        # The end is kept: it has the extension.
        name = encoded[-_MAX_NAME_BYTES:].decode("utf-8", "ignore")
    return "upload" if name in {"", ".", ".."} else name


async def receive_form(
    request: Request, context: Context, *, key: str, max_file_bytes: int
) -> tuple[Form, BlobInfo]:
    """Write the file of a form under `key` and return the form, and what was written.

    Raises:
        Problem: the form is malformed, too large, has no file or ends early, or its sender
            stalls; nothing is left of it then.
        ClientDisconnect: its sender went away; likewise.
    """
    form = Form(request.headers.get("content-type"), max_file_bytes=max_file_bytes)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_file_bytes + _FORM_BYTES:
        raise too_large(max_file_bytes)
    writer: BlobWriter = await context.run(context.app.blobs.open_writer, key)
    try:
        async for chunk in _chunks(request, context.stall_seconds):
            form.feed(chunk)
            if len(form.pending) >= PIECE_BYTES:
                form.check_purpose()
                await context.run(writer.write, form.take())
        form.check()
        if form.pending:
            await context.run(writer.write, form.take())
        return form, await context.run(writer.commit)
    finally:
        with anyio.CancelScope(shield=True):
            await context.run(writer.__exit__, None, None, None)


async def _chunks(request: Request, stall_seconds: float) -> AsyncIterator[bytes]:
    """Yield the body as it comes; not for a sender that has all but stopped sending."""
    stream = request.stream()
    loop = asyncio.get_running_loop()
    deadline, num_bytes = loop.time() + stall_seconds, 0
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise Problem(
                408,
                f"Only {num_bytes} bytes arrived in {stall_seconds:g} seconds.",
                code="request_timeout",
            ) from None
        if chunk is None:
            return
        num_bytes += len(chunk)
        if num_bytes >= _MIN_PROGRESS_BYTES:
            deadline, num_bytes = loop.time() + stall_seconds, 0
        yield chunk
