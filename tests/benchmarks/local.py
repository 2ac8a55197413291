"""One machine in one process: database, blobs and an engine process, for batches in a row."""

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from engine.config import EngineConfig
from engine.process import ProcessEngine
from engine.sandbox import Sandbox
from engine.supervisor import EngineSupervisor
from jobs import finalizer, intake, lengths, runner, settings
from jobs.app import App, open_app
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import mint, mint_batch_id, mint_file_id, mint_worker_id
from jobs.domain.request import CHAT, Capabilities, Request, parse_line
from jobs.domain.result import Usage
from jobs.domain.shard import Lease, UnitKind
from jobs.feed import FeedSettings
from jobs.intake import PlanLimits
from jobs.leases import LeaseKeeper, LeaseTimes
from storage import batches, files, units
from storage.blobs.base import input_key
from storage.files import File
from tests.benchmarks.measuring import cpu_seconds
from tests.sources import ListSource

ARRIVAL = PlanLimits(fold="none", by_prefix=False, by_length=False, by_template=False)
"""Every line runs, as it stands in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a run cost, and what came out."""

    cpu: float
    usage: Usage


def requests_of(lines: Sequence[bytes]) -> list[Request]:
    """Return the requests of lines, as a list that an engine can be given."""
    return [parse_line(line, endpoint=CHAT).to_request(number) for number, line in enumerate(lines)]


def submit(app: App, lines: Sequence[bytes]) -> tuple[File, Batch]:
    """Upload lines and record a batch of them."""
    file_id = mint_file_id()
    with app.blobs.open_writer(input_key(file_id)) as writer:
        for line in lines:
            writer.write(line + b"\n")
        info = writer.commit()
    now = app.db.now()
    file = File(
        id=file_id,
        filename="bench.jsonl",
        purpose="batch",
        num_bytes=info.num_bytes,
        sha256=info.sha256,
        blob_key=info.key,
        created_at=now,
    )
    files.insert(app.db, file)
    return file, submit_again(app, file)


def submit_again(app: App, file: File) -> Batch:
    """Record a batch of a file that is there."""
    now = app.db.now()
    batch = Batch(
        id=mint_batch_id(),
        input_file_id=file.id,
        endpoint=CHAT,
        status=BatchStatus.VALIDATING,
        created_at=now,
        completion_window="24h",
        deadline_at=now + timedelta(days=1),
    )
    return intake.submit(app.db, app.doorbell, batch)


def claim(app: App, kind: UnitKind) -> Lease:
    """Claim what there is to do of a kind."""
    lease = units.claim(
        app.db,
        worker_id=mint_worker_id(),
        boot_id=mint("boot_"),
        kinds=(kind,),
        lease_seconds=600,
    )
    assert lease is not None
    return lease


class Local:
    """Runs batches, and the same requests on the bare engine."""

    def __init__(self, app: App, engine: ProcessEngine, sandbox: Sandbox) -> None:
        self.app = app
        self._engine = engine
        self._sandbox = sandbox

    def generate(self, lines: Sequence[bytes]) -> Spent:
        """Give the engine a list of requests, and throw the results away."""
        requests = requests_of(lines)
        begin = cpu_seconds()
        usage = Usage()
        for result in self._engine.generate(ListSource(requests)):
            usage += result.usage
        return Spent(cpu=cpu_seconds() - begin, usage=usage)

    def run(self, lines: Sequence[bytes], *, limits: PlanLimits | None = None) -> Spent:
        """Run a batch: plan it, work on it, and write its files.

        Args:
            limits: how it is planned; None: as the settings say.
        """
        app = self.app
        begin = cpu_seconds()
        _, batch = submit(app, lines)
        with closing(LeaseKeeper(app.db, LeaseTimes())) as keeper:
            keeper.start()
            intake.plan(
                app.db,
                app.blobs,
                claim(app, UnitKind.PLAN),
                describe=self._describe,
                checker=self._sandbox,
                limits=limits or app.plan_limits(),
            )
            context = runner.WorkerContext(
                db=app.db,
                blobs=app.blobs,
                keeper=keeper,
                doorbell=app.doorbell,
                worker_id=mint_worker_id(),
                boot_id=mint("boot_"),
                settings=FeedSettings(),
            )
            supervisor = EngineSupervisor(lambda: self._engine)
            name = self._engine.capabilities.model
            runner.work(context, supervisor, model_keys=[name], stop=threading.Event())
            finalizer.finalize(app.db, app.blobs, claim(app, UnitKind.FINALIZE))
            if (limits or app.plan_limits()).by_template:
                lengths.learn(app.db, app.blobs, batch.id)
        spent = cpu_seconds() - begin
        done = batches.get(app.db, batch.id)
        assert done.request_counts.completed == len(lines), done
        return Spent(cpu=spent, usage=done.usage)

    def _describe(self, name: str) -> Capabilities:
        assert name == self._engine.capabilities.model
        return self._engine.capabilities


@contextmanager
def open_local(config: EngineConfig, *, model: str) -> Iterator[Local]:
    """Start an engine beside an empty database."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the engine process inherits it
    with (
        tempfile.TemporaryDirectory() as folder,
        Sandbox() as sandbox,
        open_app(settings.load(data=folder), folder=Path(folder)) as app,
        closing(ProcessEngine(config, model=model, log_path=Path(folder) / "engine.log")) as engine,
    ):
        yield Local(app, engine, sandbox)
