from datetime import timedelta

import pytest

from jobs.api.batches import parse_window
from jobs.domain.errors import InvalidInput


@pytest.mark.parametrize(
    ("window", "seconds"),
    [("24h", 86_400), ("90s", 90), ("30m", 1800), ("7d", 604_800), ("366d", 366 * 86_400)],
)
def test_window_is_a_duration(window: str, seconds: int) -> None:
    assert parse_window(window) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "window", ["", "0h", "-1h", "24", "h", "24 h", "1.5h", "367d", "999999999d", "24h\n", "٣h"]
)
def test_window_that_is_none_is_refused(window: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_window(window)
    assert caught.value.param == "completion_window"
