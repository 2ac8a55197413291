"""Images among the parts of a message: where they come from, and what their first bytes say.

Planning reads headers only, so that an image of any number of pixels costs it nothing; whether
the rest is sound is found out where it is decoded, for that line alone.
"""

import binascii
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import msgspec

from jobs.domain.errors import InvalidLine

ImageKind = Literal["png", "jpeg", "webp", "gif"]
Detail = Literal["auto", "low", "high", "original"]
_Url = Annotated[str, msgspec.Meta(min_length=1)]

MAX_READABLE_PIXELS = 89_478_485
"""What Pillow takes for an attack beyond; no setting allows more."""
_MAX_STRETCH = 200
"""Models scale the shorter side to a size of theirs, and the other with it."""
_DATA = re.compile(r"data:([a-z0-9.+/-]{1,64});base64,", re.IGNORECASE)
_REMOTE = re.compile(r"\s*(?:(?:https?|ftps?|wss?):|//)", re.IGNORECASE)
_FILE_ID = re.compile(r"file-[A-Za-z0-9_-]{1,123}")
_MEDIA_TYPES: dict[str, ImageKind] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/jpg": "jpeg",
    "image/webp": "webp",
    "image/gif": "gif",
}
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""Markers of a JPEG behind which its size stands."""
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers of a JPEG behind which nothing stands."""
_END_OF_IMAGE, _START_OF_SCAN, _FILL = 0xD9, 0xDA, 0xFF


# --- how it is written ---


