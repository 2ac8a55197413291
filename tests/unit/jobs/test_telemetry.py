import json
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import structlog

from jobs.domain.errors import StorageError
from jobs.telemetry import bind_process, bound, configure_logging, log

CANARY = "what-the-caller-wrote"


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Return what went to standard error; logging is as before at the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield lambda: capsys.readouterr().err
    root.handlers[:], root.level = before
    structlog.reset_defaults()
    bind_process()


def choke(text: str) -> None:
    local_variable = text
    try:
        int(local_variable)
    except ValueError as error:
        raise StorageError("A thing of ours failed.") from error


@pytest.mark.parametrize("form", ["console", "json"])
def test_an_exception_shows_where_it_came_from_and_not_what_it_quotes(
    logged: Callable[[], str], form: Literal["console", "json"]
) -> None:
    configure_logging(level="debug", form=form)
    try:
        choke(CANARY)
    except StorageError:
        log.exception("failed_ours")
        logging.getLogger("a.library").exception("failed_theirs")
    text = logged()
    assert CANARY not in text
    assert text.count("in choke") == 4, "two exceptions, each logged twice"
    assert text.count("ValueError") == 2
    assert text.count("StorageError: A thing of ours failed.") == 2


def test_events_carry_the_ids_of_their_process_and_block(logged: Callable[[], str]) -> None:
    configure_logging(level="info", form="json")
    bind_process(worker_id="worker_1")
    with bound(unit_id="unit_1"):
        log.info("inside")
        logging.getLogger("a.library").info("theirs")
    log.info("outside", worker_id="another")
    inside, theirs, outside = map(json.loads, logged().splitlines())
    assert (inside["worker_id"], inside["unit_id"]) == ("worker_1", "unit_1")
    assert (theirs["worker_id"], theirs["logger"]) == ("worker_1", "a.library")
    assert outside["worker_id"] == "another"
    assert "unit_id" not in outside


def test_libraries_that_log_bodies_are_not_asked_for_details(logged: Callable[[], str]) -> None:
    configure_logging(level="debug", form="json")
    library = logging.getLogger("botocore.of_this_test")  # import-linter disables those there are
    library.debug("Making request with params: %s", CANARY)
    library.warning("a warning")
    log.debug("ours")
    events = [json.loads(line)["event"] for line in logged().splitlines()]
    assert events == ["a warning", "ours"]


def test_away_from_a_terminal_logs_are_json(logged: Callable[[], str]) -> None:
    configure_logging(level="info", form="auto")
    log.info("something", number=3)
    assert json.loads(logged())["number"] == 3
