import errno
import os
from pathlib import Path

import pytest

from jobs.domain.errors import BlobStoreUnavailable, StorageError
from storage.blobs import local, open_blobs
from storage.blobs.local import FolderBlobs
from storage.config import BlobSettings


def test_a_key_does_not_lead_out_through_a_symbolic_link(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    (tmp_path / "secret").write_text("s")
    (tmp_path / "blobs" / "out").symlink_to(tmp_path)
    (tmp_path / "blobs" / "direct").symlink_to(tmp_path / "secret")
    for key in ("out/secret", "direct"):
        with pytest.raises(ValueError, match="leads out"):
            blobs.get(key)
        with pytest.raises(ValueError, match="leads out"):
            blobs.put(key, b"x")
    assert (tmp_path / "secret").read_text() == "s"


def test_a_full_disk_is_said_to_be_full_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = FolderBlobs(tmp_path)

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BlobStoreUnavailable, match="the disk is full"):
        blobs.put("a/k", b"x")
    with blobs.open_writer("a/k") as writer:
        writer.write(b"x")
        with pytest.raises(BlobStoreUnavailable, match="the disk is full"):
            writer.commit()
    monkeypatch.undo()
    assert list(tmp_path.joinpath(".tmp").iterdir()) == []
    assert list(blobs.list_keys()) == []


@pytest.mark.parametrize("number", sorted(local.ERRORS))
def test_what_an_operator_can_mend_is_said_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    blobs = FolderBlobs(tmp_path)

    def refuse(_path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BlobStoreUnavailable, match="Blob k: ") as caught:
        blobs.get("k")
    assert caught.value.retryable


def test_any_other_failure_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> bytes:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError) as caught:
        FolderBlobs(tmp_path).get("k")
    assert not caught.value.retryable


def test_a_file_in_the_place_of_the_folder_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("")
    with pytest.raises(BlobStoreUnavailable, match="a file is where a folder must be"):
        open_blobs(BlobSettings(), tmp_path)


def test_leftovers_of_killed_writers_are_removed_and_never_listed(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    blobs.put("k", b"x")
    (tmp_path / ".tmp" / "left").write_text("x")
    assert list(blobs.list_keys()) == ["k"]
    blobs.remove_leftovers()
    assert list(tmp_path.joinpath(".tmp").iterdir()) == []
    assert blobs.get("k") == b"x"
