"""`kill -9` of any process of `batchctl serve`, and a restart: nothing lost, nothing doubled."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from jobs.client import Client, Upload
from jobs.domain.batch import TERMINAL_STATUSES, BatchStatus
from tests.faults.conftest import CHAT, Bench, await_gone, await_true, tree_of


@contextmanager
def serving(bench: Bench) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    process = bench.start("serve", "--port", "0", "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, bench.stderr()
    with Client(json.loads(line)["url"]) as client:
        yield process, client


def submit(client: Client, path: Path) -> str:
    file = client.upload(Upload.from_path(path))
    return client.create_batch(input_file_id=file.id, endpoint=CHAT).id


def await_growth(bench: Bench) -> None:
    before = bench.generated_tokens()
    await_true(lambda: bench.generated_tokens() > before)


def test_kills_of_the_server_and_its_engine_lose_and_double_nothing(
    bench: Bench, rng: random.Random
) -> None:
    bench.model_options = {"step_seconds": 0.008}
    num_lines = 4000
    bench.write_mixed_input(num_lines)
    batch_id = ""
    for _ in range(4):
        with serving(bench) as (process, client):
            if not batch_id:
                batch_id = submit(client, bench.input)
            await_growth(bench)
            time.sleep(rng.uniform(0.0, 1.0))
            tree = tree_of(process)
            with suppress(psutil.NoSuchProcess):
                rng.choice(tree).send_signal(signal.SIGKILL)
            time.sleep(rng.uniform(0.0, 0.5))
            process.kill()
            process.wait()
            await_gone(tree)
    with serving(bench) as (process, client):
        await_true(lambda: client.get_batch(batch_id).status in TERMINAL_STATUSES, seconds=120)
        batch = client.get_batch(batch_id)
        assert batch.status == BatchStatus.COMPLETED
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (num_lines, num_lines, 0)
        assert batch.error_file_id is None
        assert batch.output_file_id is not None
        content = b"".join(client.download(batch.output_file_id))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    ids = [json.loads(line)["custom_id"] for line in content.splitlines()]
    assert ids == [f"r{n}" for n in range(num_lines)]
    assert content.count(b'"same_as"') > num_lines / 5, "what repeats others was not run by itself"
