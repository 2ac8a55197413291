"""The same calls over Postgres and S3."""

from datetime import timedelta

import httpx2
import msgspec
import openai
import pytest

from jobs.domain.ids import WorkerId
from jobs.domain.request import Capabilities
from storage import models, workers
from storage.database import open_database
from storage.models import Model
from storage.workers import Worker
from tests.conftest import s3_settings
from tests.integration.api.servers import Serve, lines, wait_for

CONTENT = lines(20) + b"\n" * (7 << 20)
"""Larger than one part of an S3 upload."""


def test_a_batch_over_postgres_and_s3(serve_api: Serve, postgres_url: str, moto_url: str) -> None:
    blobs = s3_settings(moto_url)
    with (
        serve_api(workers=True, database={"url": postgres_url}, blobs=blobs) as running,
        running.client(_strict_response_validation=True) as client,
        running.http() as http,
    ):
        assert http.get("/ready").json()["status"] == "ready"
        key = {"Idempotency-Key": "once"}
        file, again = (
            client.files.create(file=CONTENT, purpose="batch", extra_headers=key) for _ in range(2)
        )
        assert file == again
        assert list(running.app.blobs.list_keys("files/")) == [f"files/{file.id}"]
        assert client.files.content(file.id).read() == CONTENT
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"a": "ü"},
        )
        followed = http.get(f"/v1/batches/{batch.id}/results?follow=true").content
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        batch = client.batches.retrieve(batch.id)
        assert batch.metadata == {"a": "ü"}
        assert batch.output_file_id is not None
        output = client.files.content(batch.output_file_id).read()
        assert sorted(followed.splitlines()) == sorted(output.splitlines())
        assert len(output.splitlines()) == 20
        part = http.get(f"/v1/files/{batch.output_file_id}/content", headers={"Range": "bytes=5-9"})
        assert part.content == output[5:10]
        empty = client.files.create(file=b"", purpose="user_data")
        assert client.files.content(empty.id).read() == b""
        assert [one.id for one in client.files.list(limit=1)] == [
            empty.id,
            batch.output_file_id,
            file.id,
        ]
        assert client.files.delete(file.id).deleted
        check_gone(http, file.id)


def check_gone(http: httpx2.Client, file_id: str) -> None:
    assert http.get(f"/v1/files/{file_id}").status_code == 404
    assert http.get(f"/v1/files/{file_id}/content").status_code == 404


def test_a_broken_upload_leaves_nothing_in_s3(serve_api: Serve, moto_url: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"z" * (12 << 20)
    kind = {"content-type": "multipart/form-data; boundary=x"}
    with serve_api(blobs=s3_settings(moto_url)) as running, running.http() as http:
        assert http.post("/v1/files", content=body, headers=kind).status_code == 400
        assert list(running.app.blobs.list_keys()) == []


def test_a_bucket_that_is_not_there_makes_it_not_ready(serve_api: Serve, moto_url: str) -> None:
    blobs = s3_settings(moto_url).model_copy(update={"bucket": "no-such-bucket"})
    with serve_api(blobs=blobs) as running, running.http() as http:
        assert http.get("/ready").status_code == 503
        with (
            running.client() as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.files.create(file=b"x", purpose="batch")
    assert caught.value.status_code == 503
    assert "no-such-bucket" not in caught.value.message


def test_a_server_with_workers_leaves_to_others_what_they_serve(
    serve_api: Serve, postgres_url: str
) -> None:
    here: dict[str, object] = {
        "engine": "auto",
        "database": {"url": postgres_url},
        "models": {"theirs": {"source": "/only/on/the/other/machine"}},
    }
    with open_database(postgres_url) as db:
        now = db.now()
        other = WorkerId("worker_other")
        workers.heartbeat(
            db,
            Worker(
                id=other,
                boot_id="b",
                started_at=now,
                heartbeat_at=now + timedelta(hours=1),
                host="other",
                models=("theirs",),
            ),
        )
        capabilities = Capabilities(model="theirs", engine="vllm", fingerprint="f")
        models.upsert(
            db,
            Model(
                name="theirs",
                fingerprint="f",
                capabilities=msgspec.to_builtins(capabilities),
                published_at=now,
                published_by=other,
            ),
        )
    with serve_api(workers=True, **here) as running, running.client() as client:

        def submit(model: str) -> str:
            file = client.files.create(file=("in.jsonl", lines(3, model=model)), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
            return batch.id

        theirs = submit("theirs")
        wait_for(lambda: client.batches.retrieve(theirs).request_counts.total == 3)  # type: ignore[union-attr]
        ours = submit("simulated")
        wait_for(lambda: client.batches.retrieve(ours).status == "completed")
        counts = client.batches.retrieve(theirs).request_counts
        assert counts is not None
        assert (counts.completed, counts.failed) == (0, 0)
        with running.http() as http:

            def listed() -> set[str]:
                return {
                    name for one in http.get("/v1/workers").json()["data"] for name in one["models"]
                }

            wait_for(lambda: listed() == {"theirs", "demo", "simulated"})
