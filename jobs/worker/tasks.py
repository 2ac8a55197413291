"""The tasks: each a wake-up for the one loop of its kind in this process.

Arguments are ids; whatever they say, only the database decides what is run.
"""

from jobs.broker import FINALIZE, PLAN, SWEEP, WORK
from jobs.worker import process
from jobs.worker.celery_app import app


@app.task(name=WORK)  # type: ignore[untyped-decorator]
def work(model: str = "") -> None:
    """Run shards until there are none; `model` only says whose queue it came from."""
    del model
    process.wake("work")


@app.task(name=PLAN)  # type: ignore[untyped-decorator]
def plan() -> None:
    """Plan batches, or write files, until there is nothing of the kind."""
    process.wake("control")


@app.task(name=FINALIZE)  # type: ignore[untyped-decorator]
def finalize() -> None:
    """Write files, or plan batches, until there is nothing of the kind."""
    process.wake("control")


@app.task(name=SWEEP)  # type: ignore[untyped-decorator]
def sweep() -> None:
    """Look for expired leases and forgotten work now."""
    process.wake("sweep")
