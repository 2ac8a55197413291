"""Keeps what Celery says about its broker to one line each time, without anybody's content."""

import logging
import threading

from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import consumer
from typing_extensions import override

_CONSUMER = "celery.worker.consumer.consumer"
_CONNECTION = "celery.worker.consumer.connection"
_LOST = (consumer.CONNECTION_ERROR, consumer.CONNECTION_RETRY, "%s (%r)")
_FOREIGN = (
    consumer.UNKNOWN_FORMAT,
    consumer.UNKNOWN_TASK_ERROR,
    consumer.INVALID_TASK_ERROR,
    consumer.MESSAGE_DECODE_ERROR,
)


class _OneLine(logging.Filter):
    """Says that the broker is lost once, until it is back; and nothing of foreign messages' text.

    Celery repeats the first at every try, with a traceback, and quotes the second at length.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._is_away = False

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == _CONNECTION:
            with self._lock:
                self._is_away = False  # it says "Connected to"
            return True
        if record.msg in _FOREIGN:
            self._rewrite(record, "A message that is none of ours was dropped.")
        elif record.msg in _LOST:
            with self._lock:
                was_away, self._is_away = self._is_away, True
            self._rewrite(
                record, "The broker does not answer; work goes on by looking at the database."
            )
            return not was_away
        return True

    @staticmethod
    def _rewrite(record: logging.LogRecord, text: str) -> None:
        record.msg, record.args = text, ()
        record.exc_info, record.exc_text = None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"


def quieten() -> None:
    """Let Celery's consumer be brief, in this process."""
    brief = _OneLine()
    # Two lines for each message, most of which find nothing to do; alembic's at each start.
    for name in ("alembic", "celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Advice about a setting that was chosen, at each lost connection. Celery turns it on itself.
    logging.getLogger("py.warnings").addFilter(
        lambda record: CPendingDeprecationWarning.__name__ not in record.getMessage()
    )
    for name in (_CONSUMER, _CONNECTION):
        logging.getLogger(name).addFilter(brief)
