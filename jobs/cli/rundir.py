"""The folder of one local run: DATA/runs/<identity of input and options>/, and how it comes to be.

A run is made in a folder of another name and renamed when it is whole, so that a kill at any
moment leaves either a run that can be resumed or one that never began. Unfinished runs that made
way for a new one stand beside it as <identity>.old-1, .old-2, ...
"""

import contextlib
import errno
import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import msgspec

from jobs.app import open_app
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import AlreadyLocked, IdentityChanged, StorageError
from jobs.domain.ids import BatchId, mint_batch_id, mint_file_id
from jobs.embedded import FolderLock
from jobs.settings import Settings
from storage import batches, files
from storage.blobs.base import input_key
from storage.config import PRIVATE
from storage.files import File

_RECORD = "run.json"
_INCOMING = ".incoming-"
_KEPT = ".old-"
_MAX_TOLD = 5
"""Changed options in one message."""
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
    reuse: bool = False


def hash_pieces(pieces: Iterable[bytes]) -> str:
    """Return the SHA-256 of a stream in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class Held(NamedTuple):
    """A run that this process works on until the lock is given back, and what to say of it."""

    folder: Path
    lock: FolderLock
    told: str | None


def find(runs: Path, settings: Settings, sha256: str, plan: RunPlan) -> Held | None:
    """Return the earlier run of this input with these options that has most requests done, or None.

    One that was kept under another name is moved back; the one that stands there makes way.

    Raises:
        IdentityChanged: there is one of this input, with other options.
        AlreadyLocked: another process is at one of them.
    """
    folder = runs / _identity(sha256, plan.options)
    places = [place for place in (folder, *_kept_of(folder)) if read_record(place) is not None]
    if not places:
        _check_options(runs, sha256, plan)
        return None
    best = max(places, key=lambda place: _num_done(place, settings))  # of equal ones the first
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(FolderLock(best))
        told = None
        if best != folder:
            kept = _make_way(folder, settings)
            _move(best, folder)
            told = f"Going on with the run that was kept as {best.name}: it has most requests done"
            told += f". The later one is kept in {kept}." if kept is not None else "."
        stack.pop_all()
    return Held(folder, lock, told)


def _check_options(runs: Path, sha256: str, plan: RunPlan) -> None:
    for other in sorted(runs.glob(f"{sha256[:16]}-*")):
        record = read_record(other)
        if record is None or other.suffix or record.sha256 != sha256:
            continue
        then, now = record.options, plan.options
        changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        # Settings of a model follow from its name and engine, so these are told first.
        chosen = [name for name in changed if "." not in name] or changed
        told = [
            f"{name} (then {then.get(name) or 'unset'}, now {now.get(name) or 'unset'})"
            for name in chosen[:_MAX_TOLD]
        ]
        if len(chosen) > _MAX_TOLD:
            told.append(f"and {len(chosen) - _MAX_TOLD} more")
        raise IdentityChanged(
            f"This input was run before with other options or settings: {', '.join(told)}. "
            "Resume it with the same ones, or leave --resume out to start afresh.",
            param="resume",
        )


def read_record(folder: Path) -> RunRecord | None:
    """Return what the run in a folder was started with, or None when there is no run in it."""
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=RunRecord)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None


def create(runs: Path, settings: Settings, plan: RunPlan, pieces: Iterator[bytes]) -> Held:
    """Make a run of the request lines in `pieces`.

    An unfinished run that stood there is kept under another name if any request of it is done;
    any other makes way.

    Raises:
        StorageError: it cannot be written.
        AlreadyLocked: another process is at the run that stands there, or has just begun it.
    """
    try:
        runs.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"The data folder {runs.parent} cannot be made: {error.strerror}. Choose another with "
            "--data or BATCHCTL_DATA."
        ) from error
    _remove_leftovers(runs)
    incoming, lock = _open_incoming(runs)
    with contextlib.ExitStack() as stack:
        stack.push(lock)
        stack.callback(shutil.rmtree, incoming, ignore_errors=True)
        sha256 = _fill(incoming, settings, plan, pieces)
        folder = runs / _identity(sha256, plan.options)
        kept = _make_way(folder, settings)
        _move(incoming, folder)
        stack.pop_all()
    told = None
    if kept is not None:
        told = (
            f"An unfinished run of this input is kept in {kept}; --resume goes on with the one "
            "that has most requests done."
        )
    return Held(folder, lock, told)


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
            reuse=plan.reuse,
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


def _open_incoming(runs: Path) -> tuple[Path, FolderLock]:
    """Return a new folder, with its lock by which it is told from a leftover."""
    while True:
        try:
            incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=runs))
            return incoming, FolderLock(incoming)
        except AlreadyLocked:
            continue  # somebody who removes leftovers saw it before it had its lock
        except OSError as error:
            raise StorageError(
                f"No folder can be made in {runs}: {error.strerror}. Choose another data folder "
                "with --data or BATCHCTL_DATA."
            ) from error


def _make_way(folder: Path, settings: Settings) -> Path | None:
    """Free the name `folder`; return where what stood there is kept, if it is worth keeping."""
    if not folder.exists():
        return None
    with FolderLock(folder):
        if read_record(folder) is not None:
            batch = _read_batch(folder, settings)
            if _done(batch) and not batch.status.is_terminal:
                number = 1 + max((_number_of(one) for one in _kept_of(folder)), default=0)
                kept = folder.with_suffix(f"{_KEPT}{number}")
                _move(folder, kept)
                return kept
        # Gone at once for whoever looks; a kill now leaves what the next run removes.
        gone = folder.with_name(f"{_INCOMING}{secrets.token_hex(8)}")
        _move(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
    return None


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)  # onto an empty folder at most
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise AlreadyLocked(
                f"Another batchctl has just begun the same run in {target}; wait for it or end "
                "it, then go on with --resume."
            ) from error
        raise StorageError(f"{source} cannot be moved to {target}: {error.strerror}.") from error


def _kept_of(folder: Path) -> list[Path]:
    """Return the runs that made way for others at `folder`, the latest first."""
    return sorted(folder.parent.glob(f"{folder.name}{_KEPT}*"), key=_number_of, reverse=True)


def _number_of(kept: Path) -> int:
    number = kept.suffix.removeprefix(_KEPT)
    return int(number) if number.isdecimal() else 0


def _num_done(folder: Path, settings: Settings) -> int:
    with FolderLock(folder):
        return _done(_read_batch(folder, settings))


def _done(batch: Batch) -> int:
    return batch.request_counts.completed + batch.request_counts.failed


def _read_batch(folder: Path, settings: Settings) -> Batch:
    record = read_record(folder)
    if record is None:
        raise StorageError(f"{folder} is no run.")
    with open_app(settings, folder=folder) as app:
        return batches.get(app.db, BatchId(record.batch_id))


def _remove_leftovers(runs: Path) -> None:
    """Remove what processes that died while they took in their input have left."""
    for folder in runs.glob(f"{_INCOMING}*"):
        with contextlib.suppress(AlreadyLocked, OSError), FolderLock(folder):
            shutil.rmtree(folder)


def _identity(sha256: str, options: Mapping[str, str]) -> str:
    text = msgspec.json.encode(dict(sorted(options.items())))
    return f"{sha256[:16]}-{hashlib.sha256(text).hexdigest()[:8]}"
