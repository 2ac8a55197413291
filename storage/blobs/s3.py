"""Blobs as objects of a bucket: AWS, or any store that speaks its protocol."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import boto3
import botocore.client
import botocore.config
import botocore.exceptions
import urllib3.exceptions

from jobs.domain.errors import (
    BatchctlError,
    BlobCorrupt,
    BlobMissing,
    BlobStoreUnavailable,
    Conflict,
    StorageError,
)
from storage.blobs.base import ROOTS, BlobInfo, BlobStat, check_key, hash_bytes
from storage.config import BlobSettings

_NUM_PARTS_OF_A_SIZE = 1_000
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_NUM_REOPENS = 5


class _PastTheEnd(StorageError):
    """A range begins where the object ends."""


class _NoSuchUpload(StorageError):
    """An upload in parts has ended meanwhile, or the bucket never had one."""


# By the store's error code; any other is BlobStoreUnavailable from 500 up and StorageError below.
CODES: dict[str, type[BatchctlError]] = {
    "404": BlobMissing,
    "NoSuchKey": BlobMissing,
    "NotFound": BlobMissing,
    "412": Conflict,
    "PreconditionFailed": Conflict,
    "ConditionalRequestConflict": Conflict,
    "NoSuchUpload": _NoSuchUpload,
    "416": _PastTheEnd,
    "InvalidRange": _PastTheEnd,
    "BadDigest": BlobCorrupt,
    "XAmzContentChecksumMismatch": BlobCorrupt,
    "403": BlobStoreUnavailable,
    "AccessDenied": BlobStoreUnavailable,
    "ExpiredToken": BlobStoreUnavailable,
    "InvalidAccessKeyId": BlobStoreUnavailable,
    "InvalidToken": BlobStoreUnavailable,
    "NoSuchBucket": BlobStoreUnavailable,
    "PermanentRedirect": BlobStoreUnavailable,
    "RequestTimeTooSkewed": BlobStoreUnavailable,
    "RequestTimeout": BlobStoreUnavailable,
    "SignatureDoesNotMatch": BlobStoreUnavailable,
    "SlowDown": BlobStoreUnavailable,
    "Throttling": BlobStoreUnavailable,
}

# By the library's exception; the first entry that matches wins.
ERRORS: tuple[tuple[type[Exception], type[BatchctlError]], ...] = (
    (botocore.exceptions.FlexibleChecksumError, BlobCorrupt),
    (botocore.exceptions.IncompleteReadError, BlobStoreUnavailable),
    (botocore.exceptions.HTTPClientError, BlobStoreUnavailable),
    (botocore.exceptions.ConnectionError, BlobStoreUnavailable),
    (botocore.exceptions.NoCredentialsError, BlobStoreUnavailable),
    (botocore.exceptions.PartialCredentialsError, BlobStoreUnavailable),
    (botocore.exceptions.CredentialRetrievalError, BlobStoreUnavailable),
    (botocore.exceptions.BotoCoreError, StorageError),
    (urllib3.exceptions.HTTPError, BlobStoreUnavailable),
    (OSError, BlobStoreUnavailable),
)


class _Bucket:
    """One bucket and prefix: sends requests and says in our words what went wrong."""

    def __init__(self, settings: BlobSettings) -> None:
        if not settings.bucket:
            raise BlobStoreUnavailable("Blobs in S3 need a bucket; set BATCHCTL_BLOBS__BUCKET.")
        self.name = settings.bucket
        prefix = settings.prefix.strip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self._settings = settings
        self._lock = threading.Lock()
        self._client: botocore.client.BaseClient | None = None

    @property
    def client(self) -> botocore.client.BaseClient:
        """The client, made when it is first used: after a fork, not before."""
        with self._lock:
            if self._client is None:
                with self.translated(""):
                    self._client = _make_client(self._settings)
            return self._client

    def close(self) -> None:
        """End the connections; a later request makes new ones."""
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None

    def request(self, operation: str, key: str, **arguments: object) -> dict[str, Any]:
        """Return the answer to one request about the object of `key`."""
        name = self.prefix + check_key(key)
        with self.translated(key):
            send = getattr(self.client, operation)
            answer: dict[str, Any] = send(Bucket=self.name, Key=name, **arguments)
            return answer

    @contextmanager
    def translated(self, key: str) -> Iterator[None]:
        """Raise what the library raises as our own errors."""
        where = f"Blob {key} in bucket {self.name}" if key else f"Bucket {self.name}"
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            ours = CODES.get(code)
            if ours is None:
                passing = status >= _SERVER_ERROR or status == _TOO_MANY_REQUESTS
                ours = BlobStoreUnavailable if passing else StorageError
            if ours is BlobMissing:
                raise BlobMissing(f"There is no blob {key}.") from error
            raise ours(f"{where}: the store answered {code} ({status}).") from error
        except tuple(foreign for foreign, _ in ERRORS) as error:
            ours = next(ours for foreign, ours in ERRORS if isinstance(error, foreign))
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ours(f"{where}: {detail}") from error


def _make_client(settings: BlobSettings) -> botocore.client.BaseClient:
    own = settings.endpoint_url is not None
    checksums = settings.checksums or ("when_required" if own else "when_supported")
    path_style = own if settings.path_style is None else settings.path_style
    secrets = {
        "aws_access_key_id": settings.access_key,
        "aws_secret_access_key": settings.secret_key,
        "aws_session_token": settings.session_token,
    }
    given: dict[str, Any] = {
        name: secret.get_secret_value() for name, secret in secrets.items() if secret
    }
    # A session of its own: the default one is not safe to share between threads.
    session = boto3.session.Session(
        region_name=settings.region or ("us-east-1" if own else None), **given
    )
    client: botocore.client.BaseClient = session.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        config=botocore.config.Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if path_style else "auto"},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            # Their `max_attempts` would leave the first try out.
            retries={"mode": "standard", "total_max_attempts": settings.max_attempts},
            connect_timeout=settings.connect_timeout_seconds,
            read_timeout=settings.read_timeout_seconds,
            tcp_keepalive=True,
            max_pool_connections=32,
        ),
    )
    return client


class S3Blobs:
    """A blob store in a bucket, under a prefix."""

    def __init__(self, settings: BlobSettings, *, page_keys: int = 1000) -> None:
        self._bucket = _Bucket(settings)
        self._part_bytes = settings.part_bytes
        self._page = {"PageSize": page_keys}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self._bucket.close()

    @property
    def client(self) -> botocore.client.BaseClient:
        """The library's client, as the settings made it."""
        return self._bucket.client

    def open_writer(self, key: str) -> "S3Writer":
        """Return a writer that sends one object, in parts when it is large."""
        return S3Writer(self._bucket, key=check_key(key), part_bytes=self._part_bytes)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> BlobInfo:
        """Write a small blob with one request.

        Some stores ignore `if_absent` and overwrite.
        """
        info = BlobInfo(key=key, num_bytes=len(data), sha256=hash_bytes(data))
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        try:
            self._bucket.request("put_object", key, Body=data, **condition)
        except Conflict:
            if hash_bytes(self.get(key)) != info.sha256:
                raise
        return info

    def get(self, key: str) -> bytes:
        """Return all of a small blob."""
        with self.open_reader(key) as reader:
            return reader.read()

    def open_reader(self, key: str, *, start: int = 0, length: int | None = None) -> "S3Reader":
        """Return a reader of the bytes from `start`; it asks again where a connection broke."""
        return S3Reader(self._bucket, key=key, start=start, length=length)

    def get_size(self, key: str) -> int:
        """Return the number of bytes."""
        return int(self._bucket.request("head_object", key)["ContentLength"])

    def exists(self, key: str) -> bool:
        """Return whether there is a blob under `key`."""
        try:
            self.get_size(key)
        except BlobMissing:
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove a blob, if it is there."""
        with suppress(BlobMissing):
            self._bucket.request("delete_object", key)

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that begin with `prefix`, in order, a page at a time."""
        for found in self.list_blobs(prefix):
            yield found.key

    def list_blobs(self, prefix: str = "", *, after: str = "") -> Iterator[BlobStat]:
        """Yield the blobs whose keys begin with `prefix` and come behind `after`, in order."""
        bucket = self._bucket
        behind = {"StartAfter": bucket.prefix + after} if after else {}
        with bucket.translated(prefix):
            pages = bucket.client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket.name,
                Prefix=bucket.prefix + prefix,
                PaginationConfig=self._page,
                **behind,
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(bucket.prefix)
                    if key > after:  # some stores do not know StartAfter
                        yield BlobStat(
                            key=key, num_bytes=found["Size"], modified_at=found["LastModified"]
                        )

    def abort_uploads(self, *, before: datetime, dry_run: bool = False) -> int:
        """Return how many uploads in parts were begun before then and ended now, unfinished."""
        bucket = self._bucket
        aborted = 0
        # Some stores answer so where there has never been one.
        with suppress(_NoSuchUpload), bucket.translated(""):
            pages = bucket.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=bucket.name, Prefix=bucket.prefix
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    key = upload["Key"].removeprefix(bucket.prefix)
                    if upload["Initiated"] >= before or not key.startswith(ROOTS):
                        continue
                    aborted += 1
                    if not dry_run:
                        upload_id = upload["UploadId"]
                        with suppress(_NoSuchUpload):
                            bucket.request("abort_multipart_upload", key, UploadId=upload_id)
        return aborted


