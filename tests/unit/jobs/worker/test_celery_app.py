"""What `celery -A jobs.worker.celery_app` takes from its command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_pool_without_a_process_that_works_is_refused(tmp_path: Path, pool: str) -> None:
    settings = {
        "BATCHCTL_DATABASE__URL": "postgresql://u@127.0.0.1:1/d",
        "BATCHCTL_BROKER__URL": "redis://127.0.0.1:1/0",
        "BATCHCTL_DATA": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "jobs.worker.celery_app", "worker", "-P", pool],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: The worker's pool is prefork")
    assert "Traceback" not in ended.stderr
