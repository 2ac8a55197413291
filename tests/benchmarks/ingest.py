"""C4: planning a file against copying it; 2 KB lines, processor time.

Planning reads, parses and checks every line, hashes it for duplicates, and records shards. Where
the run order is another than the file's, the lines are written a second time; that is the second
row. The copy is a plain loop over the same bytes.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from engine.sandbox import Sandbox
from jobs import intake, settings
from jobs.app import App, open_app
from jobs.domain.batch import BatchStatus
from jobs.domain.shard import UnitKind
from storage import batches
from storage.files import File
from tests.benchmarks.local import claim, submit, submit_again
from tests.benchmarks.measuring import Row, main, num_pairs_at, pairs_of, scaled

CHAT = "/v1/chat/completions"
_COPY_BYTES = 1 << 20


def make_lines(num_lines: int, *, num_groups: int | None) -> Iterator[bytes]:
    """Yield lines of 2 KB: all different from the first word on, or of so many groups, mixed."""
    padding = "lorem ipsum " * 143
    for number in range(num_lines):
        own = number if num_groups is None else number % num_groups
        system = hashlib.sha256(str(own).encode()).hexdigest()
        body = {
            "model": "simulated",
            "messages": [
                {"role": "system", "content": f"{system} {padding}"},
                {"role": "user", "content": f"question {number}"},
            ],
            "max_tokens": 128,
            "temperature": 0,
        }
        line = {"custom_id": f"request-{number}", "method": "POST", "url": CHAT, "body": body}
        yield json.dumps(line).encode()


def plan(app: App, sandbox: Sandbox, file: File) -> float:
    submit_again(app, file)
    lease = claim(app, UnitKind.PLAN)
    begin = time.process_time()
    intake.plan(
        app.db,
        app.blobs,
        lease,
        describe=app.describe,
        checker=sandbox,
        limits=app.plan_limits(),
    )
    spent = time.process_time() - begin
    assert batches.get(app.db, lease.batch_id).status is BatchStatus.IN_PROGRESS
    return spent


def copy(source: Path, target: Path) -> float:
    begin = time.process_time()
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while chunk := reader.read(_COPY_BYTES):
            writer.write(chunk)
    return time.process_time() - begin


def measure_one(num_lines: int, num_pairs: int, *, num_groups: int | None) -> tuple[Row, ...]:
    with (
        tempfile.TemporaryDirectory() as name,
        Sandbox() as sandbox,
        open_app(settings.load(data=name), folder=Path(name)) as app,
    ):
        lines = list(make_lines(num_lines, num_groups=num_groups))
        source = Path(name) / "source"
        source.write_bytes(b"\n".join(lines) + b"\n")
        file, _ = submit(app, lines)
        claim(app, UnitKind.PLAN)  # that batch stays as it is; each measurement has its own
        copy(source, Path(name) / "copy")
        del lines
        pairs = pairs_of(
            lambda _: copy(source, Path(name) / "copy"),
            lambda _: plan(app, sandbox, file),
            num_pairs=num_pairs,
        )
    ordered = num_groups is not None
    each = f"{num_lines} lines of {file.num_bytes // num_lines} bytes"
    return (
        Row(
            id="C4 ordered" if ordered else "C4",
            what="ingest ÷ raw copy" + (", lines written again in another order" * ordered),
            values=[copied / taken for copied, taken in pairs],
            must=0.15,
            goal=0.30,
            note=f"{each}, greedy, so hashed for duplicates; processor time",
        ),
        Row(
            id="C4 ordered µs" if ordered else "C4 µs",
            what="planning a line" + (" and writing it again" * ordered),
            values=[taken / num_lines * 1e6 for _, taken in pairs],
            unit="µs",
            less=True,
            must=None,
            goal=None,
            note=each,
        ),
    )


def measure(size: float) -> list[Row]:
    num_lines, num_pairs = scaled(100_000, size, least=500), num_pairs_at(15, size)
    return [
        *measure_one(num_lines, num_pairs, num_groups=None),
        *measure_one(num_lines, num_pairs, num_groups=64),
    ]


if __name__ == "__main__":
    main(measure)
