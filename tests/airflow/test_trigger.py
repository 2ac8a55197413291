"""Our trigger, under an event loop of the test, against real servers."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from airflow._shared.module_loading import import_string
from typing_extensions import override

from batchctl_provider.hooks.batchctl import BatchctlHook
from batchctl_provider.triggers.batchctl import BatchctlTrigger
from tests.airflow.servers import CHAT, OwnServer, wait_for

pytestmark = pytest.mark.slow


def submit(server: OwnServer, folder: Path, tokens: int) -> str:
    content = f"[[tokens={tokens}]]"
    lines = server.write_lines(folder / "lines.jsonl", 1, content, max_tokens=tokens)
    hook = BatchctlHook()
    batch_id = str(hook.submit(input_file_id=hook.upload(lines), endpoint=CHAT)["id"])
    hook.close()
    return batch_id


def fire(trigger: BatchctlTrigger, seconds: float = 120.0) -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        events = [event async for event in trigger.run()]
        assert len(events) == 1
        payload: dict[str, Any] = events[0].payload
        return payload

    return asyncio.run(asyncio.wait_for(first(), seconds))


def test_it_fires_when_the_batch_has_ended_and_again_when_started_again(
    own_connected: OwnServer, tmp_path: Path
) -> None:
    batch_id = submit(own_connected, tmp_path, 5)
    trigger = BatchctlTrigger(batch_id=batch_id, poll_interval=0.1)
    expected = {
        "reason": "ended",
        "batch_id": batch_id,
        "batch_status": "completed",
        "message": "",
    }
    assert fire(trigger) == expected
    assert fire(trigger) == expected


def test_it_is_made_again_from_what_it_serializes_without_a_secret() -> None:
    trigger = BatchctlTrigger(
        batch_id="batch_1", batchctl_conn_id="other", poll_interval=7.0, deadline=1e9
    )
    path, options = trigger.serialize()
    made = import_string(path)(**json.loads(json.dumps(options)))
    assert type(made) is BatchctlTrigger
    assert made.serialize() == (path, options)
    assert options == {
        "batch_id": "batch_1",
        "batchctl_conn_id": "other",
        "poll_interval": 7.0,
        "deadline": 1e9,
        "cancel_on_kill": True,
    }


def test_the_time_ends_while_the_batch_runs(own_connected: OwnServer, tmp_path: Path) -> None:
    batch_id = submit(own_connected, tmp_path, 100_000)
    trigger = BatchctlTrigger(batch_id=batch_id, poll_interval=60, deadline=time.time() + 0.5)
    assert fire(trigger)["reason"] == "timeout"
    assert own_connected.batch(batch_id)["status"] in {"validating", "in_progress"}
    asyncio.run(trigger.on_kill())


def test_a_user_who_kills_the_task_cancels_the_batch(
    own_connected: OwnServer, tmp_path: Path
) -> None:
    batch_id = submit(own_connected, tmp_path, 100_000)
    watching = BatchctlTrigger(batch_id=batch_id, cancel_on_kill=False)
    asyncio.run(watching.on_kill())
    assert own_connected.batch(batch_id)["status"] in {"validating", "in_progress"}
    trigger = BatchctlTrigger(batch_id=batch_id, poll_interval=0.1)
    asyncio.run(trigger.on_kill())
    # On its way there the batch is `cancelling`, which is not the end.
    assert fire(trigger)["batch_status"] == "cancelled"
    asyncio.run(trigger.on_kill())  # a batch that has ended is left alone


def test_leaving_the_triggerer_does_not_cancel_the_batch(
    own_connected: OwnServer, tmp_path: Path
) -> None:
    batch_id = submit(own_connected, tmp_path, 100_000)
    trigger = BatchctlTrigger(batch_id=batch_id, poll_interval=60)

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(aiter(trigger.run())), 1)
        await trigger.cleanup()

    asyncio.run(leave())
    assert own_connected.batch(batch_id)["status"] in {"validating", "in_progress"}
    asyncio.run(trigger.on_kill())


@pytest.mark.usefixtures("own_connected")
def test_a_batch_that_nobody_knows_ends_the_wait() -> None:
    event = fire(BatchctlTrigger(batch_id="batch_none", poll_interval=0.1))
    assert event["reason"] == "refused"
    assert "batch_none" in event["message"]


def test_a_connection_that_is_not_there_ends_the_wait() -> None:
    event = fire(BatchctlTrigger(batch_id="batch_1", batchctl_conn_id="nowhere"))
    assert event["reason"] == "refused"
    assert "nowhere" in event["message"]


def test_a_server_that_is_away_for_some_polls_is_waited_for(
    connect: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = OwnServer(tmp_path)
    with server.running():
        connect(server, patience_seconds=0.3)
        batch_id = submit(server, tmp_path, 300)
        trigger = BatchctlTrigger(batch_id=batch_id, poll_interval=0.1, deadline=time.time() + 120)
        found: list[dict[str, Any]] = []
        waiting = threading.Thread(daemon=True, target=lambda: found.append(fire(trigger)))
        said: list[str] = []

        def failed_polls() -> int:
            said.append(capsys.readouterr().out)
            return "".join(said).count("Looking again")

        waiting.start()
        server.stop()
        wait_for(lambda: failed_polls() >= 2)
        server.start()
        waiting.join(120)
        assert found[0]["batch_status"] == "completed"


class _Failing(BaseHTTPRequestHandler):
    """Answers with each status of the server's list once, then with a completed batch."""

    def do_GET(self) -> None:
        left: list[int] = self.server.left  # type: ignore[attr-defined]
        status = left.pop(0) if left else 200
        body = json.dumps({"id": "batch_1", "status": "completed"}).encode()
        if status != 200:
            body = b"<html>no JSON</html>"
        self.send_response(200 if status == 299 else status)
        if status == 429:
            self.send_header("retry-after", "0.1")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The statuses with which the server of the default connection will answer."""
    left: list[int] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Failing) as server:
        server.left = left  # type: ignore[attr-defined]
        thread = threading.Thread(daemon=True, target=server.serve_forever)
        thread.start()
        connection = {
            "conn_type": "batchctl",
            "host": "127.0.0.1",
            "port": server.server_port,
            "extra": {"patience_seconds": "5"},
        }
        monkeypatch.setenv("AIRFLOW_CONN_BATCHCTL_DEFAULT", json.dumps(connection))
        yield left
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("statuses", [[500, 502, 503], [429, 429], [408], [299], []])
def test_answers_that_may_pass_are_waited_out(failing: list[int], statuses: list[int]) -> None:
    failing += statuses
    assert fire(BatchctlTrigger(batch_id="batch_1", poll_interval=0.1))["reason"] == "ended"
    assert failing == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_answers_that_stay_end_the_wait(failing: list[int], status: int) -> None:
    failing.append(status)
    event = fire(BatchctlTrigger(batch_id="batch_1", poll_interval=0.1))
    assert event["reason"] == "refused"
    assert str(status) in event["message"]
