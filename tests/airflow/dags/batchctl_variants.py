"""Our operator and sensor in other ways than the example's."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param, get_current_context, task

from batchctl_provider.hooks.batchctl import BatchctlHook
from batchctl_provider.operators.batchctl import BatchctlSubmitOperator
from batchctl_provider.sensors.batchctl import BatchctlSensor


def record(context: Any) -> None:
    """Leave the exception where the test finds it."""
    error = context["exception"]
    Path(context["params"]["failure"]).write_text(f"{type(error).__name__}: {error}")


PARAMS = ("lines", "output", "failure")
OPTIONS: dict[str, Any] = {
    "params": {name: Param("", type="string") for name in PARAMS},
    "default_args": {"on_failure_callback": record},
}

with DAG(dag_id="by_file_id", schedule=None, **OPTIONS) as by_file_id:

    @task
    def upload() -> str:
        """Upload the lines."""
        return BatchctlHook().upload(get_current_context()["params"]["lines"])

    BatchctlSubmitOperator(
        task_id="run",
        input_file_id=upload(),
        output_path="{{ params.output }}",
        poll_interval=0.2,
        deferrable=False,
    )

with DAG(dag_id="retried", schedule=None, **OPTIONS) as retried:
    # On the first try the answers have no place to go to, after the batch was made.
    BatchctlSubmitOperator(
        task_id="run",
        input_path="{{ params.lines }}",
        output_path="{{ '/dev/null/nowhere' if ti.try_number == 1 else params.output }}",
        poll_interval=0.2,
        deferrable=True,
        retries=1,
        retry_delay=timedelta(0),
    )

with DAG(dag_id="watched", schedule=None, **OPTIONS) as watched:
    started = BatchctlSubmitOperator(
        task_id="start", input_path="{{ params.lines }}", wait_for_completion=False
    )
    batch_id = "{{ ti.xcom_pull(task_ids='start')['batch_id'] }}"
    poking = BatchctlSensor(task_id="poking", batch_id=batch_id, poke_interval=0.2)
    deferred = BatchctlSensor(
        task_id="deferred", batch_id=batch_id, poke_interval=0.2, timeout=60, deferrable=True
    )

    @task
    def download(batch: dict[str, Any]) -> None:
        """Write the answers."""
        BatchctlHook().download(batch["output_file_id"], get_current_context()["params"]["output"])

    started >> deferred >> poking
    download(poking.output)
