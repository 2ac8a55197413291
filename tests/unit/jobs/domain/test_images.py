"""Images among the parts of a message: what is read, and what is refused."""

import json
import struct
from io import BytesIO
from typing import Any

import pytest
from PIL import Image as Pillow

from jobs.domain.errors import InvalidLine
from jobs.domain.images import Image, ImageLimits, read_bytes
from jobs.domain.request import CHAT, Capabilities, parse_line
from jobs.domain.sketch import Sketcher
from tests.builders import make_line
from tests.seeing import data_url, image_part, make_bomb, make_image, text_part


def line_of(*parts: dict[str, Any], role: str = "user") -> bytes:
    return make_line(messages=[{"role": role, "content": list(parts)}])


def read(*parts: dict[str, Any]) -> tuple[str | Image, ...]:
    (message,) = parse_line(line_of(*parts), endpoint=CHAT).messages or ()
    return message.parts


def refusal(line: bytes) -> tuple[str, str | None]:
    """Return why a line is refused; planning and whoever runs it say the same."""
    with pytest.raises(InvalidLine) as planned:
        Sketcher(CHAT).sketch(line)
    with pytest.raises(InvalidLine) as read:
        parse_line(line, endpoint=CHAT)
    assert str(planned.value) == str(read.value)
    assert planned.value.param == read.value.param
    return planned.value.error_code, planned.value.param


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_an_image_of_each_kind_is_read_with_its_size(kind: str) -> None:
    content = make_image(1, kind=kind, size=(41, 23))
    (image,) = read(image_part(content, kind))
    assert image == Image(content, kind, 41, 23)  # type: ignore[arg-type]


def test_a_lossy_webp_and_one_with_transparency_have_their_sizes() -> None:
    for mode, options in (("RGB", {"lossless": False}), ("RGBA", {"lossless": False})):
        file = BytesIO()
        Pillow.new(mode, (300, 200), 7).save(file, format="webp", **options)
        image = read_bytes(file.getvalue(), detail=None, param="x")
        assert (image.width, image.height) == (300, 200)


def test_a_jpeg_with_much_before_its_frame_has_its_size() -> None:
    content = make_image(1, kind="jpeg", size=(41, 23))
    padding = b"\xff\xe1" + struct.pack(">H", 65_535) + bytes(65_533)
    image = read_bytes(
        content[:2] + padding * 3 + b"\xff" * 3 + content[2:], detail=None, param="x"
    )
    assert (image.kind, image.width, image.height) == ("jpeg", 41, 23)


def test_texts_and_images_keep_their_order() -> None:
    first, second = make_image(1), make_image(2)
    parts = read(text_part("a"), image_part(first), text_part("b"), image_part(second))
    assert [part if isinstance(part, str) else part.content for part in parts] == [
        "a",
        first,
        "b",
        second,
    ]
    line = parse_line(line_of(text_part("a"), image_part(first), text_part("b")), endpoint=CHAT)
    assert (line.messages or ())[0].content == "a\nb"


def test_texts_alone_stay_one_text() -> None:
    (message,) = parse_line(line_of(text_part("a"), text_part("b")), endpoint=CHAT).messages or ()
    assert (message.content, message.parts) == ("a\nb", ())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "file-abc", "detail": "low"}},
        {"type": "image_file", "image_file": {"file_id": "file-abc", "detail": "low"}},
        {"type": "input_image", "file_id": "file-abc", "detail": "low"},
        {"type": "input_image", "image_url": "file-abc", "detail": "low"},
    ],
    ids=json.dumps,
)
def test_a_file_is_named_in_each_way_that_openai_spells_it(part: dict[str, Any]) -> None:
    assert read(part) == (Image(file_id="file-abc", detail="low"),)


