"""What handlers work with, and how blocking work of theirs leaves the event loop."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Annotated, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from jobs.app import App
from jobs.domain.ids import DEFAULT_TENANT, TenantId

_T = TypeVar("_T")
_STREAM_THREADS = 16
MAX_UPLOADS = 64


@dataclass(frozen=True, kw_only=True)
class Context:
    """The App, who calls, and the switches of the running server.

    Attributes:
        on_work: called after a batch was created or cancelled.
        stall_seconds: how long an upload may send nothing.
        stopping: set when the server shuts down; whoever streams without an end then ends.
        threads: for blocking pieces of streams, so that slow clients never hold up the others.
        uploads: how many uploads may run at once.
    """

    app: App
    tenant_id: TenantId = DEFAULT_TENANT
    on_work: Callable[[], None] | None = None
    started_at: datetime
    stall_seconds: float
    stopping: threading.Event = field(default_factory=threading.Event)
    threads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_STREAM_THREADS)
    )
    uploads: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(MAX_UPLOADS)
    )

    def announce(self) -> None:
        """Tell whoever works that there is something to do."""
        self.app.doorbell.announce()
        if self.on_work is not None:
            self.on_work()

    async def run(self, function: Callable[..., _T], *args: object, **kwargs: object) -> _T:
        """Return what a blocking function returns, run in a thread."""
        return await anyio.to_thread.run_sync(
            partial(function, *args, **kwargs), limiter=self.threads
        )


async def context_of(request: Request) -> Context:
    """Return the context of the API that serves this request."""
    context: Context = request.app.state.context
    return context


InContext = Annotated[Context, Depends(context_of)]


def unix(instant: datetime) -> int:
    """Return an instant as the API writes it."""
    return int(instant.timestamp())


def unix_or_none(instant: datetime | None) -> int | None:
    """Return an instant as the API writes it, null where there is none."""
    return None if instant is None else unix(instant)
