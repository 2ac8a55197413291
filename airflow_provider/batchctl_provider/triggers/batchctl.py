"""Waits for a batch in the triggerer."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent
from typing_extensions import override

from batchctl_provider.batch import is_ended
from batchctl_provider.client import AsyncClient
from batchctl_provider.exceptions import BatchctlError, RequestRefused, ServerUnavailable
from batchctl_provider.hooks.batchctl import BatchctlHook
from batchctl_provider.version_compat import AirflowNotFoundException


class BatchctlTrigger(BaseTrigger):
    """Fires once, when a batch has ended, or the time for it, or all hope.

    Looking again changes nothing, so the trigger may start over on another triggerer at any time.
    A server that is away, or a connection that cannot be read at the moment, is asked again at
    the next poll. A batch that is being cancelled still runs.

    The event is a dictionary of `reason` (ended, timeout or refused), `batch_id`, `batch_status`
    (the last one seen, or None) and `message`.
    """

    def __init__(
        self,
        *,
        batch_id: str,
        batchctl_conn_id: str = BatchctlHook.default_conn_name,
        poll_interval: float = 30.0,
        deadline: float | None = None,
        cancel_on_kill: bool = True,
    ) -> None:
        """Prepare to wait.

        Args:
            poll_interval: seconds from one look at the batch to the next.
            deadline: the unix time at which the wait ends; None: it has no end of its own.
            cancel_on_kill: whether clearing or marking the task cancels the batch.
        """
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's has no types
        self.batch_id = batch_id
        self.batchctl_conn_id = batchctl_conn_id
        self.poll_interval = poll_interval
        self.deadline = deadline
        self.cancel_on_kill = cancel_on_kill

    @override
    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what the trigger is made again from; it is kept in the database."""
        return (
            "batchctl_provider.triggers.batchctl.BatchctlTrigger",
            {
                "batch_id": self.batch_id,
                "batchctl_conn_id": self.batchctl_conn_id,
                "poll_interval": self.poll_interval,
                "deadline": self.deadline,
                "cancel_on_kill": self.cancel_on_kill,
            },
        )

    @override
    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the one event."""
        status: str | None = None
        while True:
            try:
                async with self._hook().open_async_client() as client:
                    status = await self._wait(client)
            except (BatchctlError, AirflowNotFoundException) as error:
                if not isinstance(error, ServerUnavailable):
                    yield self._event("refused", status, str(error))
                    return
                self.log.warning("%s Looking again at batch %s.", error, self.batch_id)
            except Exception as error:  # noqa: BLE001  a poll that fails does not end the wait
                # Airflow before 3.3.2, for one, refuses to read a connection while another
                # trigger does.
                self.log.warning("%s; looking again at batch %s", error, self.batch_id)
            else:
                ended = status is not None
                yield self._event("ended" if ended else "timeout", status, "")
                return
            if self._is_over():
                yield self._event("timeout", status, "")
                return
            await self._sleep()

    @override
    async def on_kill(self) -> None:
        """Cancel the batch: somebody cleared or marked the task. Airflow 3.3 and newer call it."""
        if not self.cancel_on_kill:
            return
        self.log.info("Cancelling batch %s", self.batch_id)
        try:
            async with self._hook().open_async_client() as client:
                with suppress(RequestRefused):  # it has ended
                    await client.cancel_batch(self.batch_id)
        except Exception as error:  # noqa: BLE001  the task ends all the same
            self.log.warning("Batch %s could not be cancelled: %s", self.batch_id, error)

    async def _wait(self, client: AsyncClient) -> str | None:
        """Return the status that the batch ended with; None: it did not within the time."""
        while True:
            batch = await client.get_batch(self.batch_id)
            if is_ended(batch):
                return str(batch["status"])
            if self._is_over():
                return None
            await self._sleep()

    def _is_over(self) -> bool:
        return self.deadline is not None and time.time() >= self.deadline

    async def _sleep(self) -> None:
        seconds = self.poll_interval
        if self.deadline is not None:
            seconds = min(seconds, max(0.0, self.deadline - time.time()))
        await asyncio.sleep(seconds)

    def _event(self, reason: str, status: str | None, message: str) -> TriggerEvent:
        return TriggerEvent(
            {
                "reason": reason,
                "batch_id": self.batch_id,
                "batch_status": status,
                "message": message,
            }
        )

    def _hook(self) -> BatchctlHook:
        return BatchctlHook(self.batchctl_conn_id)
