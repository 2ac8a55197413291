"""The tasks: each a wake-up for the one loop of its kind in this process.

A message names a model or nothing. Whatever it says is not looked at: the database decides what is
run, so that anything at all may stand there.
"""

from jobs.broker import FINALIZE, PLAN, SWEEP, WORK
from jobs.worker import process
from jobs.worker.celery_app import app


@app.task(name=WORK)  # type: ignore[untyped-decorator]
def work(*_: object, **__: object) -> None:
    """Run shards until there are none."""
    process.wake("work")


@app.task(name=PLAN)  # type: ignore[untyped-decorator]
def plan(*_: object, **__: object) -> None:
    """Plan batches, or write files, until there is nothing of the kind."""
    process.wake("control")


@app.task(name=FINALIZE)  # type: ignore[untyped-decorator]
def finalize(*_: object, **__: object) -> None:
    """Write files, or plan batches, until there is nothing of the kind."""
    process.wake("control")


@app.task(name=SWEEP)  # type: ignore[untyped-decorator]
def sweep(*_: object, **__: object) -> None:
    """Look for expired leases and forgotten work now."""
    process.wake("sweep")
