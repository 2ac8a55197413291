"""Airflow's own OpenAITriggerBatchOperator, unmodified, against a real server."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from airflow.sdk import DAG

from tests.airflow.servers import OwnServer, Server, custom_ids, wait_for

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

pytestmark = pytest.mark.slow

LoadDag = Callable[[str, str], DAG]
WAYS = pytest.mark.parametrize("way", ["deferrable", "waiting"])


def run(dag: DAG, folder: Path, lines: Path) -> "DagRun":
    places = {name: str(folder / name) for name in ("output", "failure")}
    ran: DagRun = dag.test(run_conf={"lines": str(lines), **places})
    return ran


@WAYS
def test_every_line_is_answered(
    way: str, connected: Server, load_dag: LoadDag, tmp_path: Path
) -> None:
    # Like the provider's own example: without .jsonl.
    lines = connected.write_lines(tmp_path / "lines", 20)
    ran = run(load_dag("openai_batch", f"openai_{way}"), tmp_path, lines)
    assert ran.state == "success"
    assert custom_ids(tmp_path / "output") == [f"r{number}" for number in range(20)]


@WAYS
@pytest.mark.usefixtures("connected")
def test_a_bad_file_fails_the_task(way: str, load_dag: LoadDag, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("this is no line\n")
    ran = run(load_dag("openai_batch", f"openai_{way}"), tmp_path, lines)
    assert ran.state == "failed"
    assert (tmp_path / "failure").read_text().startswith("OpenAIBatchJobException: ")


@WAYS
def test_a_batch_that_takes_too_long_is_cancelled(
    way: str, own_connected: OwnServer, load_dag: LoadDag, tmp_path: Path
) -> None:
    lines = own_connected.write_lines(
        tmp_path / "lines", 2, content="[[tokens=100000]]", max_tokens=100_000
    )
    before = own_connected.batch_ids()
    ran = run(load_dag("openai_batch", f"openai_{way}_impatient"), tmp_path, lines)
    assert ran.state == "failed"
    assert (tmp_path / "failure").read_text().startswith("OpenAIBatchTimeout: ")
    (batch_id,) = set(own_connected.batch_ids()) - set(before)
    wait_for(lambda: own_connected.batch(batch_id)["status"] == "cancelled")
