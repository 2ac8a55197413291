import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import botocore.exceptions
import pytest
from botocore.response import StreamingBody
from pydantic import SecretStr

from jobs.domain.errors import BatchctlError, BlobStoreUnavailable, Conflict
from storage.blobs import open_blobs
from storage.blobs.s3 import ERRORS, S3Blobs
from storage.config import BlobSettings
from tests.conftest import free_port, s3_settings


def test_a_wrong_secret_is_refused_and_not_shown(rclone_url: str) -> None:
    settings = s3_settings(rclone_url).model_copy(update={"secret_key": SecretStr("hunter2")})
    with pytest.raises(BlobStoreUnavailable, match="SignatureDoesNotMatch") as caught:
        S3Blobs(settings).get("k")
    assert "hunter2" not in caught.value.message


def test_a_bucket_that_is_not_there_is_named(moto_url: str) -> None:
    settings = s3_settings(moto_url).model_copy(update={"bucket": "no-such-bucket"})
    with pytest.raises(BlobStoreUnavailable, match="no-such-bucket"):
        S3Blobs(settings).put("k", b"x")


def test_a_store_that_is_away_may_be_tried_again() -> None:
    settings = BlobSettings.model_validate(
        {
            "kind": "s3",
            "bucket": "bucket",
            "endpoint_url": f"http://127.0.0.1:{free_port()}",
            "access_key": "a",
            "secret_key": "b",
            "max_attempts": 1,
        }
    )
    with pytest.raises(BlobStoreUnavailable, match="Could not connect") as caught:
        S3Blobs(settings).get("k")
    assert caught.value.retryable


def test_a_bucket_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(BlobStoreUnavailable, match="BATCHCTL_BLOBS__BUCKET"):
        open_blobs(BlobSettings(kind="s3"), tmp_path)


def test_keys_are_under_the_prefix_of_the_settings(moto_url: str) -> None:
    settings = s3_settings(moto_url)
    S3Blobs(settings).put("a/k", b"x")
    whole = S3Blobs(settings.model_copy(update={"prefix": ""}))
    assert list(whole.list_keys()) == ["some/prefix/a/k"]


def test_a_listing_goes_over_pages(moto_url: str) -> None:
    blobs = S3Blobs(s3_settings(moto_url), page_keys=3)
    keys = [f"k/{number:04}" for number in range(10)]
    for key in keys:
        blobs.put(key, b"")
    assert list(blobs.list_keys("k/")) == keys


def test_the_upload_of_a_killed_writer_is_found_and_ended(moto_url: str) -> None:
    blobs = S3Blobs(s3_settings(moto_url))
    for key in ("files/k", "theirs/k"):  # and then its process died
        blobs.open_writer(key).write(b"x" * (6 << 20))
    later = datetime.now(UTC) + timedelta(hours=1)
    assert blobs.abort_uploads(before=datetime(2000, 1, 1, tzinfo=UTC)) == 0
    assert blobs.abort_uploads(before=later, dry_run=True) == 1
    assert blobs.abort_uploads(before=later) == 1
    assert blobs.abort_uploads(before=later) == 0


def test_a_broken_connection_is_opened_again_where_it_broke(moto_url: str) -> None:
    blobs = S3Blobs(s3_settings(moto_url))
    data = bytes(range(256)) * 40
    blobs.put("k", data)
    with blobs.open_reader("k", start=10, length=5000) as reader:
        first = reader.read(1000)
        # Declared longer than it is: what a connection cut in the middle looks like.
        reader._body = StreamingBody(io.BytesIO(b""), 4000)  # noqa: SLF001 - nothing else breaks a connection
        rest = b"".join(iter(lambda: reader.read(700), b""))
    assert first + rest == data[10:5010]


def test_an_object_that_changed_while_it_is_read_is_noticed(moto_url: str) -> None:
    blobs = S3Blobs(s3_settings(moto_url))
    blobs.put("k", b"one" * 100)
    with blobs.open_reader("k") as reader:
        reader.read(10)
        blobs.put("k", b"two" * 100)
        reader._body = StreamingBody(io.BytesIO(b""), 290)  # noqa: SLF001 - nothing else breaks a connection
        with pytest.raises(Conflict):
            reader.read(10)


def test_checksums_and_addresses_follow_the_endpoint() -> None:
    given = {"kind": "s3", "bucket": "bucket", "access_key": "a", "secret_key": "b"}
    own = S3Blobs(BlobSettings.model_validate(given | {"endpoint_url": "http://127.0.0.1:9"}))
    aws = S3Blobs(BlobSettings.model_validate(given | {"region": "eu-central-1"}))
    ours, theirs = own.client.meta, aws.client.meta
    expected = ((ours, "when_required", "path"), (theirs, "when_supported", "auto"))
    for meta, checksums, style in expected:
        options = vars(meta.config)["_user_provided_options"]
        assert options["request_checksum_calculation"] == checksums
        assert options["s3"] == {"addressing_style": style}
    assert (ours.region_name, theirs.region_name) == ("us-east-1", "eu-central-1")


def test_every_exception_of_botocore_has_one_of_ours() -> None:
    kinds = [
        kind
        for kind in vars(botocore.exceptions).values()
        if isinstance(kind, type) and issubclass(kind, botocore.exceptions.BotoCoreError)
    ]
    for kind in kinds:
        ours = next(ours for foreign, ours in ERRORS if issubclass(kind, foreign))
        assert issubclass(ours, BatchctlError)
