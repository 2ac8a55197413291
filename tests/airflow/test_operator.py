"""Our operator, in DAGs and by itself, against a real server."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from airflow.sdk import DAG, Context, ObjectStoragePath
from airflow.sdk.exceptions import TaskDeferred
from airflow.sdk.io import attach
from fsspec.implementations.memory import MemoryFileSystem

from batchctl_provider.exceptions import (
    BatchCancelled,
    BatchctlError,
    BatchExpired,
    BatchFailed,
    BatchTimedOut,
    RequestRefused,
    TooManyLinesFailed,
)
from batchctl_provider.hooks.batchctl import BatchctlHook
from batchctl_provider.operators.batchctl import BatchctlSubmitOperator
from batchctl_provider.triggers.batchctl import BatchctlTrigger
from tests.airflow.servers import OwnServer, Server, custom_ids, wait_for

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

pytestmark = pytest.mark.slow

LoadDag = Callable[[str, str], DAG]
SLOW = "[[tokens=100000]]"


def run(dag: DAG, folder: Path, lines: Path) -> "DagRun":
    places = {name: str(folder / name) for name in ("output", "failure")}
    ran: DagRun = dag.test(run_conf={"lines": str(lines), **places})
    return ran


@pytest.fixture
def context(request: pytest.FixtureRequest) -> Context:
    """The context of a task instance that no other test has."""
    run_id = f"{request.node.name}-{time.time_ns()}"
    ti = SimpleNamespace(dag_id="dag", run_id=run_id, task_id="run", map_index=-1, try_number=1)
    return cast("Context", {"ti": ti})


def operator(**options: Any) -> BatchctlSubmitOperator:
    options = {"task_id": "run", "poll_interval": 0.1, "deferrable": False, **options}
    return BatchctlSubmitOperator(**options)


def ids(num_lines: int) -> list[str]:
    return [f"r{number}" for number in range(num_lines)]


# --- in DAGs ---


def test_example_dag_uploads_waits_and_downloads(
    connected: Server, load_dag: LoadDag, tmp_path: Path
) -> None:
    dag = load_dag("example_batchctl", "example_batchctl")
    folder = tmp_path / "batches"
    ran = dag.test(run_conf={"model": connected.model, "folder": f"file://{folder}"})
    assert ran.state == "success"
    (answers,) = folder.glob("*.answers.jsonl")
    assert custom_ids(answers) == ["question-0", "question-1", "question-2"]
    (errors,) = folder.glob("*.errors.jsonl")
    assert errors.read_bytes() == b""
    assert not list(folder.glob("*.part"))


def test_a_file_that_was_uploaded_before(
    connected: Server, load_dag: LoadDag, tmp_path: Path
) -> None:
    lines = connected.write_lines(tmp_path / "lines.jsonl", 5)
    ran = run(load_dag("batchctl_variants", "by_file_id"), tmp_path, lines)
    assert ran.state == "success"
    assert custom_ids(tmp_path / "output") == ids(5)


def test_a_task_that_is_tried_again_finds_its_batch(
    connected: Server, load_dag: LoadDag, tmp_path: Path
) -> None:
    lines = connected.write_lines(tmp_path / "lines.jsonl", 3, content=str(tmp_path))
    before = set(connected.batch_ids())
    ran = run(load_dag("batchctl_variants", "retried"), tmp_path, lines)
    assert ran.state == "success"
    (ti,) = ran.get_task_instances()
    assert ti.try_number == 2
    assert len(set(connected.batch_ids()) - before) == 1
    assert custom_ids(tmp_path / "output") == ids(3)


def test_sensors_wait_for_a_batch_of_another_task(
    connected: Server, load_dag: LoadDag, tmp_path: Path
) -> None:
    lines = connected.write_lines(tmp_path / "lines.jsonl", 3)
    ran = run(load_dag("batchctl_variants", "watched"), tmp_path, lines)
    assert ran.state == "success"
    assert custom_ids(tmp_path / "output") == ids(3)


# --- by itself ---


def test_records_are_lines_without_their_address(
    connected: Server, context: Context, tmp_path: Path
) -> None:
    body = {"model": connected.model, "messages": [{"role": "user", "content": "hello"}]}
    done = operator(
        records=[{"body": body}, {"body": body, "custom_id": "mine"}],
        output_path=ObjectStoragePath(f"file://{tmp_path}/new/out.jsonl"),
        metadata={"team": "a"},
        priority="3",
    ).execute(context)
    assert custom_ids(tmp_path / "new" / "out.jsonl") == ["request-1", "mine"]
    batch = connected.batch(done["batch_id"])
    assert (batch["metadata"], batch["priority"]) == ({"team": "a"}, 3)
    assert done == {
        "batch_id": batch["id"],
        "status": "completed",
        "request_counts": {"total": 2, "completed": 2, "failed": 0},
        "output_file_id": batch["output_file_id"],
        "error_file_id": None,
        "output_path": f"file://{tmp_path}/new/out.jsonl",
        "error_path": None,
    }
    json.dumps(done)  # it travels as an XCom


def test_answers_are_written_to_an_object_store(
    connected: Server, context: Context, tmp_path: Path
) -> None:
    lines = connected.write_lines(tmp_path / "lines.jsonl", 2)
    attach("memory", fs=MemoryFileSystem())
    source = ObjectStoragePath("memory://input/lines.jsonl")
    source.write_bytes(lines.read_bytes())
    operator(input_path=str(source), output_path="memory://output/out.jsonl").execute(context)
    written = ObjectStoragePath("memory://output/out.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in written] == ids(2)


def test_what_is_wrong_with_the_input_is_in_the_exception(
    connected: Server, context: Context, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(connected.line(0) + "\nno json\n" + connected.line(0) + "\n")
    with pytest.raises(BatchFailed) as caught:
        operator(input_path=lines).execute(context)
    said = str(caught.value)
    assert "line 2: " in said
    assert "(invalid_json_line)" in said
    assert "line 3: " in said
    assert "(duplicate_custom_id)" in said


def test_other_input_in_the_next_try_is_another_batch(
    connected: Server, context: Context, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("no json\n")
    with pytest.raises(BatchFailed):
        operator(input_path=lines).execute(context)
    connected.write_lines(lines, 1)
    assert operator(input_path=lines).execute(context)["status"] == "completed"


def test_a_failed_batch_is_not_found_again(
    connected: Server, context: Context, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("no json\n")
    before = set(connected.batch_ids())
    for _ in range(3):
        with pytest.raises(BatchFailed):
            operator(input_path=lines).execute(context)
    assert len(set(connected.batch_ids()) - before) == 3


def test_an_input_that_the_server_no_longer_has_is_uploaded_again(
    own_connected: OwnServer, context: Context, tmp_path: Path
) -> None:
    lines = own_connected.write_lines(tmp_path / "lines.jsonl", 1)
    first = operator(input_path=lines).execute(context)
    file_id = own_connected.batch(first["batch_id"])["input_file_id"]
    assert own_connected.call(f"files/{file_id}", method="DELETE")["deleted"]
    again = operator(input_path=lines, output_path=tmp_path / "out").execute(context)
    assert again["batch_id"] != first["batch_id"]
    assert custom_ids(tmp_path / "out") == ids(1)


def test_a_key_of_ones_own_makes_a_batch_of_each_try(
    connected: Server, context: Context, tmp_path: Path
) -> None:
    lines = connected.write_lines(tmp_path / "lines.jsonl", 1)
    made = {
        operator(input_path=lines, idempotency_key=f"{tmp_path}/{key}").execute(context)["batch_id"]
        for key in (1, 2, 1)
    }
    assert len(made) == 2


@pytest.fixture
def half_bad(own_connected: OwnServer, tmp_path: Path) -> Path:
    """Two lines that are answered, and two that are not."""
    lines = tmp_path / "lines.jsonl"
    contents = ("hello", "[[fault=error]]", "hello", "[[fault=error]]")
    lines.write_text(
        "".join(own_connected.line(i, content) + "\n" for i, content in enumerate(contents))
    )
    return lines


def test_too_many_failed_lines_fail_the_task_after_the_download(
    own_connected: OwnServer, context: Context, half_bad: Path, tmp_path: Path
) -> None:
    options = {
        "input_path": half_bad,
        "output_path": tmp_path / "out",
        "error_path": tmp_path / "err",
    }
    with pytest.raises(TooManyLinesFailed, match="2 of 4 lines"):
        operator(max_failed_share=0.4, **options).execute(context)
    assert custom_ids(tmp_path / "out") == ["r0", "r2"]
    assert custom_ids(tmp_path / "err") == ["r1", "r3"]
    # The next try is worth another batch.
    before = own_connected.batch_ids()
    with pytest.raises(TooManyLinesFailed):
        operator(max_failed_share=0.4, **options).execute(context)
    assert len(own_connected.batch_ids()) == len(before) + 1


@pytest.mark.parametrize(
    "options", [{"max_failed_share": 0.5}, {}, {"max_failed_share": 0.4, "on_failed_lines": "warn"}]
)
def test_fewer_failed_lines_or_a_warning_let_the_task_pass(
    own_connected: OwnServer,
    context: Context,
    half_bad: Path,
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = operator(input_path=half_bad, **options).execute(context)
    assert done["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    assert "2 of 4 lines of batch" in capsys.readouterr().out
    assert own_connected.batch(done["batch_id"])["status"] == "completed"


def test_a_batch_that_takes_too_long_is_cancelled_and_the_next_try_makes_another(
    own_connected: OwnServer, context: Context, tmp_path: Path
) -> None:
    lines = own_connected.write_lines(tmp_path / "lines.jsonl", 1, SLOW, max_tokens=100_000)
    before = set(own_connected.batch_ids())
    for number in (1, 2):
        with pytest.raises(BatchTimedOut, match="took too long and was cancelled"):
            operator(input_path=lines, timeout=0.5).execute(context)
        made = set(own_connected.batch_ids()) - before
        assert len(made) == number
        assert {own_connected.batch(one)["status"] for one in made} <= {"cancelling", "cancelled"}


def test_killing_a_task_cancels_its_batch(
    own_connected: OwnServer, context: Context, tmp_path: Path
) -> None:
    lines = own_connected.write_lines(tmp_path / "lines.jsonl", 1, SLOW, max_tokens=100_000)
    task = operator(input_path=lines, wait_for_completion=False)
    batch_id = task.execute(context)["batch_id"]
    task.on_kill()
    wait_for(lambda: own_connected.batch(batch_id)["status"] == "cancelled")


def test_a_cancelled_batch_fails_the_task_with_what_was_done_downloaded(
    own_connected: OwnServer, context: Context, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        own_connected.line(0) + "\n" + own_connected.line(1, SLOW, max_tokens=100_000) + "\n"
    )
    places = {"output_path": tmp_path / "out", "error_path": tmp_path / "err"}
    task = operator(input_path=lines, deferrable=True, **places)
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context)
    trigger = deferred.value.trigger
    assert isinstance(trigger, BatchctlTrigger)
    batch_id = trigger.batch_id
    wait_for(lambda: own_connected.batch(batch_id)["request_counts"]["completed"] == 1)
    BatchctlHook().cancel(batch_id)
    wait_for(lambda: own_connected.batch(batch_id)["status"] == "cancelled")
    with pytest.raises(BatchCancelled, match="was cancelled"):
        task.execute_complete(context, {"reason": "ended", "batch_id": batch_id})
    assert custom_ids(tmp_path / "out") == ["r0"]
    assert custom_ids(tmp_path / "err") == ["r1"]


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_cleared_task_does_not_fail_with_the_batch_that_was_cancelled_with_the_try_before(
    own_connected: OwnServer,
    context: Context,
    tmp_path: Path,
    deferrable: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    """The triggerer cancels the batch after the next try has found it."""
    lines = own_connected.write_lines(
        tmp_path / "lines.jsonl", 1, "[[tokens=3000]]", max_tokens=3000
    )
    first = operator(input_path=lines, wait_for_completion=False).execute(context)["batch_id"]
    if deferrable:
        task = operator(input_path=lines, deferrable=True)
        with pytest.raises(TaskDeferred) as deferred:
            task.execute(context)
        found, options = deferred.value.trigger, deferred.value.kwargs
        assert isinstance(found, BatchctlTrigger)
        assert found.batch_id == first
        asyncio.run(found.on_kill())
        wait_for(lambda: own_connected.batch(first)["status"] == "cancelled")
        with pytest.raises(TaskDeferred) as again:
            task.execute_complete(
                context, {"reason": "ended", "batch_id": first}, **(options or {})
            )
        another = again.value.trigger
        assert isinstance(another, BatchctlTrigger)
        assert another.batch_id != first
        task.on_kill()
    else:
        cancelling = threading.Timer(1.0, BatchctlHook().cancel, [first])
        cancelling.start()
        done = operator(input_path=lines).execute(context)
        cancelling.join()
        assert done["batch_id"] != first
        assert done["status"] == "completed"


def test_a_batch_that_expires_says_so(
    own_connected: OwnServer, context: Context, tmp_path: Path
) -> None:
    lines = own_connected.write_lines(tmp_path / "lines.jsonl", 1, SLOW, max_tokens=100_000)
    with pytest.raises(BatchExpired, match="completion window"):
        operator(input_path=lines, completion_window="1s").execute(context)


def test_waiting_without_a_time_of_its_own_lasts_an_hour_past_the_batch(
    own_connected: OwnServer, context: Context, tmp_path: Path
) -> None:
    lines = own_connected.write_lines(tmp_path / "lines.jsonl", 1, SLOW, max_tokens=100_000)
    task = operator(input_path=lines, completion_window="2h", deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context)
    trigger = deferred.value.trigger
    assert isinstance(trigger, BatchctlTrigger)
    assert trigger.deadline is not None
    assert 3 * 3600 - 60 < trigger.deadline - time.time() <= 3 * 3600
    assert deferred.value.timeout is not None
    assert deferred.value.timeout.total_seconds() > 3 * 3600
    task.on_kill()


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (None, BatchctlError),
        ({"status": "success"}, BatchctlError),
        ({"reason": "refused", "batch_id": "batch_none", "message": "gone"}, BatchctlError),
        ({"reason": "timeout", "batch_id": "batch_none"}, BatchTimedOut),
        ({"reason": "ended", "batch_id": "batch_none"}, RequestRefused),
    ],
)
@pytest.mark.usefixtures("own_connected")
def test_an_event_that_is_no_success_fails_the_task(
    context: Context, event: dict[str, Any] | None, kind: type[BatchctlError]
) -> None:
    with pytest.raises(kind):
        operator(input_file_id="file-none").execute_complete(context, event)


def test_a_wrong_endpoint_is_refused_in_the_servers_words(
    connected: Server, context: Context
) -> None:
    record = {"body": {"model": connected.model}}
    with pytest.raises(RequestRefused, match="Invalid 'endpoint'") as caught:
        operator(records=[record], endpoint="/v1/nowhere").execute(context)
    assert (caught.value.status, caught.value.param) == (400, "endpoint")


@pytest.mark.usefixtures("connected")
def test_an_input_that_is_not_there_is_named(context: Context) -> None:
    with pytest.raises(BatchctlError, match="There is no file /nowhere/lines"):
        operator(input_path="/nowhere/lines").execute(context)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_path": "a", "input_file_id": "b"},
        {"input_path": "a", "max_failed_share": 1.5},
        {"input_path": "a", "on_failed_lines": "explode"},
        {"input_path": "a", "output_path": "b", "wait_for_completion": False},
        {"input_path": "a", "output_path": "b", "error_path": "b"},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\."):
        operator(**options)
