from pathlib import Path

import pytest

from jobs.app import open_app
from jobs.settings import Settings
from storage.blobs.local import FolderBlobs
from storage.config import BlobSettings


@pytest.mark.parametrize("shared", [False, True])
def test_leftovers_of_killed_writers_are_freed_where_nobody_else_writes(
    tmp_path: Path, *, shared: bool
) -> None:
    blobs = BlobSettings(folder=tmp_path / "shared") if shared else BlobSettings()
    settings = Settings(data=tmp_path, blobs=blobs)
    with open_app(settings, folder=tmp_path / "server") as app:
        app.blobs.put("whole", b"kept")
        assert isinstance(app.blobs, FolderBlobs)
        place = (tmp_path / "shared") if shared else (tmp_path / "server" / "blobs")
        killed = place / ".tmp" / "upload"
        killed.write_bytes(b"half")
        app.remove_leftovers()
        assert killed.exists() == shared
        assert app.blobs.get("whole") == b"kept"
