import pytest

from jobs.api.files import parse_range, render_disposition
from jobs.api.problems import Problem


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-", (0, 100)),
        ("bytes=10-19", (10, 20)),
        ("bytes=90-1000", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=-", None),
        ("bytes=20-10", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
    ],
)
def test_range_of_a_file_of_100_bytes(asked: str, part: tuple[int, int] | None) -> None:
    assert parse_range(asked, num_bytes=100) == part


@pytest.mark.parametrize("asked", ["bytes=100-", "bytes=-0"])
def test_range_behind_the_end_is_refused(asked: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_range(asked, num_bytes=100)
    assert caught.value.status_code == 416


def test_disposition_names_any_file_in_ascii_without_quotes() -> None:
    header = render_disposition('a"; evil="日.jsonl')
    assert header.isascii()
    assert header == (
        'attachment; filename="a__ evil=__.jsonl"; '
        "filename*=UTF-8''a%22%3B%20evil%3D%22%E6%97%A5.jsonl"
    )
