"""Every exception as an HTTP answer in the four-key envelope of the OpenAI API.

    who must act                  status  code
    InvalidInput                  400     its own error_code
    request validation            400     missing_required_parameter, invalid_type, ...
    NotFound                      404     null; model_not_found for models
    Conflict                      409     null; x-should-retry: false
    retryable storage or engine   503     its own code; retry-after
    anything else                 500     its own code, or internal_error

Source: section 2 of the OpenAI batch contract; the client retries 408, 409, 429 and every 5xx
unless `x-should-retry` says otherwise.
"""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from typing_extensions import override

from jobs.domain.errors import (
    BatchctlError,
    Conflict,
    EngineError,
    InvalidInput,
    NotFound,
    StorageError,
)
from jobs.telemetry import log

_MAX_PARAM = 200
_RETRY_AFTER_SECONDS = 1
_UNAVAILABLE = "The service cannot reach its storage at the moment; try again shortly."
_BROKEN = "The service failed to answer; the operator finds the reason under this request's id."


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="What happened, to which id, and what to do.")
    type: str = Field(description="The group: invalid_request_error, server_error, ...")
    param: str | None = Field(description="The parameter that is to blame.")
    code: str | None = Field(description="A stable name of the error.")


class ErrorEnvelope(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Problem(HTTPException):
    """An answer that is not a success; all that a handler has to raise."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=dict(headers or {}))
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind or ("server_error" if self.is_ours else "invalid_request_error")

    @property
    def is_ours(self) -> bool:
        """Whether the server is to blame."""
        return self.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR


class ServerStopping(BatchctlError):
    """The server goes down while a stream is not complete."""

    code = "server_stopping"


class _AsciiResponse(JSONResponse):
    """JSON in ASCII: a message may quote what cannot be written as UTF-8."""

    @override
    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def render_problem(problem: Problem) -> JSONResponse:
    """Return the answer that `problem` stands for."""
    body = {
        "error": {
            "message": problem.message,
            "type": problem.kind,
            "param": problem.param,
            "code": problem.code,
        }
    }
    return _AsciiResponse(body, status_code=problem.status_code, headers=problem.headers)


def to_problem(error: Exception) -> Problem:  # noqa: PLR0911  a table, read from the top
    """Return what the caller may know of `error`."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return _from_validation(error.errors())
    if isinstance(error, StarletteHTTPException):
        return _from_framework(error)
    if isinstance(error, InvalidInput):
        return Problem(400, error.message, code=error.error_code, param=error.param)
    if isinstance(error, NotFound):
        return Problem(404, error.message, param=error.param)
    if isinstance(error, Conflict):
        # Nothing that changes by itself within the client's few seconds of retrying.
        return Problem(409, error.message, param=error.param, headers={"x-should-retry": "false"})
    if isinstance(error, BatchctlError):
        return _from_failure(error)
    return Problem(500, _BROKEN, code="internal_error")


def _from_failure(error: BatchctlError) -> Problem:
    # The message of a storage or engine error names hosts and paths: for the log only.
    if error.retryable and isinstance(error, StorageError | EngineError):
        return Problem(
            503,
            _UNAVAILABLE,
            code=error.code,
            headers={"retry-after": str(_RETRY_AFTER_SECONDS)},
        )
    return Problem(500, _BROKEN, code=error.code, headers={"x-should-retry": "false"})


def _from_framework(error: StarletteHTTPException) -> Problem:
    status = error.status_code
    if status == HTTPStatus.NOT_FOUND:
        return Problem(404, "There is no such route.", code="unknown_url")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return Problem(
            405,
            "This route does not have this method.",
            code="method_not_allowed",
            headers=error.headers,
        )
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:
        status = HTTPStatus.BAD_REQUEST
    return Problem(status, str(error.detail), headers=error.headers)


def _from_validation(errors: Sequence[Any]) -> Problem:
    """Return the first thing that is wrong with a request."""
    first = errors[0]
    kind, where = str(first["type"]), [str(part) for part in first["loc"]]
    if kind == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "")
        return Problem(
            400, f"The body is not JSON: {reason} at byte {where[-1]}.", code="invalid_json"
        )
    if where == ["body"]:
        return Problem(
            400,
            "The body has to be a JSON object, sent with Content-Type: application/json.",
            code="missing_required_parameter" if kind == "missing" else "invalid_type",
        )
    param = ".".join(where[1:]).removesuffix(".[key]")[:_MAX_PARAM]
    if kind == "missing":
        return Problem(
            400,
            f"Missing required parameter: '{param}'.",
            code="missing_required_parameter",
            param=param,
        )
    if kind == "extra_forbidden":
        return Problem(400, f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param)
    message = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return Problem(400, f"Invalid '{param}': {message}.", code=code, param=param)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Return the answer to a request whose handler raised `error`."""
    problem = to_problem(error)
    if problem.is_ours:
        log_failure(error, request.scope)
    return render_problem(problem)


def log_failure(error: Exception, scope: Mapping[str, Any]) -> None:
    """Log what went wrong and where; what foreign exceptions say may quote bodies."""
    where = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        where.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    route = scope.get("route")
    log.error(
        "api_failed",
        request_id=scope.get("batchctl.request_id"),
        method=scope.get("method"),
        route=getattr(route, "path", None),
        kind=type(error).__name__,
        reason=error.message if isinstance(error, BatchctlError) else None,
        where=" ".join(where[-3:]),
    )
