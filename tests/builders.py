"""Makes what tests need: every field has a default, so that a test names what matters to it."""

# ruff: noqa: ANN401 - what a test changes is whatever field there is

import json
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, cast

from engine.base import Source
from engine.config import SimulatedConfig
from engine.registry import describe_model
from engine.sandbox import Sandbox
from engine.supervisor import EngineSupervisor
from jobs import finalizer, intake, runner
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import BatchctlError, EngineDied, NotFound
from jobs.domain.ids import DEFAULT_TENANT, WorkerId, mint_batch_id, mint_file_id
from jobs.domain.request import CHAT, Capabilities, Message, Request, SamplingParams
from jobs.domain.result import LineError, Result, Usage
from jobs.domain.shard import Lease, UnitKind, UnitState, count_bits
from jobs.feed import FeedSettings
from jobs.intake import PlanLimits
from jobs.leases import LeaseKeeper, LeaseTimes
from jobs.reuse import Cache
from jobs.wakeups import Doorbell
from storage import batches, files, segments, shards, statistics, units
from storage.blobs.base import BlobStore, hash_bytes, input_key
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


def make_mixed_line(number: int) -> bytes:
    """Return a line of a batch that is worth another order.

    A quarter of the lines is greedy and repeats others, half of those one single question; the
    next quarter begins alike.
    """
    content = f"hello {number}"
    body: dict[str, Any] = {}
    if number % 8 == 0:
        content, body = "hello everybody", {"temperature": 0}
    elif number % 8 == 4:
        content, body = f"hello again {number // 8 % 9}", {"temperature": 0}
    elif number % 4 == 1:
        said = "This is said at the beginning of a good many of these requests. " * 12
        begins = {"role": "system", "content": f"{number // 4 % 3} {said}"}
        body = {"messages": [begins, {"role": "user", "content": content}]}
    return make_line(f"r{number}", content, **body)


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
                sha256=hash_bytes(content or b""),
                blob_key=input_key(file_id),
                created_at=now,
                tenant_id=changes.get("tenant_id", DEFAULT_TENANT),
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
        cache: Cache | None = None,
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
            cache=cache,
        )
        return batches.get(self.db, lease.batch_id)

    def submit_planned(
        self, content: bytes, *, window_seconds: float = 86400, **limits: Any
    ) -> Batch:
        self.submit(content, window_seconds=window_seconds)
        batch = self.plan(**limits)
        assert batch.status is BatchStatus.IN_PROGRESS, batch.errors
        return batch

    def finalize(self, cache: Cache | None = None) -> Batch:
        lease = self.claim(UnitKind.FINALIZE)
        finalizer.finalize(self.db, self.blobs, lease, cache=cache)
        return batches.get(self.db, lease.batch_id)

    def states(self, batch: Batch) -> list[UnitState]:
        return [state for _, state in shards.list_for_batch(self.db, batch.id)]

    def num_done(self, batch: Batch) -> int:
        """Return how many of its results are durable."""
        found = segments.iterate_for_batch(self.db, batch.id)
        return sum(count_bits(segment.positions) for segment in found)

    def num_pending_shards(self) -> int:
        """Return how many shards of all batches nobody has claimed."""
        found = statistics.read(self.db, workers_since=timedelta(0)).queues
        return sum(one.ready + one.waiting for one in found if one.kind is UnitKind.SHARD)

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


def assert_answered(lines: list[dict[str, Any]], expected: dict[str, str]) -> None:
    """Check that each custom_id has, in this order, the answer to its own question."""
    found = [
        (line["custom_id"], line["response"]["body"]["choices"][0]["message"]["content"])
        for line in lines
    ]
    assert found == list(expected.items())


def ids_of(lines: Iterable[dict[str, Any]]) -> list[str]:
    return [line["custom_id"] for line in lines]


def descriptors() -> Iterator[str]:
    """Yield what this process's open file descriptors lead to."""
    for path in Path("/proc/self/fd").iterdir():
        try:
            yield str(path.readlink())
        except FileNotFoundError:
            continue  # the one that lists them


