"""Plans an input in a scratch folder, to find what is wrong with it."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from typing_extensions import override

from engine.sandbox import Sandbox
from jobs import intake
from jobs.app import App, open_app
from jobs.cli.options import Making
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import StorageError
from jobs.domain.ids import mint_batch_id, mint_file_id, mint_worker_id
from jobs.domain.shard import UnitKind
from jobs.prepare import Source
from jobs.settings import Settings
from storage import batches, files, units
from storage.blobs.base import input_key
from storage.blobs.local import FolderBlobs, FolderReader
from storage.files import File

_LEASE_SECONDS = 7 * 86_400


class _Borrowed(FolderBlobs):
    """A store whose one blob is the person's own file, so that nothing is copied."""

    def __init__(self, folder: Path, path: Path) -> None:
        super().__init__(folder)
        self._borrowed = path

    @override
    def open_reader(self, key: str, *, start: int = 0, length: int | None = None) -> FolderReader:
        file = self._borrowed.open("rb")
        file.seek(start)
        return FolderReader(file, key=key, length=length)


def check_input(
    settings: Settings,
    source: Source,
    making: Making,
    *,
    endpoint: str,
    folder: Path,
    on_progress: Callable[[int], None],
) -> Batch:
    """Return the batch that `source` would become: planned, or failed with all its errors.

    Args:
        folder: an empty one, for the database and whatever has to be written.
    """
    file_id = mint_file_id()
    key = input_key(file_id)
    if source.path is not None and not making.changes_lines:
        blobs: FolderBlobs = _Borrowed(folder / "borrowed", source.path)
    else:
        blobs = FolderBlobs(folder / "made")
        with blobs.open_writer(key) as writer:
            for piece in making.prepare(source, endpoint):
                writer.write(piece)
            writer.commit()
    with open_app(settings, folder=folder, any_model=True) as opened:
        app = replace(opened, blobs=blobs)
        now = app.db.now()
        files.insert(
            app.db,
            File(
                id=file_id,
                filename=source.name,
                purpose="batch",
                num_bytes=0,
                sha256="",
                blob_key=key,
                created_at=now,
            ),
        )
        batch = Batch(
            id=mint_batch_id(),
            input_file_id=file_id,
            endpoint=endpoint,
            status=BatchStatus.VALIDATING,
            created_at=now,
            completion_window="24h",
            deadline_at=now + timedelta(days=1),
            model_override=making.batch_model,
        )
        intake.submit(app.db, app.doorbell, batch)
        _plan(app, on_progress)
        return batches.get(app.db, batch.id)


def _plan(app: App, on_progress: Callable[[int], None]) -> None:
    lease = units.claim(
        app.db,
        worker_id=mint_worker_id(),
        boot_id="validate",
        kinds=(UnitKind.PLAN,),
        model_keys=None,
        lease_seconds=_LEASE_SECONDS,
    )
    if lease is None:
        raise StorageError("The scratch database has no plan unit for the batch just made.")
    limits = app.settings.sandbox
    with closing(
        Sandbox(
            cpu_seconds=limits.cpu_seconds,
            wall_seconds=limits.wall_seconds,
            memory_bytes=limits.memory_bytes,
        )
    ) as checker:
        intake.plan(
            app.db,
            app.blobs,
            lease,
            describe=app.describe,
            checker=checker,
            limits=app.plan_limits(),
            on_progress=on_progress,
        )
