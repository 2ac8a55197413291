"""Logging in one place: ids, sizes, codes and durations; never a prompt or an answer.

Three things would bring them in by themselves, and are kept from it here: exceptions whose message
quotes what they choked on, tracebacks that show local variables, and libraries that log what they
send when they are asked for details.
"""

import logging
import sys
import traceback
from types import TracebackType
from typing import Literal

import structlog

from jobs.domain.errors import BatchctlError

log: structlog.stdlib.BoundLogger = structlog.get_logger("batchctl")

bound = structlog.contextvars.bound_contextvars
"""Within the block, every event of this thread carries these ids: `bound(unit_id=...)`."""

_MAX_CHAIN = 8
# Messages of ours, and those that the interpreter and the system word themselves. Another one may
# quote the text it failed on.
_SPEAKING = (BatchctlError, OSError, ImportError, AttributeError, NameError, RecursionError)
# They log bodies (botocore), or each call of their own (the others), at level debug.
_NO_DETAILS = ("asyncio", "boto3", "botocore", "s3transfer", "urllib3", "httpcore2", "httpx2")
# What these call information is of no use to an operator.
_CHATTY = ("alembic", "uvicorn")
_process_ids: dict[str, str] = {}

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def configure_logging(
    *, level: str = "WARNING", form: Literal["auto", "console", "json"] = "console"
) -> None:
    """Send every log, the libraries' too, to standard error in one form.

    Args:
        form: auto is console on a terminal, else json.
    """
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_process_ids,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _render_exception,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for library in _NO_DETAILS:
        logging.getLogger(library).setLevel(max(root.level, logging.WARNING))
    if root.level == logging.INFO:
        for library in _CHATTY:
            logging.getLogger(library).setLevel(logging.WARNING)


def bind_process(**ids: str) -> None:
    """Let every further event of this process carry these ids, and no others said so before."""
    _process_ids.clear()
    _process_ids.update(ids)


def _add_process_ids(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {**_process_ids, **event} if _process_ids else event


def _render_exception(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Say where an exception came from, and its message only where that quotes nobody."""
    found = _exc_info(event.pop("exc_info", None))
    if found is not None:
        event["exception"] = "\n".join(_describe(found[1]))
    return event


def _exc_info(given: object) -> _ExcInfo | None:
    if isinstance(given, BaseException):
        return type(given), given, given.__traceback__
    if isinstance(given, tuple):
        kind, error, where = given
        return (kind, error, where) if kind is not None else None
    if given:
        kind, error, where = sys.exc_info()
        return (kind, error, where) if kind is not None and error is not None else None
    return None


def _describe(error: BaseException) -> list[str]:
    lines: list[str] = []
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < _MAX_CHAIN:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    for one in reversed(chain):
        lines += [
            f"  {frame.filename}:{frame.lineno} in {frame.name}"
            for frame in traceback.extract_tb(one.__traceback__)
        ]
        name = type(one).__qualname__
        lines.append(f"{name}: {one}" if isinstance(one, _SPEAKING) else name)
    return lines