class S3Writer:
    """Writes one object: with one request up to a part's size, in parts beyond."""

    def __init__(self, bucket: _Bucket, *, key: str, part_bytes: int) -> None:
        self._bucket = bucket
        self._key = key
        self._part_bytes = part_bytes
        self._held = bytearray()
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        self._upload_id: str | None = None
        self._etags: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self._held = bytearray()
        if self._upload_id is not None:
            # What a store that is away keeps is found by `abort_uploads`.
            with suppress(BatchctlError):
                self._bucket.request("abort_multipart_upload", self._key, UploadId=self._upload_id)

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._hash.update(data)
        self._num_bytes += len(data)
        self._held += data
        while len(self._held) > self._part_bytes:
            part = bytes(memoryview(self._held)[: self._part_bytes])
            del self._held[: self._part_bytes]
            self._send_part(part)

    def commit(self) -> BlobInfo:
        """Make the object visible."""
        rest = bytes(self._held)
        if self._upload_id is None:
            self._bucket.request("put_object", self._key, Body=rest)
        else:
            self._send_part(rest)
            parts = [
                {"ETag": etag, "PartNumber": number} for number, etag in enumerate(self._etags, 1)
            ]
            self._bucket.request(
                "complete_multipart_upload",
                self._key,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},
            )
            self._upload_id = None
        self._held = bytearray()
        return BlobInfo(key=self._key, num_bytes=self._num_bytes, sha256=self._hash.hexdigest())

    def _send_part(self, part: bytes) -> None:
        if self._upload_id is None:
            answer = self._bucket.request("create_multipart_upload", self._key)
            self._upload_id = answer["UploadId"]
        answer = self._bucket.request(
            "upload_part",
            self._key,
            UploadId=self._upload_id,
            PartNumber=len(self._etags) + 1,
            Body=part,
        )
        self._etags.append(answer["ETag"])
        if len(self._etags) % _NUM_PARTS_OF_A_SIZE == 0:
            # An object has at most 10,000 parts: let them grow with it.
            self._part_bytes *= 2


