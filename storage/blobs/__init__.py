"""Large bytes under keys: in a folder, or in a bucket of an S3-compatible store."""

from pathlib import Path

from jobs.domain.errors import BlobStoreUnavailable
from storage.blobs.base import BlobStore
from storage.blobs.local import FolderBlobs
from storage.config import BlobSettings


def open_blobs(settings: BlobSettings, data_folder: Path) -> BlobStore:
    """Return the store that the settings name; without any, `blobs` inside the data folder.

    Raises:
        BlobStoreUnavailable: it cannot be used as the settings say.
    """
    if settings.kind == "folder":
        return FolderBlobs(settings.folder or data_folder / "blobs")
    try:
        from storage.blobs.s3 import S3Blobs  # noqa: PLC0415 - boto3 is an extra, and slow to import
    except ImportError as error:
        raise BlobStoreUnavailable(
            "Blobs in S3 need more packages: pip install 'batchctl[server]'."
        ) from error
    return S3Blobs(settings)
