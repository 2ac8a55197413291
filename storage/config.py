"""What an operator may set about the database and the blobs."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Checksums = Literal["when_required", "when_supported"]

PRIVATE = 0o700
"""The mode of folders that are made for data: prompts and answers are nobody else's business."""


class DatabaseSettings(BaseModel):
    """Where the database is and how patient its clients are.

    The pool and the timeouts of statements are Postgres's; SQLite has only
    `busy_timeout_seconds`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(
        default="",
        repr=False,
        description="`postgresql://user:password@host/name`; empty: SQLite inside the data folder",
    )
    pool_size: int = Field(default=5, ge=1, description="connections kept open")
    max_overflow: int = Field(default=10, ge=0, description="further ones while busy")
    pool_timeout_seconds: float = Field(
        default=30.0, gt=0, description="how long to wait for a free one"
    )
    connect_timeout_seconds: int = Field(default=10, ge=1, description="time to connect")
    statement_timeout_seconds: float = Field(
        default=20.0,
        gt=0,
        description="longest statement; a server silent for 5 s longer is given up",
    )
    lock_timeout_seconds: float = Field(default=10.0, gt=0, description="longest wait for a lock")
    idle_in_transaction_timeout_seconds: float = Field(
        default=60.0, gt=0, description="a transaction that does nothing for so long is ended"
    )
    busy_timeout_seconds: float = Field(
        default=10.0, gt=0, description="how long SQLite waits for another writer"
    )

    def resolve_url(self, data_folder: Path) -> str:
        """Return the URL to open: the one that was set, or SQLite inside `data_folder`."""
        return self.url or f"sqlite:///{data_folder / 'batchctl.sqlite3'}"


class BlobSettings(BaseModel):
    """Where blobs are kept: a folder, or a bucket of an S3-compatible store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["folder", "s3"] = Field(default="folder", description="folder or s3")
    folder: Path | None = Field(default=None, description="unset: `blobs` inside the data folder")
    bucket: str | None = Field(default=None, description="bucket of an S3-compatible store")
    prefix: str = Field(default="", description="what every key in the bucket begins with")
    region: str | None = Field(default=None, description="unset: the AWS configuration's")
    endpoint_url: str | None = Field(default=None, description="of a store that is not AWS")
    path_style: bool | None = Field(
        default=None, description="unset: exactly when `endpoint_url` is set"
    )
    access_key: SecretStr | None = Field(
        default=None, description="unset: the AWS credential chain, IAM roles included"
    )
    secret_key: SecretStr | None = Field(default=None, description="belongs to `access_key`")
    session_token: SecretStr | None = Field(default=None, description="of temporary keys")
    checksums: Checksums | None = Field(
        default=None,
        description="when_required or when_supported; unset: when_required exactly when "
        "`endpoint_url` is set, since older stores break on more",
    )
    part_bytes: int = Field(
        default=16 << 20,
        ge=5 << 20,
        description="larger blobs are uploaded in parts of this size",
    )
    max_attempts: int = Field(default=5, ge=1, description="tries of one call")
    connect_timeout_seconds: float = Field(default=5.0, gt=0, description="time to connect")
    read_timeout_seconds: float = Field(default=60.0, gt=0, description="time without a byte")
