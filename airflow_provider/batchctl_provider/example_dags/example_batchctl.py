"""Writes lines, runs them as a batch and reads the answers.

It needs a connection `batchctl_default`, for example from the environment:

    AIRFLOW_CONN_BATCHCTL_DEFAULT='{"conn_type": "batchctl", "host": "http://127.0.0.1:8000"}'

`folder` is a path that every worker sees, or a URI such as s3://aws_default@bucket/batches.
"""

import json
import tempfile
from typing import Any

from airflow.sdk import DAG, ObjectStoragePath, Param, get_current_context, task

from batchctl_provider.operators.batchctl import BatchctlSubmitOperator

QUESTIONS = ("What is a batch?", "What is a lease?", "What is a shard?")

with DAG(
    dag_id="example_batchctl",
    schedule=None,
    catchup=False,
    tags=["example", "batchctl"],
    params={
        "model": Param("demo", type="string", description="A model that the server has."),
        "folder": Param(f"file://{tempfile.gettempdir()}/batchctl-example", type="string"),
    },
) as dag:

    @task
    def write_lines() -> str:
        """Write one line for each question, and return where."""
        context = get_current_context()
        model, folder = context["params"]["model"], ObjectStoragePath(context["params"]["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{context['ti'].run_id}.jsonl".replace(":", "-")
        with path.open("w") as file:
            for number, question in enumerate(QUESTIONS):
                line = {
                    "custom_id": f"question-{number}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "model": model,
                        "messages": [{"role": "user", "content": question}],
                        "max_tokens": 32,
                    },
                }
                file.write(json.dumps(line) + "\n")
        return str(path)

    @task
    def read_answers(batch: dict[str, Any]) -> int:
        """Return how many answers there are."""
        with ObjectStoragePath(batch["output_path"]).open("r") as file:
            answers = [json.loads(line) for line in file]
        for answer in answers:
            assert answer["response"]["status_code"] == 200  # noqa: PLR2004, S101
        return len(answers)

    lines = write_lines()
    ask = BatchctlSubmitOperator(
        task_id="ask",
        input_path=lines,
        output_path="{{ ti.xcom_pull(task_ids='write_lines') }}.answers.jsonl",
        error_path="{{ ti.xcom_pull(task_ids='write_lines') }}.errors.jsonl",
        metadata={"dag": "{{ dag.dag_id }}"},
        max_failed_share=0.1,
        poll_interval=5,
        deferrable=True,
    )
    read_answers(ask.output)
