"""The connection to a batchctl server, and what tasks do with it."""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from airflow.sdk import BaseHook, Connection, ObjectStoragePath
from typing_extensions import override

from batchctl_provider.client import AsyncClient, Batch, Client, Server, Upload
from batchctl_provider.exceptions import BatchctlError

CHUNK_BYTES = 256 << 10

Place = str | os.PathLike[str] | ObjectStoragePath
"""A local path, or the URI of an object such as s3://connection@bucket/key."""


class BatchctlHook(BaseHook):
    """Talks to the server that a connection of type `batchctl` names.

    The connection's host is the base URL, with or without `/v1`; its password is the API key. A
    host without a scheme is completed with the connection's schema (http if it has none) and
    port. Extra: `timeout_seconds`, `patience_seconds`, `ca_file`.
    """

    conn_name_attr = "batchctl_conn_id"
    default_conn_name = "batchctl_default"
    conn_type = "batchctl"
    hook_name = "batchctl"

    def __init__(self, batchctl_conn_id: str = default_conn_name, **options: Any) -> None:
        super().__init__(**options)
        self.batchctl_conn_id = batchctl_conn_id

    @classmethod
    @override
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """Return the connection form of Airflow before 3.2; newer ones read the declaration."""
        return {
            "hidden_fields": ["schema", "login", "port"],
            "relabeling": {"host": "Base URL", "password": "API key"},
            "placeholders": {"host": "http://batch.example:8000"},
        }

    @cached_property
    def client(self) -> Client:
        """The hook's client, made when it is first needed."""
        return self.get_conn()

    @override
    def get_conn(self) -> Client:
        """Return a new client of the connection's server.

        Raises:
            BatchctlError: the connection is not filled in rightly.
        """
        try:
            return Client(read_connection(self.get_connection(self.batchctl_conn_id)))
        except (ValueError, OSError) as error:
            raise self._bad_connection(error) from None

    @asynccontextmanager
    async def open_async_client(self) -> AsyncIterator[AsyncClient]:
        """Yield a client for an event loop.

        Raises:
            BatchctlError: the connection is not filled in rightly.
        """
        connection = await self.aget_connection(self.batchctl_conn_id)
        try:
            # In a thread: it may read certificates.
            client = await asyncio.to_thread(AsyncClient, read_connection(connection))
        except (ValueError, OSError) as error:
            raise self._bad_connection(error) from None
        async with client:
            yield client

    def _bad_connection(self, error: Exception) -> BatchctlError:
        return BatchctlError(f"Connection {self.batchctl_conn_id}: {error}")

    def close(self) -> None:
        """End all connections."""
        if "client" in self.__dict__:
            self.client.close()
            del self.__dict__["client"]

    def test_connection(self) -> tuple[bool, str]:
        """Return whether the server answers and takes the key, and a sentence about it."""
        try:
            with self.get_conn() as client:
                models = client.list_models()
        except Exception as error:  # noqa: BLE001  the Test button shows whatever it is
            return False, str(error)
        return True, f"The server answers; it has {len(models)} models."

    def upload(
        self, source: Place | bytes, *, filename: str | None = None, key: str | None = None
    ) -> str:
        """Return the id of a file with the bytes that are at a place, or given."""
        return self.client.upload(make_upload(source, filename=filename), idempotency_key=key)

    def submit(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str = "24h",
        model: str | None = None,
        priority: int | None = None,
        metadata: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Batch:
        """Return a new batch; with an idempotency key that was used before, that batch."""
        batch, _ = self.submit_or_find(
            input_file_id=input_file_id,
            endpoint=endpoint,
            completion_window=completion_window,
            model=model,
            priority=priority,
            metadata=metadata,
            key=key,
        )
        return batch

    def submit_or_find(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        model: str | None,
        priority: int | None,
        metadata: Mapping[str, str] | None,
        key: str | None,
    ) -> tuple[Batch, bool]:
        """Return a batch, and whether an earlier call with the idempotency key made it."""
        fields = {
            "input_file_id": input_file_id,
            "endpoint": endpoint,
            "completion_window": completion_window,
            "metadata": dict(metadata) if metadata else None,
            "model": model,
            "priority": priority,
        }
        return self.client.create_batch(
            {name: value for name, value in fields.items() if value is not None},
            idempotency_key=key,
        )

    def get_batch(self, batch_id: str) -> Batch:
        """Return a batch as it is now."""
        return self.client.get_batch(batch_id)

    def cancel(self, batch_id: str) -> Batch:
        """Return the batch after asking for its end; what is finished by then is kept."""
        return self.client.cancel_batch(batch_id)

    def download(self, file_id: str | None, place: Place) -> int:
        """Write a file of the server to a place, and return its number of bytes.

        Nobody sees half a file: a local one appears when it is whole, and an object that could
        not be finished is removed.

        Args:
            file_id: None, for a batch that has no such file, writes an empty one.
        """
        num_bytes = 0
        with open_target(place) as target:
            for piece in self.client.download(file_id) if file_id is not None else ():
                target.write(piece)
                num_bytes += len(piece)
        return num_bytes


def read_connection(connection: Connection) -> Server:
    """Return what a connection says about a server.

    Raises:
        ValueError: it does not say where the server is, or says nonsense.
    """
    host = (connection.host or "").strip()
    if not host:
        raise ValueError("it has no host; that is the base URL, such as http://batch.example:8000.")
    if "://" not in host:
        port = f":{connection.port}" if connection.port else ""
        host = f"{connection.schema or 'http'}://{host}{port}"
    # Not extra_dejson: it masks secrets by a call that would block a trigger's event loop.
    extra = json.loads(connection.extra or "{}")
    if not isinstance(extra, dict):
        raise ValueError("its extra is not a JSON object.")  # noqa: TRY004  what is said is wrong
    seconds = {
        name: _parse_seconds(name, extra[name])
        for name in ("timeout_seconds", "patience_seconds")
        if extra.get(name) not in {None, ""}
    }
    return Server(
        url=host,
        api_key=(connection.password or "").strip() or None,
        ca_file=extra.get("ca_file") or None,
        **seconds,
    )


def _parse_seconds(name: str, value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{name} in its extra is not a number of seconds: {value!r}.")
    return seconds


def open_place(place: Place) -> Path | ObjectStoragePath:
    """Return the path that stands for a place."""
    if not isinstance(place, ObjectStoragePath):
        text = os.fspath(place)
        if "://" not in text:
            return Path(text)
        place = ObjectStoragePath(text)
    return Path(place.path) if place.protocol == "file" else place


def make_upload(source: Place | bytes, *, filename: str | None = None) -> Upload:
    """Return the upload of the bytes at a place, or of given ones.

    Raises:
        BatchctlError: there is no such file.
    """
    if isinstance(source, bytes):
        content = source
        return Upload(
            filename=filename or "records.jsonl", num_bytes=len(content), open=lambda: [content]
        )
    path = open_place(source)
    if not path.is_file():
        raise BatchctlError(f"There is no file {path}; the task's worker has to see it.")
    return Upload(
        filename=filename or path.name,
        num_bytes=path.stat().st_size,
        open=lambda: _read_chunks(path),
    )


def _read_chunks(path: Path | ObjectStoragePath) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


@contextmanager
def open_target(place: Place) -> Iterator[IO[bytes]]:
    """Yield a file to write to; it is at its place when the block ends well, else not at all."""
    path = open_place(place)
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename does not cross file systems.
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with scratch.open("wb") as file:
                yield file
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return
    try:
        with path.open("wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise
