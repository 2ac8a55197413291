"""Blobs as files of one folder: written aside, synced, renamed into place, the folder synced."""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from jobs.domain.errors import BlobMissing, BlobStoreUnavailable, Conflict, StorageError
from storage.blobs.base import BlobInfo, BlobStat, check_key, hash_bytes
from storage.config import PRIVATE

_TEMPORARY = ".tmp"

# What the operator has to do, by what the operating system says; any other is a plain failure.
ERRORS: dict[int, str] = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file system allows no file that large",
    errno.EACCES: "this user may not write or read there; change the owner or the mode",
    errno.EPERM: "this user may not write or read there; change the owner or the mode",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOTDIR: "a file is where a folder must be",
    errno.EEXIST: "a file is where a folder must be",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system lost the folder; mount it again",
}


class FolderBlobs:
    """A blob store in a folder that it has for itself."""

    def __init__(self, folder: Path) -> None:
        with _translated(str(folder)):
            folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            self._root = folder.resolve(strict=True)
            self._temporary = self._root / _TEMPORARY
            self._temporary.mkdir(mode=PRIVATE, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Nothing is held open between calls."""

    def open_writer(self, key: str) -> "FolderWriter":
        """Return a writer of a file next to the others, renamed into place by its commit."""
        return FolderWriter(self._path(key), key=key, temporary=self._new_temporary())

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> BlobInfo:
        """Write a small blob."""
        path = self._path(key)
        info = BlobInfo(key=key, num_bytes=len(data), sha256=hash_bytes(data))
        if if_absent and self.exists(key):
            return self._require_same(info)
        temporary = self._new_temporary()
        with _translated(key):
            try:
                with temporary.open("xb", buffering=0) as file:
                    _write_all(file, data)
                    os.fsync(file.fileno())
                _make_parents(path, self._root)
                if if_absent:
                    # Unlike a rename, a link fails where another writer was first.
                    try:
                        path.hardlink_to(temporary)
                    except FileExistsError:
                        return self._require_same(info)
                    finally:
                        temporary.unlink()
                else:
                    temporary.replace(path)
                _sync_folder(path.parent)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        return info

    def _require_same(self, info: BlobInfo) -> BlobInfo:
        if hash_bytes(self.get(info.key)) != info.sha256:
            raise Conflict(f"Blob {info.key} is there already with other bytes.")
        return info

    def get(self, key: str) -> bytes:
        """Return all of a small blob."""
        path = self._path(key)
        with _translated(key):
            return path.read_bytes()

    def open_reader(self, key: str, *, start: int = 0, length: int | None = None) -> "FolderReader":
        """Return a reader of the bytes from `start`."""
        path = self._path(key)
        with _translated(key):
            file = path.open("rb", buffering=0)
            file.seek(start)
        return FolderReader(file, key=key, length=length)

    def get_size(self, key: str) -> int:
        """Return the number of bytes."""
        path = self._path(key)
        with _translated(key):
            return path.stat().st_size

    def exists(self, key: str) -> bool:
        """Return whether there is a blob under `key`."""
        path = self._path(key)
        with _translated(key):
            return path.is_file()

    def delete(self, key: str) -> None:
        """Remove a blob, if it is there."""
        path = self._path(key)
        with _translated(key), suppress(FileNotFoundError):
            path.unlink()

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that begin with `prefix`, in order."""
        folder = prefix.rpartition("/")[0]
        top = self._path(folder) if folder else self._root
        keys: list[str] = []
        with _translated(prefix):
            for parent, folders, names in os.walk(top):
                if Path(parent) == self._root and _TEMPORARY in folders:
                    folders.remove(_TEMPORARY)
                keys += (str(Path(parent, name).relative_to(self._root)) for name in names)
        return iter(sorted(key for key in keys if key.startswith(prefix)))

    def list_blobs(self, prefix: str = "", *, after: str = "") -> Iterator[BlobStat]:
        """Yield the blobs whose keys begin with `prefix` and come behind `after`, in order."""
        for key in self.list_keys(prefix):
            if key <= after:
                continue
            with _translated(key), suppress(FileNotFoundError):  # deleted since it was listed
                found = (self._root / key).stat()
                yield BlobStat(
                    key=key, num_bytes=found.st_size, modified_at=_instant(found.st_mtime)
                )

    def abort_uploads(self, *, before: datetime, dry_run: bool = False) -> int:
        """Return how many files of killed writers, last written to before then, are removed."""
        aborted = 0
        with _translated(_TEMPORARY):
            for path in self._temporary.iterdir():
                with suppress(FileNotFoundError):
                    if _instant(path.stat().st_mtime) < before:
                        aborted += 1
                        if not dry_run:
                            path.unlink()
        return aborted

    def remove_leftovers(self) -> None:
        """Remove what writers that were killed left; only while no other process writes here."""
        with _translated(_TEMPORARY):
            for path in self._temporary.iterdir():
                path.unlink(missing_ok=True)

    def _new_temporary(self) -> Path:
        return self._temporary / secrets.token_hex(12)

    def _path(self, key: str) -> Path:
        """Return the path of `key`, which is inside the folder even through symbolic links."""
        path = self._root / check_key(key)
        parent = os.path.realpath(path.parent)
        root = str(self._root)
        if (parent != root and not parent.startswith(root + os.sep)) or path.is_symlink():
            raise ValueError(f"{key!r} leads out of the blob folder")
        return path


class FolderWriter:
    """Writes one file aside; `commit` renames it into place."""

    def __init__(self, path: Path, *, key: str, temporary: Path) -> None:
        self._path = path
        self._key = key
        self._temporary = temporary
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        with _translated(key):
            self._file: BinaryIO = temporary.open("xb", buffering=1 << 20)
        self._committed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        if not self._committed:
            # Closing flushes, which a full disk refuses; the file goes in any case.
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._temporary.unlink()

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        with _translated(self._key):
            self._file.write(data)
        self._hash.update(data)
        self._num_bytes += len(data)

    def commit(self) -> BlobInfo:
        """Make the blob visible under its key."""
        with _translated(self._key):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            _make_parents(self._path, self._temporary.parent.parent)
            self._temporary.replace(self._path)
            self._committed = True
            _sync_folder(self._path.parent)
        return BlobInfo(key=self._key, num_bytes=self._num_bytes, sha256=self._hash.hexdigest())


class FolderReader:
    """Reads a part of a file."""

    def __init__(self, file: BinaryIO, *, key: str, length: int | None) -> None:
        self._file = file
        self._key = key
        self._left = length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self._file.close()

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, or the rest; nothing only at the end."""
        if self._left is not None:
            size = self._left if size < 0 else min(size, self._left)
        with _translated(self._key):
            found = self._file.read(size)
        if self._left is not None:
            self._left -= len(found)
        return found


def _instant(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _make_parents(path: Path, root: Path) -> None:
    """Create the folders above `path`, each synced so that a power cut does not lose it."""
    if path.parent.is_dir():
        return
    missing = []
    folder = path.parent
    while folder != root and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Raise what the operating system raises as our own errors."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BlobMissing(f"There is no blob {key}.") from error
    except OSError as error:
        advice = ERRORS.get(error.errno or 0)
        if advice is None:
            raise StorageError(f"Blob {key}: {error.strerror}.") from error
        raise BlobStoreUnavailable(f"Blob {key}: {advice}.") from error