URL = "body.messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.com/cat.png", "remote_images_refused"),
        ("HTTP://127.0.0.1/", "remote_images_refused"),
        ("//example.com/cat.png", "remote_images_refused"),
        ("ftp://example.com/cat.png", "remote_images_refused"),
        ("file:///etc/passwd", "invalid_image"),
        ("/etc/passwd", "invalid_image"),
        ("file-../../secret", "invalid_image"),
        ("data:image/png,abc", "invalid_image"),
        ("data:text/html;base64,AAAA", "invalid_image"),
        ("data:image/svg+xml;base64,AAAA", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64,AAAA", "invalid_image"),
        ("data:image/png;base64,not base64!", "invalid_image"),
        (data_url(make_image())[:-1], "invalid_image"),
        (data_url(make_image(), "jpeg"), "invalid_image"),
        (data_url(make_image()[:20]), "invalid_image"),
        (data_url(make_bomb(0, 0)), "invalid_image"),
        (data_url(b"\xff\xd8\xff\xd9", "jpeg"), "invalid_image"),
        (data_url(b"\xff\xd8" + b"\xff" * 100, "jpeg"), "invalid_image"),
        (data_url(b"RIFF\x00\x00\x00\x00WEBPVP9 " + bytes(40), "webp"), "invalid_image"),
    ],
)
def test_what_is_no_image_is_refused_where_it_stands(url: str, code: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    assert refusal(line_of(part)) == (code, URL)


def test_the_part_that_is_wrong_is_named() -> None:
    wrong = {"type": "image_url", "image_url": {"url": "https://x.example/"}}
    line = make_line(
        messages=[
            {"role": "user", "content": "x"},
            {"role": "user", "content": [text_part("a"), image_part(make_image()), wrong]},
        ]
    )
    assert refusal(line) == ("remote_images_refused", "body.messages[1].content[2].image_url.url")


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_a_user_shows_images(role: str) -> None:
    line = line_of(image_part(make_image()), role=role)
    assert refusal(line) == ("invalid_messages", "body.messages[0].content")


def test_an_input_image_has_one_source() -> None:
    both = {"type": "input_image", "file_id": "file-a", "image_url": "file-b"}
    for part in (both, {"type": "input_image"}):
        assert refusal(line_of(part))[0] == "invalid_value"


def test_limits_hold_for_number_bytes_and_pixels() -> None:
    image = read_bytes(make_image(size=(100, 50)), detail=None, param="x")
    ImageLimits(max_images=2, max_bytes=2 * len(image.content), max_pixels=5000).check([image] * 2)
    for limits, code in (
        (ImageLimits(max_images=1), "too_many_images"),
        (ImageLimits(max_bytes=2 * len(image.content) - 1), "image_too_large"),
        (ImageLimits(max_pixels=4999), "image_too_large"),
    ):
        with pytest.raises(InvalidLine) as raised:
            limits.check([image] * 2)
        assert raised.value.error_code == code


def test_a_bomb_is_known_by_its_header() -> None:
    image = read_bytes(make_bomb()[:64], detail=None, param="x")
    assert (image.width, image.height) == (60_000, 60_000)
    with pytest.raises(InvalidLine, match="60000 x 60000"):
        ImageLimits().check([image])


def test_an_image_that_would_grow_when_it_is_scaled_is_refused() -> None:
    ImageLimits().check([Image(b"", "png", 10, 2000)])
    for size in ((10, 2001), (2001, 10)):
        with pytest.raises(InvalidLine, match="200 times"):
            ImageLimits().check([Image(b"", "png", *size)])


def test_a_model_without_eyes_refuses_images() -> None:
    blind = Capabilities(model="m", engine="hf", parameters=())
    with pytest.raises(InvalidLine, match="takes no images") as raised:
        parse_line(line_of(image_part(make_image())), endpoint=CHAT, capabilities=blind)
    assert raised.value.error_code == "unsupported_parameter"


def test_lines_with_other_images_are_other_requests() -> None:
    def digest(*parts: dict[str, Any]) -> bytes:
        return Sketcher(CHAT).sketch(line_of(*parts)).digest()

    one, other = image_part(make_image(1)), image_part(make_image(2))
    assert digest(text_part("x"), one) == digest(text_part("x"), one)
    assert digest(text_part("x"), one) != digest(text_part("x"), other)
    assert digest(text_part("x"), one) != digest(one, text_part("x"))
    assert digest(text_part("x"), one) != digest(text_part("x"))


def test_a_data_url_comes_back_as_it_was() -> None:
    url = data_url(make_image())
    (image,) = read({"type": "image_url", "image_url": {"url": url}})
    assert isinstance(image, Image)
    assert image.data_url() == url
