"""The Celery application: `celery -A jobs.worker.celery_app worker` and `inspect` work as usual.

Celery only wakes workers. A message names a queue's model or a kind of unit; what is done is
claimed in the database, so a message may be lost, doubled, late or forged, and Redis may be away.

    main process   consumes messages, hands them to its one child, passes SIGTERM on as a drain file
    child process  `jobs.worker.process`: leases, loops and the engine
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Never

from celery import Celery, signals
from celery.concurrency import get_implementation
from celery.concurrency.prefork import TaskPool
from kombu.entity import Exchange, Queue
from typing_extensions import override

from jobs.app import broker_config
from jobs.broker import transport_settings
from jobs.domain.errors import BatchctlError, InvalidInput
from jobs.settings import Settings, load
from jobs.telemetry import configure_logging
from jobs.wakeups import control_queue, work_queue
from jobs.worker import process
from jobs.worker.quiet import quieten

_made: list[Path] = []
"""The folder of a drain file that this process made itself."""


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Return what Celery is to do, each with its reason.

    Raises:
        InvalidInput: no broker is set, or its URL is none.
    """
    config = broker_config(settings)
    return transport_settings(config) | {
        "imports": ["jobs.worker.tasks"],
        # --- messages ---
        # Acknowledged early: Redis would hand long work out again after the visibility time-out,
        # while it runs. What a crash loses, leases and the sweeper bring back.
        "task_acks_late": False,
        "task_reject_on_worker_lost": False,  # would loop on a task that kills its process
        "task_retry_on_worker_lost": False,  # the reaper's job
        # Only as many messages as there are free slots are fetched; else one would wait behind
        # hours of work while another worker is idle. (Redis only, from Celery 5.6.)
        "worker_disable_prefetch": True,
        "worker_prefetch_multiplier": 1,
        # Each with an exchange of its own, or a message for one would reach them all.
        "task_queues": [
            Queue(name, Exchange(name), routing_key=name) for name in queues_of(settings)
        ],
        # --- processes ---
        # The only pool that answers `ping` while busy, survives the death of its child and
        # drains: solo loses the task at shutdown, threads ignore it.
        "worker_pool": "prefork",
        "worker_concurrency": 1,  # one work loop to a process, one process to a group of GPUs
        # No locks, threads, sockets or CUDA state inherited.
        "worker_pool_start_method": "spawn",
        # With the 4 s of Celery, a child that is started again and imports for longer is killed,
        # started again, and so on.
        "worker_proc_alive_timeout": 900,
        # No time limits: a task runs as long as there is work, and stalls are seen by engines and
        # leases. No recycling of children: the engine, a process of its own, would load again.
        "task_time_limit": None,
        "task_soft_time_limit": None,
        "worker_max_tasks_per_child": None,
        # Work goes on while Redis is away: it needs the database and the blob store only.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # --- connection ---
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_channel_error_retry": True,  # Redis that restarts answers LOADING or READONLY
        "broker_connection_max_retries": None,  # by default a worker gives up after 100 tries
        # --- for people ---
        # Remote control stays on, so that `celery inspect` works; who may write to Redis is the
        # broker's own access control. Events off: nobody needs one for each message.
        "worker_enable_remote_control": True,
        "worker_send_task_events": False,
        "task_send_sent_event": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        # Not settings, so whoever starts a worker adds --without-gossip --without-mingle
        # --without-heartbeat: workers have nothing to tell each other.
    }


def queues_of(settings: Settings) -> list[str]:
    """Return the queues of a worker with this role and these models; `-Q` chooses among them."""
    worker, prefix = settings.worker, settings.broker.prefix
    queues = []
    if worker.role != "engine":
        queues.append(control_queue(prefix))
    if worker.role != "control":
        queues += [work_queue(prefix, model) for model in worker.models or settings.models]
    return queues


class _FromSettings(Mapping[str, Any]):
    """Celery's configuration, read from ours the first time that it is asked for."""

    @cached_property
    def _values(self) -> dict[str, Any]:
        try:
            return celery_settings(load())
        except BatchctlError as error:
            _refuse(error)

    @override
    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    @override
    def __len__(self) -> int:
        return len(self._values)


def _refuse(error: BatchctlError) -> Never:
    """End the program with one line; Celery would show a traceback."""
    sys.exit(f"error: {error.message}")


def _check_pool(pool: object) -> None:
    """Check that there will be a child process: elsewhere nothing would work, and messages go.

    Raises:
        InvalidInput: it is another pool than prefork.
    """
    if get_implementation(pool) is not TaskPool:
        raise InvalidInput(
            "The worker's pool is prefork, which has the process that works; leave out -P or "
            "--pool.",
            param="pool",
        )


app = Celery("batchctl", config_source=_FromSettings())


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _set_up_logging(**_: object) -> None:
    settings = load()
    configure_logging(level=settings.log.level, form=settings.log.format)
    quieten()


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _prepare(sender: Any, **_: object) -> None:  # noqa: ANN401  Celery's
    """In the main process, before there is a child: look at the settings, name the drain file."""
    try:
        _check_pool(sender.pool_cls)
        process.check(load())
    except BatchctlError as error:
        _refuse(error)
    if process.DRAIN_FILE not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="batchctl-worker-"))
        _made.append(folder)
        os.environ[process.DRAIN_FILE] = str(folder / "drain")


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: object) -> None:
    """In the main process, which alone hears of a SIGTERM: tell the child, which looks."""
    if path := os.environ.get(process.DRAIN_FILE):
        Path(path).touch()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _tidy(**_: object) -> None:
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _start(**_: object) -> None:
    process.start(load())


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _stop(**_: object) -> None:
    process.stop()