def await_true(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return once something holds that nothing signals, such as a row another thread writes."""
    pause = threading.Event()
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        pause.wait(0.005)


class ScriptedEngine:
    """An engine in this process whose test says in which order, when and whether it answers.

    An answer repeats its question. A question with "poison" in it kills the engine as soon as it
    is the turn of any request that runs beside it.
    """

    def __init__(
        self, *, slots: int = 4, total: int | None = None, seed: int | None = None
    ) -> None:
        """Prepare to answer.

        Args:
            total: so many requests come in all; none is answered before as many as possible run,
                up to the first death.
            seed: answers come in a random order; without, in the order of the questions.
        """
        self.num_slots = slots
        self.capabilities = describe(MODEL)
        self.paused = threading.Event()
        self.dropped = threading.Event()
        self.num_answered = 0
        self.deaths: list[list[str]] = []
        self.asked: list[str] = []
        self.death: Callable[[frozenset[int]], BatchctlError] = lambda suspects: EngineDied(
            "It died.", suspects=suspects
        )
        self._total = total
        self._rng = random.Random(seed) if seed is not None else None
        self._pause_at: int | None = None
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._moved = 0

    def pause_after(self, num_answered: int) -> None:
        """Answer no more than so many; `paused` is set then, and `go_on` ends it."""
        self.paused.clear()
        self._may_go_on.clear()
        self._pause_at = num_answered

    def go_on(self) -> None:
        self._pause_at = None
        self._may_go_on.set()

    def count_tokens(self, request: Request) -> int:
        return len(text_of(request))

    def resolve_sampling(self, request: Request) -> SamplingParams:
        return request.sampling

    def progress(self) -> int:
        self._moved += 1  # it is asked for only to see that the engine lives
        return self._moved

    def probe(self) -> None:
        """It is there."""

    def close(self) -> None:
        """There is nothing to give back."""

    def generate(self, source: Source) -> Generator[Result]:
        running: list[Request] = []
        idle = threading.Event()
        while True:
            free = self.num_slots - len(running)
            taken = source.take(free) if free else ()
            if taken is None and not running:
                return
            self.asked += [text_of(request) for request in taken or ()]
            running += taken or ()
            kept = [request for request in running if not source.is_aborted(request.id)]
            if len(kept) < len(running):
                running = kept
                self.dropped.set()
            if not running or not self._is_full(len(running)):
                idle.wait(0.001)
                continue
            if self._pause_at is not None and self.num_answered >= self._pause_at:
                self.paused.set()
                self._may_go_on.wait(0.001)
                continue
            if any("poison" in text_of(request) for request in running):
                self.deaths.append([text_of(request) for request in running])
                raise self.death(frozenset(request.id for request in running))
            turn = self._rng.randrange(len(running)) if self._rng else 0
            yield self._answer(running.pop(turn))
            self.num_answered += 1

    def _is_full(self, num_running: int) -> bool:
        if self._total is None or self._pause_at is not None or self.deaths:
            return True
        return num_running >= min(self.num_slots, self._total - self.num_answered)

    def _answer(self, request: Request) -> Result:
        text = text_of(request)
        usage = Usage(prompt_tokens=len(text), completion_tokens=request.id % 7, cached_tokens=1)
        if "refuse" in text:
            error = LineError(code="refused", message="It was told to.", status_code=400)
            return Result(id=request.id, usage=usage, error=error)
        return Result(id=request.id, text=f"re: {text}", usage=usage)


def text_of(request: Request) -> str:
    return request.messages[-1].content if request.messages else ""


TIMES = LeaseTimes(lease_seconds=60, renew_seconds=0.05, watch_seconds=0.02, stall_seconds=3600)
NEVER = FeedSettings(flush_results=10**6, flush_bytes=1 << 40, flush_seconds=1e9, poll_seconds=0.02)
"""Results are flushed when a shard has ended, and on exit."""


class Worker:
    """Works on the shards of a bench in a thread of its own; use as a context manager."""

    def __init__(
        self,
        bench: Bench,
        engine: ScriptedEngine,
        *,
        settings: FeedSettings = NEVER,
        blobs: BlobStore | None = None,
        times: LeaseTimes = TIMES,
        name: str = "worker_test",
        start: Callable[[], Any] | None = None,
        model: str = MODEL,
    ) -> None:
        self.stop = threading.Event()
        self._engine = engine
        self._keeper = LeaseKeeper(bench.db, times)
        context = runner.WorkerContext(
            db=bench.db,
            blobs=blobs or bench.blobs,
            keeper=self._keeper,
            doorbell=bench.doorbell,
            worker_id=WorkerId(name),
            boot_id="boot",
            settings=settings,
        )
        self.supervisor = EngineSupervisor(start or (lambda: cast("Any", engine)))
        self._pool = ThreadPoolExecutor(1)
        self._work = lambda: runner.work(
            context, self.supervisor, model_keys=[model], stop=self.stop
        )

    def __enter__(self) -> Self:
        self._keeper.start()
        self._future = self._pool.submit(self._work)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.go_on()
        self.stop.set()
        self._pool.shutdown()
        self._keeper.close()

    def result(self, seconds: float = 30.0) -> int:
        """Return how many results came, once there is no more work; or raise what work raised."""
        return self._future.result(seconds)
