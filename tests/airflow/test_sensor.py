"""Our sensor by itself, against a real server."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from airflow.sdk.exceptions import AirflowSensorTimeout, AirflowSkipException, TaskDeferred

from batchctl_provider.exceptions import BatchctlError, BatchFailed, BatchTimedOut
from batchctl_provider.hooks.batchctl import BatchctlHook
from batchctl_provider.sensors.batchctl import BatchctlSensor
from batchctl_provider.triggers.batchctl import BatchctlTrigger
from tests.airflow.servers import CHAT, OwnServer, Server, wait_for

if TYPE_CHECKING:
    from airflow.sdk import Context

pytestmark = pytest.mark.slow
NO_CONTEXT = cast("Context", {})


def submit(lines: Path) -> str:
    hook = BatchctlHook()
    batch_id = str(hook.submit(input_file_id=hook.upload(lines), endpoint=CHAT)["id"])
    hook.close()
    return batch_id


@pytest.fixture
def failed_id(connected: Server, tmp_path: Path) -> str:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("no json\n")
    batch_id = submit(lines)
    wait_for(lambda: bool(connected.batch(batch_id)["status"] == "failed"))
    return batch_id


def sensor(batch_id: str, **options: Any) -> BatchctlSensor:
    return BatchctlSensor(
        task_id="watch", **{"batch_id": batch_id, "poke_interval": 0.1, "timeout": 60, **options}
    )


def test_it_returns_what_became_of_the_batch(connected: Server, tmp_path: Path) -> None:
    batch_id = submit(connected.write_lines(tmp_path / "lines.jsonl", 2))
    found = sensor(batch_id).execute(NO_CONTEXT)
    assert found["batch_id"] == batch_id
    assert found["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    # The batch has ended: there is nothing to defer for.
    assert sensor(batch_id, deferrable=True).execute(NO_CONTEXT) == found


def test_deferred_it_leaves_the_batch_to_the_trigger(
    own_connected: OwnServer, tmp_path: Path
) -> None:
    lines = own_connected.write_lines(
        tmp_path / "lines.jsonl", 1, "[[tokens=100000]]", max_tokens=100_000
    )
    batch_id = submit(lines)
    task = sensor(batch_id, deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(NO_CONTEXT)
    trigger = deferred.value.trigger
    assert isinstance(trigger, BatchctlTrigger)
    assert (trigger.batch_id, trigger.poll_interval) == (batch_id, 0.1)
    assert trigger.deadline == pytest.approx(time.time() + 60, abs=20)
    assert not trigger.cancel_on_kill
    with pytest.raises(AirflowSensorTimeout):
        sensor(batch_id, timeout=0.1).execute(NO_CONTEXT)
    assert own_connected.batch(batch_id)["status"] in {"validating", "in_progress"}
    BatchctlHook().cancel(batch_id)


def test_a_failed_batch_fails_it(failed_id: str) -> None:
    with pytest.raises(BatchFailed, match="invalid_json_line"):
        sensor(failed_id).execute(NO_CONTEXT)
    with pytest.raises(BatchFailed, match="invalid_json_line"):
        sensor(failed_id, deferrable=True).execute_complete(
            NO_CONTEXT, {"reason": "ended", "batch_id": failed_id}
        )


def test_a_failed_batch_skips_it_where_that_is_asked_for(failed_id: str) -> None:
    for deferrable in (False, True):
        with pytest.raises(AirflowSkipException, match="invalid_json_line"):
            sensor(failed_id, deferrable=deferrable, soft_fail=True).execute(NO_CONTEXT)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (None, BatchctlError),
        ({"reason": "refused", "batch_id": "b", "message": "gone"}, BatchctlError),
        ({"reason": "timeout", "batch_id": "b"}, BatchTimedOut),
    ],
)
def test_an_event_that_is_no_success_fails_it_or_skips_it(
    event: dict[str, Any] | None, kind: type[BatchctlError]
) -> None:
    with pytest.raises(kind):
        sensor("b").resume_execution("execute_complete", {"event": event}, NO_CONTEXT)
    with pytest.raises(AirflowSkipException):
        sensor("b", soft_fail=True).resume_execution(
            "execute_complete", {"event": event}, NO_CONTEXT
        )
