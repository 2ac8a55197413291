"""Tasks that wait for a batch which another task, or somebody else, made."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from airflow.sdk import BaseSensorOperator, Context, PokeReturnValue
from typing_extensions import override

from batchctl_provider.batch import check_completed, is_ended, summarize
from batchctl_provider.client import Batch
from batchctl_provider.exceptions import BatchctlError, BatchNotCompleted, BatchTimedOut
from batchctl_provider.hooks.batchctl import BatchctlHook
from batchctl_provider.triggers.batchctl import BatchctlTrigger
from batchctl_provider.version_compat import AirflowSkipException, conf

_DEFERRAL_MARGIN_SECONDS = 600.0


class BatchctlSensor(BaseSensorOperator):
    """Succeeds when a batch has completed, and fails when it ends otherwise.

    With `soft_fail` it is skipped where it would fail. The batch is not cancelled when the time
    is over: it is not the sensor's.

    The value returned has `batch_id`, `status`, `request_counts`, `output_file_id` and
    `error_file_id`.
    """

    template_fields: Sequence[str] = ("batch_id", "batchctl_conn_id")
    ui_color = "#dbe9f4"

    def __init__(
        self,
        *,
        batch_id: str,
        batchctl_conn_id: str = BatchctlHook.default_conn_name,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **options: Any,
    ) -> None:
        """Prepare the task; `poke_interval`, `timeout` and `mode` are those of any sensor."""
        super().__init__(**options)
        self.batch_id = batch_id
        self.batchctl_conn_id = batchctl_conn_id
        self.deferrable = deferrable

    @override
    def poke(self, context: Context) -> PokeReturnValue:
        """Look at the batch once.

        Raises:
            BatchNotCompleted: it has ended, and not well.
        """
        batch = self._look()
        if not is_ended(batch):
            return PokeReturnValue(is_done=False)
        return PokeReturnValue(is_done=True, xcom_value=self._judge(batch))

    @override
    def execute(self, context: Context) -> Any:
        """Wait here, or look once and leave the waiting to the triggerer."""
        if not self.deferrable:
            return super().execute(context)
        found = self.poke(context)
        if not found.is_done:
            self.defer(
                trigger=BatchctlTrigger(
                    batch_id=self.batch_id,
                    batchctl_conn_id=self.batchctl_conn_id,
                    poll_interval=self.poke_interval,
                    deadline=time.time() + self.timeout,
                    cancel_on_kill=False,
                ),
                method_name="execute_complete",
                timeout=timedelta(
                    seconds=self.timeout + self.poke_interval + _DEFERRAL_MARGIN_SECONDS
                ),
            )
        return found.xcom_value

    def execute_complete(
        self, context: Context, event: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what became of the batch, after the trigger has fired.

        Raises:
            BatchctlError: one of the errors of this provider.
        """
        del context
        if event is None or "batch_id" not in event:
            raise BatchctlError(f"The trigger's event is not one of ours: {event!r}.")
        if event.get("reason") == "timeout":
            raise BatchTimedOut(f"Batch {self.batch_id} did not end within the sensor's time.")
        if event.get("reason") != "ended":
            raise BatchctlError(
                f"Batch {self.batch_id} can no longer be watched: {event.get('message')}"
            )
        return self._judge(self._look())

    def _look(self) -> Batch:
        with BatchctlHook(self.batchctl_conn_id).get_conn() as client:
            return client.get_batch(self.batch_id)

    def _judge(self, batch: Batch) -> dict[str, Any]:
        try:
            check_completed(batch)
        except BatchNotCompleted as error:
            # Airflow itself turns only its own time-outs into a skip while a sensor pokes.
            if self.soft_fail:
                raise AirflowSkipException(str(error)) from None
            raise
        return summarize(batch)
