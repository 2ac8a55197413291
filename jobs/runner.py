"""Feeds one engine from shard after shard until there is nothing left to claim."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from engine.supervisor import EngineSupervisor
from jobs import metrics
from jobs.domain.errors import EngineDied
from jobs.domain.ids import WorkerId
from jobs.domain.result import Result
from jobs.feed import Feed, FeedSettings
from jobs.leases import LeaseKeeper
from jobs.telemetry import log
from jobs.wakeups import Doorbell
from storage.blobs.base import BlobStore
from storage.database import Database

_STOP_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """What a worker works with.

    Attributes:
        may_claim: while it says no, no further shard is begun.
        on_result: called with each result as it comes, before it is durable.
    """

    db: Database
    blobs: BlobStore
    keeper: LeaseKeeper
    doorbell: Doorbell
    worker_id: WorkerId
    boot_id: str
    settings: FeedSettings
    may_claim: Callable[[], bool] = lambda: True
    on_result: Callable[[Result], None] | None = None


def work(
    context: WorkerContext,
    supervisor: EngineSupervisor,
    *,
    model_keys: Sequence[str],
    stop: threading.Event,
) -> int:
    """Run shards of `model_keys` on one engine until none is left; return how many results came.

    An engine that dies is started again, and until it is there nothing more is claimed; what it
    held is run again, suspects last. When `stop` is set, what is finished is flushed and the rest
    given back.

    Raises:
        EngineMisconfigured, EngineOutOfMemory, EngineUnavailable: there is no engine to be had;
            every lease has been given back.
        EngineQuarantined: the same, because it died too often without a request being to blame.
        StorageError: results could not be written.
    """
    engine = supervisor.open()
    feed = Feed(
        context.db,
        context.blobs,
        keeper=context.keeper,
        doorbell=context.doorbell,
        worker_id=context.worker_id,
        boot_id=context.boot_id,
        model_keys=model_keys,
        num_slots=engine.num_slots,
        progress=supervisor.progress,
        may_claim=lambda: supervisor.is_open and context.may_claim(),
        identity=lambda: engine.capabilities.identity,
        settings=context.settings,
    )
    supervisor.forget_suspects()
    with feed, _stopped_by(stop, feed):
        while True:
            before = feed.num_results
            try:
                with closing(engine.generate(feed)) as results:
                    for result in results:
                        feed.append(result)
                        supervisor.note_result(result.id)
                        if context.on_result is not None:
                            context.on_result(result)
            except EngineDied as death:
                if stop.is_set():
                    break
                log.warning("engine_died", error=death.message, suspects=len(death.suspects))
                metrics.count_engine_death(model_keys[0])
                supervisor.note_death(
                    productive=feed.num_results > before,
                    suspects=death.suspects,
                    convicted=feed.note_death(death.suspects),
                    cause=death.cause,
                )
                engine = supervisor.open()
            else:
                if feed.num_results > before:
                    supervisor.note_work()
                break
    return feed.num_results


@contextmanager
def _stopped_by(stop: threading.Event, feed: Feed) -> Iterator[None]:
    """Within the block, stop the feed as soon as `stop` is set."""
    left = threading.Event()

    def watch() -> None:
        while not left.is_set():
            if stop.wait(_STOP_POLL_SECONDS):
                feed.stop()
                return

    thread = threading.Thread(target=watch, name="runner-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(timeout=5)
