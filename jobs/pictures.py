"""Images that lines take from uploaded files: looked at by planning, read when the line runs."""

from collections.abc import Sequence

import msgspec

from jobs.domain.errors import BlobCorrupt, BlobMissing, InvalidLine, NotFound
from jobs.domain.ids import FileId, TenantId
from jobs.domain.images import Image, ImageLimits, read_bytes, too_large_in_bytes
from jobs.domain.request import Line, Message
from storage import files
from storage.blobs.base import BlobStore
from storage.database import Database

_MAX_REMEMBERED = 10_000


class Pictures:
    """The images of one tenant's files."""

    def __init__(self, db: Database, blobs: BlobStore, tenant_id: TenantId) -> None:
        """Look for files of this tenant only."""
        self._db = db
        self._blobs = blobs
        self._tenant_id = tenant_id
        self._sizes: dict[str, tuple[Image, int] | InvalidLine] = {}

    def check(self, images: Sequence[Image], limits: ImageLimits) -> None:
        """Do nothing if a line may have these images, files among them.

        Raises:
            InvalidLine: a file is not there or is no image, or there is too much of them.
            StorageError: a file could not be read.
        """
        found: list[Image] = []
        num_bytes = 0
        for number, image in enumerate(images):
            if not image.file_id or number >= limits.max_images:
                found.append(image)
                num_bytes += len(image.content)
                continue
            header, size = self._look_at(image, limits)
            found.append(header)
            num_bytes += size
        limits.check(found)
        if num_bytes > limits.max_bytes:
            raise too_large_in_bytes(num_bytes, limits.max_bytes)

    def fill(self, line: Line) -> tuple[Line, int]:
        """Return a line with the images of files read, and how many bytes these have.

        Raises:
            InvalidLine: a file is gone.
            StorageError: a file could not be read, and that may pass.
        """
        num_bytes = 0
        messages: list[Message] = []
        for message in line.messages or ():
            parts: list[str | Image] = []
            for part in message.parts:
                image = part
                if isinstance(part, Image) and part.file_id:
                    image = self._read(part)
                    num_bytes += len(image.content)
                parts.append(image)
            messages.append(msgspec.structs.replace(message, parts=tuple(parts)))
        return msgspec.structs.replace(line, messages=tuple(messages)), num_bytes

    def _look_at(self, image: Image, limits: ImageLimits) -> tuple[Image, int]:
        """Return what a file's header says, and the file's size; its bytes are not kept."""
        known = self._sizes.get(image.file_id)
        if known is None:
            try:
                size = self._find(image).num_bytes
                if size > limits.max_bytes:
                    raise too_large_in_bytes(size, limits.max_bytes)
                known = msgspec.structs.replace(self._read(image), content=b""), size
            except InvalidLine as error:
                known = error
            if len(self._sizes) >= _MAX_REMEMBERED:
                self._sizes.clear()
            self._sizes[image.file_id] = known
        if isinstance(known, InvalidLine):
            raise InvalidLine(known.message, param=known.param, error_code=known.error_code)
        return known

    def _find(self, image: Image) -> files.File:
        try:
            return files.get(self._db, FileId(image.file_id), tenant_id=self._tenant_id)
        except NotFound:
            raise _missing(image) from None

    def _read(self, image: Image) -> Image:
        try:
            content = self._blobs.get(self._find(image).blob_key)
        except (BlobMissing, BlobCorrupt):
            raise _missing(image) from None
        return read_bytes(content, detail=image.detail, param="body.messages")


def _missing(image: Image) -> InvalidLine:
    return InvalidLine(
        f"There is no file {image.file_id} to take an image from; upload it again.",
        param="body.messages",
        error_code="image_missing",
    )
