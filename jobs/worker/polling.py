"""A worker without Celery, for a fleet without a broker: it looks at the database by itself.

`python -m jobs.worker.polling`; SIGTERM or Ctrl-C ends it in order.
"""

import os
import signal
import sys
import threading

from jobs.domain.errors import BatchctlError
from jobs.settings import load
from jobs.telemetry import configure_logging
from jobs.worker import process


def main() -> None:
    """Work until told to stop."""
    try:
        settings = load()
        configure_logging(level=settings.log.level, form=settings.log.format)
        process.check(settings)
    except BatchctlError as error:
        sys.exit(f"error: {error.message}")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    process.start(settings)
    stopping.wait()
    process.stop()
    # Threads that did not end in the time for draining hold nothing that a lease does not cover.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