class S3Reader:
    """Reads a range of one object; a broken connection is opened again where it broke."""

    def __init__(self, bucket: _Bucket, *, key: str, start: int, length: int | None) -> None:
        self._bucket = bucket
        self._key = key
        self._at = start
        self._end = None if length is None else start + length
        self._body: Any = None
        self._etag: str | None = None
        self._ended = length == 0
        if self._ended:
            bucket.request("head_object", key)
        else:
            self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self._close()

    def _open(self) -> None:
        """Ask for the bytes from here on."""
        wanted = {}
        if self._at or self._end is not None:
            last = "" if self._end is None else self._end - 1
            wanted["Range"] = f"bytes={self._at}-{last}"
        if self._etag is not None:
            wanted["IfMatch"] = self._etag
        try:
            answer = self._bucket.request("get_object", self._key, **wanted)
        except _PastTheEnd:
            self._ended = True
            return
        self._body = answer["Body"]
        self._etag = answer["ETag"]

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, or the rest; nothing only at the end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        if self._end is not None and self._at >= self._end:
            self._ended = True  # asking for nothing more is no range, and brings all of it
        for attempt in range(_NUM_REOPENS + 1):
            if self._ended or not size:
                return b""
            try:
                with self._bucket.translated(self._key):
                    if self._body is None:
                        self._open()
                    found: bytes = b"" if self._body is None else self._body.read(size)
            except BlobStoreUnavailable:
                self._close()
                if attempt == _NUM_REOPENS:
                    raise
            else:
                self._at += len(found)
                self._ended = not found
                return found
        raise AssertionError  # the last attempt returned or raised

    def _close(self) -> None:
        if self._body is not None:
            with suppress(BatchctlError), self._bucket.translated(self._key):
                self._body.close()
            self._body = None
