"""A task that uploads lines, runs a batch over them, waits for it and downloads what came out."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from http import HTTPStatus
from itertools import count
from pathlib import PurePath
from typing import Any, Literal, NoReturn

from airflow.sdk import BaseOperator, Context, ObjectStoragePath
from typing_extensions import override

from batchctl_provider.batch import (
    check_completed,
    check_failed_share,
    is_ended,
    is_spent,
    summarize,
    warn_of_failed,
)
from batchctl_provider.client import Batch, Upload
from batchctl_provider.exceptions import BatchctlError, BatchTimedOut, RequestRefused
from batchctl_provider.hooks.batchctl import BatchctlHook, Place, make_upload
from batchctl_provider.triggers.batchctl import BatchctlTrigger
from batchctl_provider.version_compat import conf

# Past the batch's own expiry: its results are still to be written.
_GRACE_SECONDS = 3600.0
_DAY_SECONDS = 86_400.0
# The trigger reports the end of the time itself; Airflow's own time-out stands behind it.
_DEFERRAL_MARGIN_SECONDS = 600.0


class BatchctlSubmitOperator(BaseOperator):
    """Runs a batch, and ends well when the batch has completed.

    A task that is tried again finds the batch of the try before: the idempotency key is made of
    the DAG, the run, the task, its map index and what is asked for, and not of the number of the
    try. Another batch is made where that one cannot be used any more: it failed, expired or was
    cancelled, or had more failed lines than `max_failed_share` allows. Other input, or another
    model, is another batch, too. So clearing a task that ended well downloads its results again.

    What the batch has of output is downloaded also where the task fails afterwards.

    The value returned has `batch_id`, `status`, `request_counts`, `output_file_id`,
    `error_file_id`, `output_path` and `error_path`.
    """

    template_fields: Sequence[str] = (
        "input_path",
        "input_file_id",
        "records",
        "endpoint",
        "model",
        "completion_window",
        "priority",
        "metadata",
        "output_path",
        "error_path",
        "idempotency_key",
        "batchctl_conn_id",
    )
    template_fields_renderers = {"records": "json", "metadata": "json"}  # noqa: RUF012  Airflow's
    ui_color = "#dbe9f4"

    def __init__(
        self,
        *,
        input_path: Place | None = None,
        input_file_id: str | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
        endpoint: str = "/v1/chat/completions",
        model: str | None = None,
        completion_window: str = "24h",
        priority: int | str | None = None,
        metadata: Mapping[str, str] | None = None,
        output_path: Place | None = None,
        error_path: Place | None = None,
        max_failed_share: float | None = None,
        on_failed_lines: Literal["fail", "warn"] = "fail",
        idempotency_key: str | None = None,
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float = 30.0,
        timeout: float | None = None,
        batchctl_conn_id: str = BatchctlHook.default_conn_name,
        **options: Any,
    ) -> None:
        """Prepare the task; exactly one of `input_path`, `input_file_id` and `records` is given.

        Args:
            input_path: a file of lines that the worker sees, or the URI of an object.
            input_file_id: a file that the server has.
            records: the lines themselves, for small batches. `method` and `url` may be left out,
                and so may `custom_id`, which is then request-1, request-2, ...
            model: runs the lines whatever they name.
            output_path: where answers are written, a path or URI; the file is empty where no line
                succeeded.
            error_path: the same, for the lines that failed.
            max_failed_share: from 0 to 1; None allows any share.
            on_failed_lines: what more failed lines than that do: fail the task, or only warn.
            idempotency_key: in place of the one made; "{{ run_id }}/{{ ti.try_number }}" runs a
                new batch with each try.
            timeout: seconds to wait; then the batch is cancelled and the task fails. None waits
                an hour past the batch's own expiry.
        """
        super().__init__(**options)
        given = [one for one in (input_path, input_file_id, records) if one is not None]
        if len(given) != 1:
            raise ValueError("Give exactly one of input_path, input_file_id and records.")
        if max_failed_share is not None and not 0 <= max_failed_share <= 1:
            raise ValueError("max_failed_share is a share, from 0 to 1.")
        if on_failed_lines not in {"fail", "warn"}:
            raise ValueError("on_failed_lines is fail or warn.")
        if not wait_for_completion and (output_path is not None or error_path is not None):
            raise ValueError("Results can be written only after waiting for them.")
        if output_path is not None and output_path == error_path:
            raise ValueError("output_path and error_path are the same place.")
        self.input_path = input_path
        self.input_file_id = input_file_id
        self.records = records
        self.endpoint = endpoint
        self.model = model
        self.completion_window = completion_window
        self.priority = priority
        self.metadata = metadata
        self.output_path = output_path
        self.error_path = error_path
        self.max_failed_share = max_failed_share
        self.on_failed_lines = on_failed_lines
        self.idempotency_key = idempotency_key
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.timeout = timeout
        self.batchctl_conn_id = batchctl_conn_id
        self._hook: BatchctlHook | None = None
        self._batch_id: str | None = None

    @property
    def hook(self) -> BatchctlHook:
        """The hook of this process."""
        if self._hook is None:
            self._hook = BatchctlHook(self.batchctl_conn_id)
        return self._hook

    @override
    def execute(self, context: Context) -> dict[str, Any]:
        """Submit the batch and see it through.

        Raises:
            BatchctlError: one of the errors of this provider.
        """
        try:
            while True:
                batch, found = self._submit(context)
                self._batch_id = batch["id"]
                self.log.info("Batch %s is %s", batch["id"], batch["status"])
                if not self.wait_for_completion:
                    return summarize(batch)
                seconds = self._seconds_to_wait(batch)
                if self.deferrable and not is_ended(batch):
                    self._defer(batch, seconds, found=found)
                batch = self._wait(batch, seconds)
                if not self._was_cancelled_for_another_try(batch, found=found):
                    return self._finish(batch)
        finally:
            self.hook.close()

    def _defer(self, batch: Batch, seconds: float, *, found: bool) -> NoReturn:
        self.defer(
            trigger=BatchctlTrigger(
                batch_id=batch["id"],
                batchctl_conn_id=self.batchctl_conn_id,
                poll_interval=self.poll_interval,
                deadline=time.time() + seconds,
            ),
            method_name="execute_complete",
            kwargs={"found": found},
            timeout=timedelta(seconds=seconds + self.poll_interval + _DEFERRAL_MARGIN_SECONDS),
        )

    def execute_complete(
        self, context: Context, event: dict[str, Any] | None = None, *, found: bool = False
    ) -> dict[str, Any]:
        """See the batch through after the trigger has fired.

        Args:
            found: whether an earlier try had made the batch.

        Raises:
            BatchctlError: one of the errors of this provider.
        """
        if event is None or "batch_id" not in event:
            raise BatchctlError(f"The trigger's event is not one of ours: {event!r}.")
        batch_id, reason = event["batch_id"], event.get("reason")
        self._batch_id = batch_id
        try:
            if reason == "timeout":
                raise self._cancelled_late(batch_id)
            if reason != "ended":
                raise BatchctlError(
                    f"Batch {batch_id} can no longer be watched: {event.get('message')}"
                )
            batch = self.hook.get_batch(batch_id)
            if self._was_cancelled_for_another_try(batch, found=found):
                return self.execute(context)
            return self._finish(batch)
        finally:
            self.hook.close()

    @override
    def on_kill(self) -> None:
        """Cancel the batch; while the task is deferred its trigger does that."""
        if self._batch_id is None:
            return
        self.log.info("Cancelling batch %s", self._batch_id)
        # Not the hook's own client, whose call may be what was interrupted.
        hook = BatchctlHook(self.batchctl_conn_id)
        try:
            hook.cancel(self._batch_id)
        except Exception as error:  # noqa: BLE001  the task ends all the same
            self.log.warning("Batch %s could not be cancelled: %s", self._batch_id, error)
        finally:
            hook.close()

    def _submit(self, context: Context) -> tuple[Batch, bool]:
        """Return a batch, and whether an earlier try made it; a new one where that is of no use."""
        upload = self._make_upload()
        asked: dict[str, Any] = {
            "endpoint": self.endpoint,
            "completion_window": self.completion_window,
            "model": self.model or None,
            "priority": _parse_priority(self.priority),
            "metadata": dict(self.metadata) if self.metadata else None,
        }
        digest = self.input_file_id if upload is None else _digest(upload)
        key = self.idempotency_key or make_key(context, asked, digest)
        file_id = self.input_file_id or self._upload(upload, f"{key}/file")
        was_gone = False
        for number in count(1):
            try:
                batch, found = self.hook.submit_or_find(
                    input_file_id=file_id, key=f"{key}/{number}", **asked
                )
            except RequestRefused as refused:
                if upload is not None and not was_gone and _is_input_gone(refused):
                    was_gone = True
                    file_id = self._upload(upload, f"{key}/file/{uuid.uuid4()}")
                    continue
                # The batch of this key ran over the file that was gone.
                if was_gone and refused.code == "idempotency_key_reused":
                    continue
                raise
            if not is_spent(batch, max_failed_share=self._share_that_fails):
                return batch, found
            self.log.info(
                "Batch %s of an earlier try is %s: making another", batch["id"], batch["status"]
            )
        raise AssertionError  # the count has no end

    def _upload(self, upload: Upload | None, key: str) -> str:
        assert upload is not None  # noqa: S101  for the type checker
        return self.hook.client.upload(upload, idempotency_key=key)

    def _make_upload(self) -> Upload | None:
        if self.records is not None:
            return make_upload(render_records(self.records, endpoint=self.endpoint))
        if self.input_path is not None:
            return make_upload(self.input_path)
        return None

    @property
    def _share_that_fails(self) -> float | None:
        return self.max_failed_share if self.on_failed_lines == "fail" else None

    def _was_cancelled_for_another_try(self, batch: Batch, *, found: bool) -> bool:
        """Return whether the batch was cancelled as that of a try which was cleared.

        Clearing a deferred task starts the next try at once, which finds the batch; only then
        does the triggerer cancel it, on behalf of the try before.
        """
        if not found or batch["status"] != "cancelled":
            return False
        self.log.info("Batch %s was cancelled with an earlier try: making another", batch["id"])
        return True

    def _seconds_to_wait(self, batch: Batch) -> float:
        if self.timeout is not None:
            return self.timeout
        # By the server's clock alone; this machine's may differ.
        created, expires = batch.get("created_at"), batch.get("expires_at")
        window = float(expires - created) if created and expires else _DAY_SECONDS
        return window + _GRACE_SECONDS

    def _wait(self, batch: Batch, seconds: float) -> Batch:
        until = time.monotonic() + seconds
        while not is_ended(batch):
            left = until - time.monotonic()
            if left <= 0:
                raise self._cancelled_late(batch["id"])
            time.sleep(min(self.poll_interval, left))
            batch = self.hook.get_batch(batch["id"])
        return batch

    def _cancelled_late(self, batch_id: str) -> BatchTimedOut:
        """Cancel a batch that took too long, and return what to raise."""
        try:
            self.hook.cancel(batch_id)
        except BatchctlError as error:
            return BatchTimedOut(
                f"Batch {batch_id} took too long, and could not be cancelled: {error}"
            )
        return BatchTimedOut(f"Batch {batch_id} took too long and was cancelled.")

    def _finish(self, batch: Batch) -> dict[str, Any]:
        written: dict[str, str | None] = {}
        for name, place, file_id in (
            ("output_path", self.output_path, batch.get("output_file_id")),
            ("error_path", self.error_path, batch.get("error_file_id")),
        ):
            written[name] = None if place is None else _spell(place)
            if place is not None and (file_id is not None or batch["status"] == "completed"):
                num_bytes = self.hook.download(file_id, place)
                self.log.info("Wrote %d bytes to %s", num_bytes, written[name])
        check_completed(batch)
        if warning := warn_of_failed(batch):
            self.log.warning("%s", warning)
        if self._share_that_fails is not None:
            check_failed_share(batch, self._share_that_fails)
        return {**summarize(batch), **written}


def make_key(context: Context, asked: Mapping[str, Any], digest: str | None) -> str:
    """Return the idempotency key of what a task asks for; each try of it has the same."""
    ti = context["ti"]
    parts = [ti.dag_id, ti.run_id, ti.task_id, ti.map_index, asked, digest]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return f"airflow-{hashlib.sha256(text.encode()).hexdigest()}"


def render_records(records: Sequence[Mapping[str, Any]], *, endpoint: str) -> bytes:
    """Return the lines that `records` stand for.

    Raises:
        BatchctlError: one of them has no body.
    """
    lines = []
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping) or not isinstance(record.get("body"), Mapping):
            raise BatchctlError(f"Record {number} has no body; it is what one request sends.")
        line = {"custom_id": f"request-{number}", "method": "POST", "url": endpoint, **record}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _digest(upload: Upload) -> str:
    digest = hashlib.sha256()
    for piece in upload.open():
        digest.update(piece)
    return digest.hexdigest()


def _parse_priority(priority: int | str | None) -> int | None:
    # A template makes text of it.
    if priority is None or priority == "":
        return None
    try:
        return int(priority)
    except ValueError:
        raise BatchctlError(f"The priority is a whole number, and not {priority!r}.") from None


def _is_input_gone(refused: RequestRefused) -> bool:
    return refused.status == HTTPStatus.NOT_FOUND and refused.param == "input_file_id"


def _spell(place: Place) -> str:
    if isinstance(place, ObjectStoragePath | PurePath):
        return str(place)
    return os.fspath(place)
