"""Builds what tests of the statements need, and stops their clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import (
    DEFAULT_TENANT,
    BatchId,
    TenantId,
    WorkerId,
    mint_batch_id,
    mint_file_id,
)
from jobs.domain.result import Usage
from jobs.domain.shard import Cut, Lease, Segment, UnitKind, bitmap
from storage import batches, files, segments, units
from storage.database import Database
from storage.files import File
from storage.workers import Worker

START = datetime(2026, 1, 1, tzinfo=UTC)
ALL = tuple(UnitKind)


@dataclass
class FixedClock:
    """A clock that goes when it is told to."""

    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class Bench:
    """A database, its clock, and short ways to put something into it."""

    db: Database
    clock: FixedClock
    others: list[Database] = field(default_factory=list)

    def make_file(self, *, tenant_id: TenantId = DEFAULT_TENANT, purpose: str = "batch") -> File:
        file_id = mint_file_id()
        return File(
            id=file_id,
            tenant_id=tenant_id,
            filename="input.jsonl",
            purpose=purpose,
            num_bytes=1000,
            sha256="0" * 64,
            blob_key=f"files/{file_id}",
            created_at=self.clock.now,
        )

    def add_file(self, *, tenant_id: TenantId = DEFAULT_TENANT, purpose: str = "batch") -> File:
        return files.insert(self.db, self.make_file(tenant_id=tenant_id, purpose=purpose))

    def make_batch(
        self,
        *,
        file: File | None = None,
        priority: int = 0,
        hours: float = 24,
        tenant_id: TenantId = DEFAULT_TENANT,
        idempotency_key: str | None = None,
    ) -> Batch:
        file = file or self.add_file(tenant_id=tenant_id)
        return Batch(
            id=mint_batch_id(),
            tenant_id=tenant_id,
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            status=BatchStatus.VALIDATING,
            created_at=self.clock.now,
            completion_window="24h",
            deadline_at=self.clock.now + timedelta(hours=hours),
            priority=priority,
            metadata={"team": "a"},
            idempotency_key=idempotency_key,
        )

    def add_batch(self, *, priority: int = 0, hours: float = 24) -> Batch:
        return batches.insert(self.db, self.make_batch(priority=priority, hours=hours))

    def claim(
        self,
        *kinds: UnitKind,
        worker: str = "worker_a",
        model_keys: Sequence[str] | None = None,
        boot_id: str = "boot",
    ) -> Lease | None:
        return units.claim(
            self.db,
            worker_id=WorkerId(worker),
            boot_id=boot_id,
            kinds=kinds or ALL,
            model_keys=model_keys,
            lease_seconds=60,
        )

    def must_claim(self, *kinds: UnitKind, worker: str = "worker_a") -> Lease:
        lease = self.claim(*kinds, worker=worker)
        assert lease is not None
        return lease

    def make_worker(self, name: str, *, host: str = "host") -> Worker:
        return Worker(
            id=WorkerId(name),
            boot_id="boot",
            started_at=self.clock.now,
            heartbeat_at=self.clock.now,
            host=host,
            gpu="cuda:0",
        )

    def record_plan(
        self,
        lease: Lease,
        sizes: Sequence[int] = (3, 2),
        *,
        model_key: str | None = "demo",
        model_keys: Sequence[str] = (),
    ) -> bool:
        cuts, first = [], 0
        for size in sizes:
            cuts.append(
                Cut(
                    first_index=first,
                    first_line=first + 1,
                    num_lines=size,
                    byte_start=first * 10,
                    num_bytes=size * 10,
                )
            )
            first += size
        return batches.record_plan(
            self.db,
            lease,
            cuts=cuts,
            source_blob_key="files/x",
            model_key=model_key,
            model_keys=model_keys,
            total=first,
        )

    def add_planned(self, *sizes: int, priority: int = 0, hours: float = 24) -> BatchId:
        batch = self.add_batch(priority=priority, hours=hours)
        lease = self.must_claim(UnitKind.PLAN)
        assert lease.batch_id == batch.id
        assert self.record_plan(lease, sizes or (3, 2))
        return batch.id

    def make_segment(
        self,
        lease: Lease,
        positions: Sequence[int],
        *,
        num_lines: int = 3,
        sequence: int = 0,
        num_failed: int = 0,
    ) -> Segment:
        return Segment(
            unit_id=lease.unit_id,
            epoch=lease.epoch,
            sequence=sequence,
            blob_key=f"segments/{lease.unit_id}/{lease.epoch}-{sequence}",
            sha256=f"{lease.epoch}-{sequence}-{list(positions)}",
            num_bytes=100,
            positions=bitmap(list(positions), num_lines),
            num_completed=len(positions) - num_failed,
            num_failed=num_failed,
            usage=Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=1),
        )

    def record(
        self,
        lease: Lease,
        positions: Sequence[int],
        *,
        num_lines: int = 3,
        sequence: int = 0,
        num_failed: int = 0,
    ) -> bool:
        segment = self.make_segment(
            lease, positions, num_lines=num_lines, sequence=sequence, num_failed=num_failed
        )
        return segments.record(self.db, lease, segment, lease_seconds=60)

    def run_all_shards(self) -> None:
        while (lease := self.claim(UnitKind.SHARD)) is not None:
            num_lines = 3 if lease.ordinal == 0 else 2
            assert self.record(lease, range(num_lines), num_lines=num_lines)

    def complete(self, lease: Lease, *, num_completed: int = 5, num_failed: int = 0) -> Batch:
        return batches.complete(
            self.db,
            lease,
            output_file=self.make_file(purpose="batch_output"),
            error_file=None,
            num_completed=num_completed,
            num_failed=num_failed,
            usage=Usage(prompt_tokens=20, completion_tokens=10, cached_tokens=2),
        )
