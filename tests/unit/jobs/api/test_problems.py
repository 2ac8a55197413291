import json
from collections.abc import Iterator

import pytest
from starlette.exceptions import HTTPException

from jobs.api.problems import Problem, render_problem, to_problem
from jobs.domain import errors
from jobs.domain.errors import BatchctlError


def every_error(above: type[BatchctlError] = BatchctlError) -> Iterator[type[BatchctlError]]:
    yield above
    for below in above.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from every_error(below)


@pytest.mark.parametrize("kind", list(every_error()))
def test_every_error_has_an_answer_with_the_four_keys(kind: type[BatchctlError]) -> None:
    response = render_problem(to_problem(kind("postgresql://secret@host failed")))
    body = json.loads(bytes(response.body))
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.status_code in {400, 404, 409, 500, 503}
    if response.status_code >= 500:
        assert "secret" not in body["error"]["message"]
        assert body["error"]["type"] == "server_error"


@pytest.mark.parametrize("kind", list(every_error()))
def test_the_client_repeats_exactly_what_may_pass(kind: type[BatchctlError]) -> None:
    response = render_problem(to_problem(kind("x")))
    if response.status_code == 503:
        assert kind.retryable
        assert "retry-after" in response.headers
    elif response.status_code >= 409:
        assert response.headers["x-should-retry"] == "false"


def test_foreign_error_says_nothing_of_itself() -> None:
    problem = to_problem(RuntimeError("prompt of somebody"))
    assert problem.status_code == 500
    assert "prompt" not in problem.message


def test_the_framework_s_422_is_a_400() -> None:
    assert to_problem(HTTPException(422, "x")).status_code == 400


def test_message_that_is_no_utf_8_is_sent() -> None:
    assert b"\\ud800" in bytes(render_problem(Problem(400, "\ud800")).body)
