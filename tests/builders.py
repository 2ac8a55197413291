"""Makes what tests need: every field has a default, so that a test names what matters to it."""

# ruff: noqa: ANN401 - what a test changes is whatever field there is

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from engine.config import SimulatedConfig
from engine.registry import describe_model
from engine.sandbox import Sandbox
from jobs import finalizer, intake
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import NotFound
from jobs.domain.ids import WorkerId, mint_batch_id, mint_file_id
from jobs.domain.request import CHAT, Capabilities, Message, Request, SamplingParams
from jobs.domain.shard import Lease, UnitKind, UnitState
from jobs.intake import PlanLimits
from jobs.wakeups import Doorbell
from storage import batches, files, shards, units
from storage.blobs.base import BlobStore, input_key
from storage.database import Database
from storage.files import File

START = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = "simulated"


def make_line(custom_id: object = "a", content: str = "hello", **body: object) -> bytes:
    """Return a good request line without its newline; a body field of None is left out."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": content}], **body}
    return json.dumps(
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": CHAT,
            "body": {name: value for name, value in asked.items() if value is not None},
        }
    ).encode()


def make_lines(num_lines: int, *, first: int = 0, content: str = "hello") -> bytes:
    """Return a file of good lines with the custom_ids r0, r1, ..."""
    return b"".join(
        make_line(f"r{number}", f"{content} {number}") + b"\n"
        for number in range(first, first + num_lines)
    )


def make_request(request_id: int = 1, content: str = "hello", **sampling: Any) -> Request:
    return Request(
        id=request_id,
        messages=(Message("user", content),),
        sampling=SamplingParams(**sampling),
    )


def make_batch(**changes: Any) -> Batch:
    values: dict[str, Any] = {
        "id": mint_batch_id(),
        "input_file_id": mint_file_id(),
        "endpoint": CHAT,
        "status": BatchStatus.VALIDATING,
        "created_at": START,
        "completion_window": "24h",
        "deadline_at": START + timedelta(hours=24),
    }
    return Batch(**values | changes)


def describe(name: str) -> Capabilities:
    """Return what the simulated model can do; there are two of them, and no other."""
    if name not in {MODEL, "other"}:
        raise NotFound(f"There is no model {name!r}.")
    return describe_model(SimulatedConfig(), name)


@dataclass
class Clock:
    """Goes on by itself, and further when it is told to."""

    offset: timedelta = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.offset

    def advance(self, seconds: float) -> None:
        self.offset += timedelta(seconds=seconds)


@dataclass
class Bench:
    """A database and a blob store, and short ways to bring a batch through them."""

    db: Database
    blobs: BlobStore
    clock: Clock
    doorbell: Doorbell = field(default_factory=Doorbell)
    stack: ExitStack = field(default_factory=ExitStack)
    _sandbox: Sandbox | None = None

    @property
    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = self.stack.enter_context(Sandbox())
        return self._sandbox

    def submit(
        self, content: bytes | None, *, window_seconds: float = 86400, **changes: Any
    ) -> Batch:
        """Record a batch over `content`; None: its bytes are gone."""
        file_id = mint_file_id()
        if content is not None:
            self.blobs.put(input_key(file_id), content)
        now = self.db.now()
        files.insert(
            self.db,
            File(
                id=file_id,
                filename="in.jsonl",
                purpose="batch",
                num_bytes=len(content or b""),
                sha256="0" * 64,
                blob_key=input_key(file_id),
                created_at=now,
            ),
        )
        batch = make_batch(
            input_file_id=file_id,
            created_at=now,
            deadline_at=now + timedelta(seconds=window_seconds),
            **changes,
        )
        return intake.submit(self.db, self.doorbell, batch)

    def claim(self, kind: UnitKind) -> Lease:
        lease = units.claim(
            self.db,
            worker_id=WorkerId("worker_test"),
            boot_id="boot",
            kinds=(kind,),
            lease_seconds=60,
        )
        assert lease is not None
        return lease

    def plan(
        self,
        lease: Lease | None = None,
        *,
        describe: Callable[[str], Capabilities] = describe,
        **limits: Any,
    ) -> Batch:
        """Plan the batch of `lease`, or whichever is next; return it as it is then."""
        lease = lease or self.claim(UnitKind.PLAN)
        intake.plan(
            self.db,
            self.blobs,
            lease,
            describe=describe,
            checker=self.sandbox,
            limits=PlanLimits(**limits),
        )
        return batches.get(self.db, lease.batch_id)

    def submit_planned(
        self, content: bytes, *, window_seconds: float = 86400, **limits: Any
    ) -> Batch:
        self.submit(content, window_seconds=window_seconds)
        batch = self.plan(**limits)
        assert batch.status is BatchStatus.IN_PROGRESS, batch.errors
        return batch

    def finalize(self) -> Batch:
        lease = self.claim(UnitKind.FINALIZE)
        finalizer.finalize(self.db, self.blobs, lease)
        return batches.get(self.db, lease.batch_id)

    def states(self, batch: Batch) -> list[UnitState]:
        return [state for _, state in shards.list_for_batch(self.db, batch.id)]

    def output_of(self, batch: Batch) -> list[dict[str, Any]]:
        return self._lines(batch.output_file_id)

    def errors_of(self, batch: Batch) -> list[dict[str, Any]]:
        return self._lines(batch.error_file_id)

    def _lines(self, file_id: Any) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        content = self.blobs.get(files.get(self.db, file_id).blob_key)
        return [json.loads(line) for line in content.splitlines()]


def await_set(event: threading.Event, seconds: float = 20.0) -> None:
    assert event.wait(seconds), "waited too long"


def ids_of(lines: Iterable[dict[str, Any]]) -> list[str]:
    return [line["custom_id"] for line in lines]


def descriptors() -> Iterator[str]:
    """Yield what this process's open file descriptors lead to."""
    for path in Path("/proc/self/fd").iterdir():
        try:
            yield str(path.readlink())
        except FileNotFoundError:
            continue  # the one that lists them
