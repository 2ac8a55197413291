"""A disk that fills up under `batchctl run` and `batchctl serve`, and has room again later."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from jobs.domain.batch import TERMINAL_STATUSES, BatchStatus
from tests.faults.conftest import Bench, await_true
from tests.faults.test_kill_serve import serving, submit

NUM_LINES = 1500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Disk:
    """A small file system of the test's own, which can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def has_segments(self) -> bool:
        """Whether one is recorded: the next is written behind it."""
        return sum(path.is_file() for path in self.folder.rglob("segments/*/*/*")) > 1

    def fill(self) -> None:
        with suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small file system that this fills")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)],  # noqa: S607 - where it is differs
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S607 - as above


@pytest.fixture
def on_disk(bench: Bench, disk: Disk) -> Bench:
    """A bench whose data folder alone is on the small disk."""
    bench.settings = {
        "BATCHCTL_DATA": str(disk.folder / "data"),
        "BATCHCTL_LEASES__TIMING_PROFILE": "fast",
    }
    bench.model_options = {"step_seconds": 0.02}
    bench.write_input(NUM_LINES)
    return bench


def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(
    on_disk: Bench, disk: Disk
) -> None:
    process = on_disk.start_run()
    await_true(disk.has_segments, seconds=120)
    disk.fill()
    code = process.wait(timeout=240)
    said = on_disk.stderr()
    assert code not in {0, 1}, said
    assert "full" in said
    assert "Traceback" not in said
    assert not on_disk.output.exists()
    disk.free()
    before = on_disk.generated_tokens()
    again = on_disk.start_run("--resume")
    assert again.wait(timeout=240) == 0, on_disk.stderr()
    assert on_disk.custom_ids() == [f"r{number}" for number in range(NUM_LINES)]
    assert on_disk.generated_tokens() - before < on_disk.usage_tokens(), "it did not start afresh"


def test_a_server_on_a_full_disk_waits_and_finishes_by_itself_when_there_is_room(
    on_disk: Bench, disk: Disk
) -> None:
    with serving(on_disk) as (process, client):
        batch_id = submit(client, on_disk.input)
        await_true(disk.has_segments, seconds=120)
        disk.fill()
        url = client.base_url
        await_true(lambda: httpx2.get(f"{url}/ready", timeout=30).status_code == 503, seconds=120)
        await_true(lambda: "storage_failed" in on_disk.stderr(), seconds=120)
        assert process.poll() is None
        disk.free()
        await_true(lambda: client.get_batch(batch_id).status in TERMINAL_STATUSES, seconds=240)
        batch = client.get_batch(batch_id)
        assert batch.status == BatchStatus.COMPLETED
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in on_disk.stderr()
