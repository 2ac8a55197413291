"""The folder of one local run: DATA/runs/<identity of input and options>/, and how it comes to be.

A run is made in a folder of another name and renamed when it is whole, so that a kill at any
moment leaves either a run that can be resumed or one that never began.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import msgspec
import psutil

from jobs.app import open_app
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import IdentityChanged, StorageError
from jobs.domain.ids import BatchId, mint_batch_id, mint_file_id
from jobs.embedded import FolderLock
from jobs.settings import Settings
from storage import batches, files
from storage.blobs.base import input_key
from storage.files import File

_RECORD = "run.json"
_INCOMING = ".incoming-"
_DEADLINE = timedelta(days=3650)
"""A local run has no deadline that anybody could mean."""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was started with; `options` decide answers, so a resumed run must have the same.

    Attributes:
        sha256: of the request lines as they were planned.
    """

    batch_id: str
    input_name: str
    sha256: str
    options: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What is to be run, before it is known whether it was begun before."""

    input_name: str
    endpoint: str
    model: str | None
    on_unsupported_schema: str
    options: Mapping[str, str]


def hash_pieces(pieces: Iterable[bytes]) -> str:
    """Return the SHA-256 of a stream in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def find(runs: Path, sha256: str, plan: RunPlan) -> Path | None:
    """Return the folder of an earlier run of this input with these options, or None.

    Raises:
        IdentityChanged: there is one of this input, with other options.
    """
    folder = runs / _identity(sha256, plan.options)
    if read_record(folder) is not None:
        return folder
    for other in sorted(runs.glob(f"{sha256[:16]}-*")):
        record = read_record(other)
        if record is None or other.suffix or record.sha256 != sha256:
            continue
        changed = [
            f"{name} (then {record.options.get(name) or 'unset'}, now "
            f"{plan.options.get(name) or 'unset'})"
            for name in sorted({*record.options, *plan.options})
            if record.options.get(name) != plan.options.get(name)
        ]
        raise IdentityChanged(
            f"This input was run before with other options: {', '.join(changed)}. Resume it with "
            "the same options, or leave --resume out to start afresh.",
            param="resume",
        )
    return None


def read_record(folder: Path) -> RunRecord | None:
    """Return what the run in a folder was started with, or None when there is no run in it."""
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=RunRecord)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None


def create(
    runs: Path, settings: Settings, plan: RunPlan, pieces: Iterator[bytes]
) -> tuple[Path, Path | None]:
    """Make a run of the request lines in `pieces`; return its folder.

    An unfinished run that stood there is kept under another name, which is returned too; a
    finished one makes way.

    Raises:
        StorageError: it cannot be written.
        AlreadyLocked: another process is at the run that stands there.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"The data folder {runs.parent} cannot be made: {error.strerror}. Choose another with "
            "--data or BATCHCTL_DATA."
        ) from error
    _remove_leftovers(runs)
    incoming = runs / f"{_INCOMING}{os.getpid()}"
    try:
        sha256 = _fill(incoming, settings, plan, pieces)
        folder = runs / _identity(sha256, plan.options)
        kept = _make_way(folder, settings)
        incoming.rename(folder)
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    return folder, kept


def _fill(incoming: Path, settings: Settings, plan: RunPlan, pieces: Iterator[bytes]) -> str:
    with open_app(settings, folder=incoming) as app:
        file_id = mint_file_id()
        with app.blobs.open_writer(input_key(file_id)) as writer:
            for piece in pieces:
                writer.write(piece)
            info = writer.commit()
        now = app.db.now()
        file = File(
            id=file_id,
            filename=plan.input_name,
            purpose="batch",
            num_bytes=info.num_bytes,
            sha256=info.sha256,
            blob_key=info.key,
            created_at=now,
        )
        files.insert(app.db, file)
        batch = Batch(
            id=mint_batch_id(),
            input_file_id=file_id,
            endpoint=plan.endpoint,
            status=BatchStatus.VALIDATING,
            created_at=now,
            completion_window="24h",
            deadline_at=now + _DEADLINE,
            model_override=plan.model,
            on_unsupported_schema=plan.on_unsupported_schema,
        )
        batches.insert(app.db, batch)
    record = RunRecord(
        batch_id=batch.id,
        input_name=plan.input_name,
        sha256=info.sha256,
        options=dict(plan.options),
    )
    (incoming / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    return info.sha256


def _make_way(folder: Path, settings: Settings) -> Path | None:
    record = read_record(folder)
    if record is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with FolderLock(folder), open_app(settings, folder=folder) as app:
        batch = batches.get(app.db, BatchId(record.batch_id))
    if batch.status.is_terminal:
        shutil.rmtree(folder)
        return None
    kept = folder.with_suffix(".old")
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    return kept


def _remove_leftovers(runs: Path) -> None:
    """Remove what processes that died while they took in their input have left."""
    for folder in runs.glob(f"{_INCOMING}*"):
        number = folder.name.removeprefix(_INCOMING)
        if number.isdigit() and not psutil.pid_exists(int(number)):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)


def _identity(sha256: str, options: Mapping[str, str]) -> str:
    text = msgspec.json.encode(dict(sorted(options.items())))
    return f"{sha256[:16]}-{hashlib.sha256(text).hexdigest()[:8]}"
