"""End to end against the raw engine: the same prompts, the same engine process, CPU time.

    raw          prompts from a list, results thrown away
    end to end   JSONL in, planned, run, written in segments, finalized; database on

Arms alternate in one run; prints the median of the paired ratios (raw CPU / end-to-end CPU).
Usage: python -m tests.benchmarks.end_to_end [REQUESTS] [PAIRS]
"""

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil

from engine.process import ProcessEngine
from engine.sandbox import Sandbox
from engine.supervisor import EngineSupervisor
from jobs import finalizer, intake, runner, settings
from jobs.app import App, open_app
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import mint, mint_batch_id, mint_file_id, mint_worker_id
from jobs.domain.request import CHAT, Capabilities, parse_line
from jobs.domain.shard import Lease, UnitKind
from jobs.feed import FeedSettings
from jobs.leases import LeaseKeeper, LeaseTimes
from storage import batches, files, units
from storage.blobs.base import input_key
from storage.files import File
from tests.sources import ListSource


def make_lines(count: int) -> list[bytes]:
    rng = random.Random(0)
    lines = []
    for number in range(count):
        words = " ".join(rng.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(40))
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": f"{number} {words}"}],
            "max_tokens": int(8 * 16 ** rng.random()),
            "temperature": 0,
            "ignore_eos": True,
        }
        line = {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body}
        lines.append(json.dumps(line).encode())
    return lines


class Arms:
    """Both arms over one running engine process."""

    def __init__(
        self, app: App, engine: ProcessEngine, sandbox: Sandbox, lines: list[bytes]
    ) -> None:
        self._app = app
        self._engine = engine
        self._sandbox = sandbox
        self._lines = lines
        self._process = psutil.Process(engine.pid)

    def cpu_seconds(self) -> float:
        spent = self._process.cpu_times()
        return time.process_time() + spent.user + spent.system

    def raw(self) -> tuple[float, int]:
        requests = [
            parse_line(line, endpoint=CHAT).to_request(number)
            for number, line in enumerate(self._lines)
        ]
        begin = self.cpu_seconds()
        tokens = sum(
            result.usage.completion_tokens for result in self._engine.generate(ListSource(requests))
        )
        return self.cpu_seconds() - begin, tokens

    def end_to_end(self) -> tuple[float, int]:
        app = self._app
        begin = self.cpu_seconds()
        batch = self._submit()
        keeper = LeaseKeeper(app.db, LeaseTimes())
        keeper.start()
        intake.plan(
            app.db,
            app.blobs,
            self._claim(UnitKind.PLAN),
            describe=self._describe,
            checker=self._sandbox,
            limits=app.plan_limits(),
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
        runner.work(context, supervisor, model_keys=["demo"], stop=threading.Event())
        finalizer.finalize(app.db, app.blobs, self._claim(UnitKind.FINALIZE))
        keeper.close()
        spent = self.cpu_seconds() - begin
        done = batches.get(app.db, batch.id)
        assert done.request_counts.completed == len(self._lines), done
        return spent, done.usage.completion_tokens

    def _submit(self) -> Batch:
        app = self._app
        file_id = mint_file_id()
        with app.blobs.open_writer(input_key(file_id)) as writer:
            writer.write(b"\n".join(self._lines) + b"\n")
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
        batch = Batch(
            id=mint_batch_id(),
            input_file_id=file_id,
            endpoint=CHAT,
            status=BatchStatus.VALIDATING,
            created_at=now,
            completion_window="24h",
            deadline_at=now + timedelta(days=1),
        )
        return intake.submit(app.db, app.doorbell, batch)

    def _claim(self, kind: UnitKind) -> Lease:
        lease = units.claim(
            self._app.db,
            worker_id=mint_worker_id(),
            boot_id=mint("boot_"),
            kinds=(kind,),
            lease_seconds=600,
        )
        assert lease is not None
        return lease

    def _describe(self, name: str) -> Capabilities:
        assert name == "demo"
        return self._engine.capabilities


def main(num_requests: int, pairs: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # the engine process inherits it
    with (
        tempfile.TemporaryDirectory() as folder,
        Sandbox() as sandbox,
        open_app(settings.load(data=folder), folder=Path(folder)) as app,
    ):
        config = app.engine_config("demo").model_copy(update={"threads": 1})
        engine = ProcessEngine(config, model="demo", log_path=Path(folder) / "engine.log")
        arms = Arms(app, engine, sandbox, make_lines(num_requests))
        arms.raw()  # warm
        ratios = []
        for pair in range(pairs):
            # A B, B A, A B: neither arm always profits from going second.
            if pair % 2:
                whole, whole_tokens = arms.end_to_end()
                raw, raw_tokens = arms.raw()
            else:
                raw, raw_tokens = arms.raw()
                whole, whole_tokens = arms.end_to_end()
            assert raw_tokens == whole_tokens
            ratios.append(raw / whole)
            print(
                f"  pair {pair}: raw {raw:.2f} s, end to end {whole:.2f} s of CPU for "
                f"{raw_tokens} tokens",
                flush=True,
            )
        engine.close()
    print(
        f"end to end / raw engine, {num_requests} requests: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}; must 0.95, goal 0.99)"
    )


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 400,
        int(sys.argv[2]) if len(sys.argv) > 2 else 5,
    )
