"""Decodes the images of requests; what is damaged costs the request that shows it."""

from io import BytesIO

from PIL import Image as Pillow
from PIL import ImageOps

from jobs.domain.errors import InvalidLine
from jobs.domain.images import Image


def decode(image: Image) -> Pillow.Image:
    """Return an image's pixels as RGB, the right way up; of several frames the first.

    Nothing is decoded that is larger than what was looked at before.

    Raises:
        InvalidLine: its bytes are cut off or damaged.
    """
    try:
        with Pillow.open(BytesIO(image.content), formats=[image.kind]) as opened:
            if opened.size == (image.width, image.height):
                opened.load()
                return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception:  # noqa: BLE001 -- decoders fail in many ways
        raise _damaged() from None
    raise _damaged()


def _damaged() -> InvalidLine:
    return InvalidLine(
        "An image is damaged, or cut off before its end.",
        param="messages",
        error_code="invalid_image",
    )
