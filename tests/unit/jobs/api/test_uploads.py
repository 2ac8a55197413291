import hypothesis.strategies as st
import pytest
from hypothesis import given

from jobs.api.problems import Problem
from jobs.api.uploads import Form, clean_filename

BOUNDARY = "----b0undary"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, content: bytes, *, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
PURPOSE = part("purpose", b"batch")


def parse(body: bytes, *, step: int = 65_536, limit: int = 1 << 20) -> tuple[Form, bytes]:
    form = Form(CONTENT_TYPE, max_file_bytes=limit)
    content = b""
    for at in range(0, len(body), step):
        form.feed(body[at : at + step])
        content += form.take()
    form.check()
    return form, content


@given(content=st.binary(max_size=300), step=st.integers(1, 64), file_first=st.booleans())
def test_any_file_arrives_whole_however_it_is_cut(
    content: bytes, step: int, *, file_first: bool
) -> None:
    parts = [PURPOSE, part("file", content, filename="a.jsonl")]
    form, arrived = parse(b"".join(parts[:: -1 if file_first else 1]) + END, step=step)
    assert arrived == content
    assert form.filename == "a.jsonl"
    assert form.fields == {"purpose": "batch"}


@given(content=st.lists(st.sampled_from([b"\r\n--", b"-", b"\r", b"\n", BOUNDARY.encode()[:-1]])))
def test_what_looks_like_a_boundary_and_is_none_is_content(content: list[bytes]) -> None:
    joined = b"".join(content)
    assert parse(PURPOSE + part("file", joined) + END, step=7)[1] == joined


def test_a_file_may_have_no_name() -> None:
    assert parse(PURPOSE + part("file", b"x") + END)[0].filename is None


def test_expiry_is_read() -> None:
    expiry = part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"3600")
    form, _ = parse(PURPOSE + expiry + part("file", b"") + END)
    assert form.expires_after_seconds == 3600


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (PURPOSE + END, "file"),
        (part("file", b"x") + END, "purpose"),
        (part("purpose", b"batch_output") + part("file", b"x") + END, "purpose"),
        (PURPOSE + part("file", b"x") + part("file", b"y") + END, "file"),
        (PURPOSE + part("expires_after[seconds]", b"3600") + part("file", b"") + END, "anchor"),
        (
            PURPOSE
            + part("expires_after[anchor]", b"created_at")
            + part("expires_after[seconds]", b"60")
            + part("file", b"")
            + END,
            "seconds",
        ),
        (part("purpose", b"x" * 100_000) + END, "purpose"),
        (PURPOSE + part("file", b"cut off"), None),
        (b"no form at all", None),
        (b"", None),
        (b"".join(part(f"f{n}", b"") for n in range(100)) + END, None),
        (f"--{BOUNDARY}\r\nA: {'x' * 100_000}".encode(), None),
        (f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\n\r\n".encode() + END, None),
    ],
)
def test_a_form_that_is_wrong_is_refused(body: bytes, param: str | None) -> None:
    with pytest.raises(Problem) as caught:
        parse(body)
    assert caught.value.status_code == 400
    assert (caught.value.param or "").endswith(param or "")


def test_a_file_over_the_limit_is_refused_while_it_arrives() -> None:
    with pytest.raises(Problem) as caught:
        parse(PURPOSE + part("file", b"x" * 2000), limit=1000)
    assert caught.value.status_code == 413


def test_padding_around_a_file_is_limited_too() -> None:
    with pytest.raises(Problem) as caught:
        parse(PURPOSE + part("file", b"x") + END + b"epilogue" * 300_000, limit=1000)
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    "content_type",
    [None, "", "application/json", "multipart/form-data", "multipart/form-data; boundary=",
     f"multipart/form-data; boundary={'b' * 1000}"],
)  # fmt: skip
def test_another_content_type_is_refused(content_type: str | None) -> None:
    with pytest.raises(Problem):
        Form(content_type, max_file_bytes=1000)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("a.jsonl", "a.jsonl"),
        (None, "upload"),
        ("", "upload"),
        ("..", "upload"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\x.jsonl", "x.jsonl"),
        ("a/b/", "upload"),
        ("a\0b\r\nSet-Cookie: x\x1b[2J", "abSet-Cookie: x[2J"),
        ("gpj.\u202etxt", "gpj.txt"),
        ("日本語 ü.jsonl", "日本語 ü.jsonl"),
    ],
)
def test_filename_is_never_a_path(name: str | None, clean: str) -> None:
    assert clean_filename(name) == clean


def test_long_filename_keeps_its_extension() -> None:
    clean = clean_filename("日" * 4000 + ".jsonl")
    assert clean.endswith("日.jsonl")
    assert len(clean.encode()) <= 255
