"""Airflow's own OpenAI provider, unmodified: upload, run, read."""

from pathlib import Path
from typing import Any

from airflow.providers.openai.hooks.openai import OpenAIHook
from airflow.providers.openai.operators.openai import OpenAITriggerBatchOperator
from airflow.sdk import DAG, Param, get_current_context, task


def record(context: Any) -> None:
    """Leave the exception where the test finds it."""
    error = context["exception"]
    Path(context["params"]["failure"]).write_text(f"{type(error).__name__}: {error}")


def make(dag_id: str, **options: Any) -> DAG:
    """Return a DAG whose operator has these options."""
    with DAG(
        dag_id=dag_id,
        schedule=None,
        params={name: Param("", type="string") for name in ("lines", "output", "failure")},
        default_args={"on_failure_callback": record},
    ) as dag:

        @task
        def upload() -> str:
            path = get_current_context()["params"]["lines"]
            return OpenAIHook("openai_default").upload_file(path, purpose="batch").id

        @task
        def read(batch_id: str) -> None:
            client = OpenAIHook("openai_default").get_conn()
            batch = client.batches.retrieve(batch_id)
            assert batch.output_file_id is not None
            answers = client.files.content(batch.output_file_id).text
            Path(get_current_context()["params"]["output"]).write_text(answers)

        run = OpenAITriggerBatchOperator(
            task_id="run",
            file_id=upload(),
            endpoint="/v1/chat/completions",
            wait_seconds=0.2,
            poll_interval=0.2,
            **options,
        )
        read(run.output)
    return dag


DAGS = [
    make("openai_deferrable", deferrable=True),
    make("openai_waiting", deferrable=False),
    make("openai_deferrable_impatient", deferrable=True, timeout=1),
    make("openai_waiting_impatient", deferrable=False, timeout=1),
]
