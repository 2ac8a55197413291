from datetime import UTC, datetime, timedelta

import pytest

from jobs.domain.errors import BlobMissing, Conflict
from storage.blobs.base import BlobStore, hash_bytes


def test_a_small_blob_is_read_as_it_was_put(blobs: BlobStore) -> None:
    info = blobs.put("a/b/c", b"hello")
    assert (info.key, info.num_bytes, info.sha256) == ("a/b/c", 5, hash_bytes(b"hello"))
    assert blobs.get("a/b/c") == b"hello"
    assert blobs.get_size("a/b/c") == 5
    assert blobs.exists("a/b/c")


def test_an_empty_blob_is_a_blob(blobs: BlobStore) -> None:
    blobs.put("empty", b"")
    assert blobs.get("empty") == b""
    assert blobs.get_size("empty") == 0
    with blobs.open_reader("empty", start=0, length=10) as reader:
        assert reader.read() == b""


def test_a_put_replaces(blobs: BlobStore) -> None:
    blobs.put("k", b"one")
    blobs.put("k", b"two!")
    assert blobs.get("k") == b"two!"


def test_putting_the_same_bytes_if_absent_twice_is_a_success(blobs: BlobStore) -> None:
    first = blobs.put("k", b"one", if_absent=True)
    assert blobs.put("k", b"one", if_absent=True) == first


def test_a_blob_that_is_there_is_not_replaced_if_absent_was_asked_for(
    blobs: BlobStore, request: pytest.FixtureRequest
) -> None:
    if "rclone" in request.node.name:
        pytest.skip("rclone ignores If-None-Match")
    blobs.put("k", b"one")
    with pytest.raises(Conflict):
        blobs.put("k", b"two", if_absent=True)
    assert blobs.get("k") == b"one"


def test_a_writer_commits_a_large_blob_whole(blobs: BlobStore) -> None:
    piece = bytes(range(256)) * 4096  # 1 MiB
    with blobs.open_writer("big") as writer:
        for _ in range(11):
            writer.write(piece)
        writer.write(memoryview(b"tail"))
        assert not blobs.exists("big")
        info = writer.commit()
    data = piece * 11 + b"tail"
    assert (info.num_bytes, info.sha256) == (len(data), hash_bytes(data))
    assert blobs.get_size("big") == len(data)
    with blobs.open_reader("big", start=len(piece) * 5 - 3, length=10) as reader:
        assert reader.read() == data[len(piece) * 5 - 3 :][:10]
    assert hash_bytes(blobs.get("big")) == info.sha256


@pytest.mark.parametrize("num_bytes", [0, 3, 11 << 20])
def test_leaving_a_writer_without_commit_leaves_nothing(blobs: BlobStore, num_bytes: int) -> None:
    with blobs.open_writer("k") as writer:
        writer.write(b"x" * num_bytes)

    def fail() -> None:
        with blobs.open_writer("k") as writer:
            writer.write(b"x" * num_bytes)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not blobs.exists("k")
    assert list(blobs.list_keys()) == []


def test_a_writer_that_wrote_nothing_commits_an_empty_blob(blobs: BlobStore) -> None:
    with blobs.open_writer("k") as writer:
        writer.commit()
    assert blobs.get("k") == b""


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (8, 99, b"89"),
        (0, 0, b""),
        (5, 0, b""),
        (10, None, b""),
        (99, 5, b""),
    ],
)
def test_a_range_is_read_as_far_as_the_blob_goes(
    blobs: BlobStore, start: int, length: int | None, expected: bytes
) -> None:
    blobs.put("k", b"0123456789")
    with blobs.open_reader("k", start=start, length=length) as reader:
        assert b"".join(iter(lambda: reader.read(3), b"")) == expected
        assert reader.read() == b""


def test_a_missing_blob_is_said_to_be_missing(blobs: BlobStore) -> None:
    assert not blobs.exists("a/none")
    for action in (
        lambda: blobs.get("a/none"),
        lambda: blobs.get_size("a/none"),
        lambda: blobs.open_reader("a/none"),
        lambda: blobs.open_reader("a/none", length=0),
    ):
        with pytest.raises(BlobMissing, match="a/none"):
            action()


def test_deleting_twice_is_the_same_as_once(blobs: BlobStore) -> None:
    blobs.put("a/k", b"x")
    blobs.delete("a/k")
    blobs.delete("a/k")
    assert not blobs.exists("a/k")


def test_keys_are_listed_by_prefix_in_order(blobs: BlobStore) -> None:
    for key in ("b/2", "a/x/1", "b/10", "a/y", "ab"):
        blobs.put(key, b"x")
    assert list(blobs.list_keys()) == ["a/x/1", "a/y", "ab", "b/10", "b/2"]
    assert list(blobs.list_keys("a/")) == ["a/x/1", "a/y"]
    assert list(blobs.list_keys("b/1")) == ["b/10"]
    assert list(blobs.list_keys("none/")) == []


def test_blobs_are_listed_with_size_and_age_behind_a_key(blobs: BlobStore) -> None:
    for number in range(4):
        blobs.put(f"a/{number}", b"x" * number)
    blobs.put("b/0", b"")
    now = datetime.now(UTC)
    found = list(blobs.list_blobs("a/"))
    assert [(one.key, one.num_bytes) for one in found] == [(f"a/{n}", n) for n in range(4)]
    for one in found:
        # Stores keep whole seconds, and may be rounding up.
        assert abs(one.modified_at - now) < timedelta(minutes=2)
    assert [one.key for one in blobs.list_blobs("a/", after="a/1")] == ["a/2", "a/3"]
    assert [one.key for one in blobs.list_blobs(after="a/3")] == ["b/0"]
    assert list(blobs.list_blobs("a/", after="a/3")) == []


def test_an_upload_that_was_never_finished_is_removed_once_it_is_old(blobs: BlobStore) -> None:
    blobs.put("files/done", b"x")
    with blobs.open_writer("files/new") as writer:
        writer.write(b"x" * (6 << 20))
        # The server of moto begins every upload in 2010.
        assert blobs.abort_uploads(before=datetime(2000, 1, 1, tzinfo=UTC)) == 0
        later = datetime.now(UTC) + timedelta(hours=1)
        assert blobs.abort_uploads(before=later, dry_run=True) == 1
        assert blobs.abort_uploads(before=later) == 1
        assert blobs.abort_uploads(before=later) == 0
    assert list(blobs.list_keys()) == ["files/done"]


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/.", "a\0b", "a/"]
)
def test_a_key_that_leads_elsewhere_is_refused(blobs: BlobStore, key: str) -> None:
    with pytest.raises(ValueError, match="is not a blob key"):
        blobs.put(key, b"x")
    with pytest.raises(ValueError, match="is not a blob key"):
        blobs.get(key)
    with pytest.raises(ValueError, match="is not a blob key"):
        blobs.open_writer(key)
