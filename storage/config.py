"""What an operator may set about the database and the blobs."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Checksums = Literal["when_required", "when_supported"]


class DatabaseSettings(BaseModel):
    """Where the database is and how patient its clients are.

    The timeouts of connecting, statements and locks are Postgres's, the busy timeout is SQLite's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(default="", repr=False)
    """Empty: SQLite inside the data folder."""
    pool_size: int = Field(default=5, ge=1)
    max_overflow: int = Field(default=10, ge=0)
    pool_timeout_seconds: float = Field(default=30.0, gt=0)
    connect_timeout_seconds: int = Field(default=10, ge=1)
    statement_timeout_seconds: float = Field(default=30.0, gt=0)
    lock_timeout_seconds: float = Field(default=10.0, gt=0)
    idle_in_transaction_timeout_seconds: float = Field(default=60.0, gt=0)
    busy_timeout_seconds: float = Field(default=10.0, gt=0)

    def resolve_url(self, data_folder: Path) -> str:
        """Return the URL to open: the one that was set, or SQLite inside `data_folder`."""
        return self.url or f"sqlite:///{data_folder / 'batchctl.sqlite3'}"


class BlobSettings(BaseModel):
    """Where blobs are kept: a folder, or a bucket of an S3-compatible store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["folder", "s3"] = "folder"
    folder: Path | None = None
    """None: `blobs` inside the data folder."""
    bucket: str | None = None
    prefix: str = ""
    region: str | None = None
    endpoint_url: str | None = None
    path_style: bool | None = None
    """None: path style exactly when `endpoint_url` is set."""
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None
    session_token: SecretStr | None = None
    checksums: Checksums | None = None
    """None: "when_required" exactly when `endpoint_url` is set; older stores break on more."""
    part_bytes: int = Field(default=16 << 20, ge=5 << 20)
    """Blobs up to this size are one PUT, larger ones an upload in parts of this size."""
    max_attempts: int = Field(default=5, ge=1)
    connect_timeout_seconds: float = Field(default=5.0, gt=0)
    read_timeout_seconds: float = Field(default=60.0, gt=0)