class ImageUrl(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Where the bytes of an image are: in a `data:` URL, or in an uploaded file by its id."""

    url: _Url
    detail: Detail | None = None


class FileReference(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """An uploaded file."""

    file_id: _Url
    detail: Detail | None = None


class ImageUrlPart(msgspec.Struct, tag_field="type", tag="image_url", forbid_unknown_fields=True):
    """An image, as chats hold it."""

    image_url: ImageUrl


class ImageFilePart(msgspec.Struct, tag_field="type", tag="image_file", forbid_unknown_fields=True):
    """An image, as assistants hold it."""

    image_file: FileReference


class InputImagePart(
    msgspec.Struct,
    tag_field="type",
    tag="input_image",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """An image, as responses hold it."""

    image_url: _Url | None = None
    file_id: _Url | None = None
    detail: Detail | None = None


WireImage = ImageUrlPart | ImageFilePart | InputImagePart


# --- what an engine gets ---


class Image(msgspec.Struct, frozen=True, array_like=True):
    """One image: its bytes as they were sent, and the size that they say it has.

    With a `file_id` and no bytes it stands for a file that has not been read yet.
    """

    content: bytes = b""
    kind: ImageKind = "png"
    width: int = 0
    height: int = 0
    detail: Detail | None = None
    file_id: str = ""

    def data_url(self) -> str:
        """Return it as a `data:` URL."""
        text = binascii.b2a_base64(self.content, newline=False).decode()
        return f"data:image/{self.kind};base64,{text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What the images of one line may have; bytes are those of all of them together."""

    max_images: int = 16
    max_bytes: int = 8 << 20
    max_pixels: int = 16 << 20

    def check(self, images: Sequence[Image]) -> None:
        """Do nothing if a line may have these images.

        Raises:
            InvalidLine: they are too many, or one is too large.
        """
        if len(images) > self.max_images:
            raise InvalidLine(
                f"This line has {len(images)} images; at most {self.max_images} are allowed "
                "(limits.max_images).",
                param="body.messages",
                error_code="too_many_images",
            )
        num_bytes = sum(len(image.content) for image in images)
        if num_bytes > self.max_bytes:
            raise too_large_in_bytes(num_bytes, self.max_bytes)
        for image in images:
            if image.width * image.height > self.max_pixels:
                raise InvalidLine(
                    f"An image has {image.width} x {image.height} pixels; at most "
                    f"{self.max_pixels} in all are allowed (limits.max_image_pixels).",
                    param="body.messages",
                    error_code="image_too_large",
                )
            if max(image.width, image.height) > _MAX_STRETCH * min(image.width, image.height):
                raise InvalidLine(
                    f"An image has {image.width} x {image.height} pixels; no side may be more "
                    f"than {_MAX_STRETCH} times as long as the other.",
                    param="body.messages",
                    error_code="image_too_large",
                )


def too_large_in_bytes(num_bytes: int, limit: int) -> InvalidLine:
    """Return what is wrong with a line whose images have so many bytes."""
    return InvalidLine(
        f"The images of this line have {num_bytes} bytes; at most {limit} are allowed "
        "(limits.max_image_bytes).",
        param="body.messages",
        error_code="image_too_large",
    )


def read_image(part: WireImage) -> Image:
    """Return the image that a part of a message stands for.

    Raises:
        InvalidLine: it says in no allowed way where its bytes are, or these are no image; `param`
            begins at the part.
    """
    if isinstance(part, ImageUrlPart):
        return _read_url(part.image_url.url, part.image_url.detail, "image_url.url")
    if isinstance(part, ImageFilePart):
        found = part.image_file
        return _refer(found.file_id, found.detail, "image_file.file_id")
    if (part.image_url is None) == (part.file_id is None):
        raise InvalidLine(
            "An input_image has exactly one of image_url and file_id.",
            param="image_url",
            error_code="invalid_value",
        )
    if part.file_id is not None:
        return _refer(part.file_id, part.detail, "file_id")
    return _read_url(part.image_url or "", part.detail, "image_url")


def read_bytes(content: bytes, *, detail: Detail | None, param: str) -> Image:
    """Return an image from its bytes, of which the header is looked at.

    Raises:
        InvalidLine: they are no image of a known kind.
    """
    found = _read_header(content)
    if found is None or found.width < 1 or found.height < 1:
        raise _wrong("These bytes are no PNG, JPEG, WebP or GIF image", param)
    return Image(content, found.kind, found.width, found.height, detail)


def _wrong(what: str, param: str) -> InvalidLine:
    return InvalidLine(f"{what}.", param=param, error_code="invalid_image")


def _refer(file_id: str, detail: Detail | None, param: str) -> Image:
    if not _FILE_ID.fullmatch(file_id):
        raise _wrong("The id of an uploaded file begins with file-", param)
    return Image(file_id=file_id, detail=detail)


def _read_url(url: str, detail: Detail | None, param: str) -> Image:
    if _FILE_ID.fullmatch(url):
        return Image(file_id=url, detail=detail)
    if _REMOTE.match(url):
        raise InvalidLine(
            "Images are never fetched from other machines; send a data: URL, or upload a file and "
            "give its id.",
            param=param,
            error_code="remote_images_refused",
        )
    data = _DATA.match(url)
    if data is None:
        raise _wrong("An image is a data: URL with base64, or the id of an uploaded file", param)
    kind = _MEDIA_TYPES.get(data[1].lower())
    if kind is None:
        raise _wrong(f"An image is one of {', '.join(_MEDIA_TYPES)}", param)
    try:
        content = binascii.a2b_base64(url[data.end() :], strict_mode=True)
    except ValueError:
        raise _wrong("This is not base64", param) from None
    image = read_bytes(content, detail=detail, param=param)
    if image.kind != kind:
        raise _wrong(f"The URL says {data[1].lower()}, and its bytes are {image.kind}", param)
    return image


# --- headers ---


class _Header(NamedTuple):
    kind: ImageKind
    width: int
    height: int


def _read_header(content: bytes) -> _Header | None:
    """Return kind and size of an image; None where its first bytes are those of none."""
    if content.startswith(_PNG) and len(content) >= len(_PNG) + 8:
        return _Header("png", *struct.unpack_from(">II", content, len(_PNG)))
    if content[:6] in {b"GIF87a", b"GIF89a"} and len(content) > 10:  # noqa: PLR2004 -- its header
        return _Header("gif", *struct.unpack_from("<HH", content, 6))
    if content.startswith(b"\xff\xd8"):
        return _read_jpeg(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP" and len(content) >= 30:  # noqa: PLR2004
        return _read_webp(content)
    return None


def _read_jpeg(content: bytes) -> _Header | None:
    """Return the size that the first frame has; segments before it are leapt over."""
    for marker, at in _segments(content):
        if marker in _FRAMES and at + 9 <= len(content):
            height, width = struct.unpack_from(">HH", content, at + 5)
            return _Header("jpeg", width, height)
        if marker == _START_OF_SCAN:
            return None
    return None


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment of a JPEG, and where its length begins less 2."""
    at = 2
    while at + 4 <= len(content) and content[at] == _FILL:
        marker = content[at + 1]
        if marker == _FILL:  # filling may stand before any marker
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker == _END_OF_IMAGE:
            return
        else:
            yield marker, at
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")


def _read_webp(content: bytes) -> _Header | None:
    kind = content[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(content[24:27], "little")
        return _Header("webp", width, 1 + int.from_bytes(content[27:30], "little"))
    if kind == b"VP8L" and content[20] == 0x2F:  # noqa: PLR2004 -- its signature
        bits = int.from_bytes(content[21:25], "little")
        return _Header("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return _Header("webp", width & 0x3FFF, height & 0x3FFF)
    return None
