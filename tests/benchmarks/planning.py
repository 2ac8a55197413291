"""CPU time of planning: one pass over a file of 2 KB chat lines, without schemas.

Prints microseconds of CPU per line, beside the plain reading of the same bytes.
Usage: python -m tests.benchmarks.planning [LINES]
"""

import json
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from engine.sandbox import Sandbox
from jobs import intake, settings
from jobs.app import App, open_app
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import mint, mint_batch_id, mint_file_id, mint_worker_id
from jobs.domain.shard import UnitKind
from storage import batches, files, units
from storage.blobs.base import input_key
from storage.files import File

CHAT = "/v1/chat/completions"
PAIRS = 5


def write_input(app: App, num_lines: int) -> File:
    file_id = mint_file_id()
    padding = "lorem ipsum " * 150
    with app.blobs.open_writer(input_key(file_id)) as writer:
        for number in range(num_lines):
            body = {
                "model": "simulated",
                "messages": [
                    {"role": "system", "content": "You are a careful assistant."},
                    {"role": "user", "content": f"{number} {padding}"},
                ],
                "max_tokens": 128,
                "temperature": 0.2,
            }
            line = {"custom_id": f"request-{number}", "method": "POST", "url": CHAT, "body": body}
            writer.write(json.dumps(line).encode() + b"\n")
        info = writer.commit()
    file = File(
        id=file_id,
        filename="bench.jsonl",
        purpose="batch",
        num_bytes=info.num_bytes,
        sha256=info.sha256,
        blob_key=info.key,
        created_at=app.db.now(),
    )
    return files.insert(app.db, file)


def submit(app: App, file: File) -> Batch:
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


def plan(app: App, sandbox: Sandbox) -> None:
    lease = units.claim(
        app.db,
        worker_id=mint_worker_id(),
        boot_id=mint("boot_"),
        kinds=(UnitKind.PLAN,),
        lease_seconds=600,
    )
    assert lease is not None
    intake.plan(
        app.db,
        app.blobs,
        lease,
        describe=app.describe,
        checker=sandbox,
        limits=app.plan_limits(),
    )
    assert batches.get(app.db, lease.batch_id).status is BatchStatus.IN_PROGRESS


def main(num_lines: int) -> None:
    planned: list[float] = []
    read: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Sandbox() as sandbox,
        open_app(settings.load(data=folder), folder=Path(folder)) as app,
    ):
        file = write_input(app, num_lines)
        for _ in range(PAIRS):
            submit(app, file)
            begin = time.process_time()
            plan(app, sandbox)
            planned.append((time.process_time() - begin) / num_lines * 1e6)
            begin = time.process_time()
            with app.blobs.open_reader(file.blob_key) as reader:
                while reader.read(1 << 20):
                    pass
            read.append((time.process_time() - begin) / num_lines * 1e6)
    print(
        f"planning {num_lines} lines of {file.num_bytes / num_lines:.0f} bytes: "
        f"{statistics.median(planned):.1f} us of CPU per line "
        f"({min(planned):.1f} to {max(planned):.1f}; must 20); "
        f"reading alone {statistics.median(read):.2f} us"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
