"""The newest official client, which checks every answer against its types."""

import asyncio
import io
import json
from pathlib import Path
from typing import Final

import openai
import pytest
from openai.types.responses import Response

from tests.integration.api.servers import Running, Serve, lines, wait_for

CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"
TERMINAL = {"completed", "failed", "expired", "cancelled"}


def run_to_end(client: openai.OpenAI, content: bytes, **more: object) -> openai.types.Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", extra_body=more
    )
    wait_for(lambda: client.batches.retrieve(batch.id).status in TERMINAL)
    return client.batches.retrieve(batch.id)


def test_upload_by_handle_bytes_and_unnamed_stream(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "some input.jsonl"
    path.write_bytes(lines(3))
    with path.open("rb") as handle:
        named = client.files.create(file=handle, purpose="batch")
    raw = client.files.create(file=lines(3), purpose="batch")
    unnamed = client.files.create(file=io.BytesIO(lines(3)), purpose="batch")
    assert named.filename == "some input.jsonl"
    assert raw.filename == unnamed.filename == "upload"
    for file in (named, raw, unnamed):
        assert file.status == "processed"
        assert file.bytes == len(lines(3))
        assert file.expires_at == file.created_at + 2_592_000
        assert client.files.content(file.id).read() == lines(3)
        assert client.files.wait_for_processing(file.id).id == file.id


def test_a_batch_from_upload_to_download(client: openai.OpenAI) -> None:
    batch = run_to_end(client, lines(20))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
    assert batch.model == "simulated"
    assert batch.usage is not None
    assert batch.usage.output_tokens > 0
    assert batch.error_file_id is None
    assert batch.output_file_id is not None
    output = client.files.content(batch.output_file_id)
    assert len(output.text.splitlines()) == 20
    described = client.files.retrieve(batch.output_file_id)
    assert described.purpose == "batch_output"
    assert batch.id in output.response.headers["content-disposition"]


def test_create_answers_at_once_with_every_key(client: openai.OpenAI) -> None:
    file = client.files.create(file=lines(1), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"team": "a"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert batch.status == "validating"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 0, "completed": 0, "failed": 0}
    assert batch.expires_at == batch.created_at + 86_400
    assert batch.metadata == {"team": "a"}
    assert {
        name for name in openai.types.Batch.model_fields if name not in batch.to_dict()
    } == set()


def test_metadata_null_and_our_own_fields_are_taken(client: openai.OpenAI) -> None:
    file = client.files.create(file=lines(1, model="gpt-9"), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata=None,
        extra_body={"priority": 5, "model": "simulated", "on_unsupported_schema": "refuse"},
    )
    assert batch.metadata is None
    assert batch.to_dict()["priority"] == 5
    assert batch.model == "simulated"
    wait_for(lambda: client.batches.retrieve(batch.id).status in TERMINAL)
    assert client.batches.retrieve(batch.id).status == "completed"


def test_bad_lines_fail_the_batch_later_and_are_listed(client: openai.OpenAI) -> None:
    batch = run_to_end(client, lines(1) + b"no json\n" + lines(1))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert {(one.line, one.code) for one in batch.errors.data} == {
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
    }
    assert batch.output_file_id is None


def test_an_empty_file_is_taken_and_fails_its_batch(client: openai.OpenAI) -> None:
    batch = run_to_end(client, b"")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [one.code for one in batch.errors.data] == ["empty_file"]


def test_models_are_listed_with_the_demo_first_and_found_with_slashes(serve_api: Serve) -> None:
    models = {"org/model-7b": {"engine": "simulated"}}
    with (
        serve_api(models=models) as running,
        running.client(_strict_response_validation=True) as client,
    ):
        assert [model.id for model in client.models.list()] == ["demo", "simulated", "org/model-7b"]
        assert client.models.retrieve("org/model-7b").owned_by == "batchctl"
        with running.http() as http:
            assert http.get("/v1/models/org/model-7b").json()["id"] == "org/model-7b"
            assert http.get("/v1/models/org%2Fmodel-7b").json()["id"] == "org/model-7b"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("org/other")
        assert caught.value.code == "model_not_found"


def test_listing_files_pages_to_the_end_without_repeats(api: Running) -> None:
    with api.client(_strict_response_validation=True) as client:
        assert list(client.files.list()) == []
        made = [
            client.files.create(file=(f"{n}.jsonl", b"x"), purpose="batch").id for n in range(7)
        ]
        other = client.files.create(file=b"x", purpose="user_data").id
        assert [file.id for file in client.files.list(limit=3)] == [other, *reversed(made)]
        assert [file.id for file in client.files.list(limit=2, order="asc")] == [*made, other]
        assert [file.id for file in client.files.list(purpose="user_data")] == [other]
        page = client.files.list(limit=8)
        assert not page.has_more


def test_listing_batches_pages_to_the_end_without_repeats(api: Running) -> None:
    with api.client(_strict_response_validation=True) as client:
        assert list(client.batches.list()) == []
        file = client.files.create(file=lines(1), purpose="batch")
        made = [
            client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id
            for _ in range(7)
        ]
        assert [batch.id for batch in client.batches.list(limit=3)] == made[::-1]
        assert [batch.id for batch in client.batches.list()] == made[::-1]


def test_cancel_is_repeatable_until_the_end(api: Running) -> None:
    with api.client(_strict_response_validation=True) as client:
        file = client.files.create(file=lines(1), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert client.batches.cancel(batch.id).status == "cancelling"


def test_cancelled_batch_keeps_what_was_done_and_cancels_again(serve_api: Serve) -> None:
    slow = {"engine": "simulated", "options": {"step_seconds": 0.02, "slots": 4}}
    with serve_api(workers=True, models={"slow": slow}) as running, running.client() as client:
        file = client.files.create(file=lines(500, model="slow"), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

        def some_are_done() -> bool:
            counts = client.batches.retrieve(batch.id).request_counts
            return counts is not None and counts.completed > 0

        wait_for(some_are_done)
        with pytest.raises(openai.ConflictError, match="which has not ended"):
            client.files.delete(file.id)
        assert client.batches.cancel(batch.id).status == "cancelling"
        wait_for(lambda: client.batches.retrieve(batch.id).status == "cancelled")
        again = client.batches.cancel(batch.id)
        assert again.status == "cancelled"
        assert again.request_counts is not None
        assert 0 < again.request_counts.completed < 500
        assert again.request_counts.completed + again.request_counts.failed == 500


def test_cancel_of_a_finished_batch_is_refused_once(
    client: openai.OpenAI, working: Running
) -> None:
    batch = run_to_end(client, lines(1))
    asked: list[object] = []
    with (
        working.http(event_hooks={"request": [asked.append]}) as http,
        working.client(max_retries=5, http_client=http) as patient,
        pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"),
    ):
        patient.batches.cancel(batch.id)
    assert len(asked) == 1


def test_delete_removes_the_file_and_its_bytes(api: Running) -> None:
    with api.client(_strict_response_validation=True) as client:
        file = client.files.create(file=b"secret", purpose="batch")
        deleted = client.files.delete(file.id)
        assert (deleted.id, deleted.deleted) == (file.id, True)
        for call in (client.files.retrieve, client.files.delete, client.files.content):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                call(file.id)
        assert list(client.files.list()) == []
    assert list(api.app.blobs.list_keys("files/")) == []


def test_errors_are_of_the_right_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.batches.retrieve("batch_none")
    assert missing.value.message.endswith("No batch found with id 'batch_none'.")
    assert missing.value.request_id is not None
    with pytest.raises(openai.NotFoundError) as missing:
        client.files.retrieve("file-none")
    assert (missing.value.type, missing.value.param, missing.value.code) == (
        "invalid_request_error",
        "id",
        None,
    )
    with pytest.raises(openai.NotFoundError) as missing:
        client.batches.create(input_file_id="x", endpoint=CHAT, completion_window="24h")
    assert missing.value.param == "input_file_id"
    file = client.files.create(file=b"", purpose="user_data")
    with pytest.raises(openai.BadRequestError) as bad:
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert bad.value.param == "input_file_id"
    with pytest.raises(openai.BadRequestError) as bad:
        client.batches.create(input_file_id=file.id, endpoint="/v1/tea", completion_window="24h")  # type: ignore[arg-type]  # on purpose
    assert (bad.value.param, bad.value.code) == ("endpoint", "invalid_value")
    with pytest.raises(openai.BadRequestError) as bad:
        client.files.create(file=b"", purpose="tea")  # type: ignore[arg-type]  # on purpose
    assert bad.value.param == "purpose"


def test_a_wrong_key_is_refused(serve_api: Serve) -> None:
    with serve_api(api_key="sk-7351") as running:
        with running.client(api_key="sk-7351") as client:
            assert client.models.list().data
        for key in ("sk-9999", "sk-735", "sk-73510", "SK-7351"):
            with (
                running.client(api_key=key) as client,
                pytest.raises(openai.AuthenticationError) as caught,
            ):
                client.files.create(file=b"x", purpose="batch")
            assert caught.value.code == "invalid_api_key"
            assert key not in caught.value.message


def test_content_streams(client: openai.OpenAI) -> None:
    content = lines(30_000)
    file = client.files.create(file=content, purpose="batch")
    with client.files.with_streaming_response.content(file.id) as response:
        assert response.headers["content-length"] == str(len(content))
        assert response.headers["content-type"] == "application/jsonl"
        assert b"".join(response.iter_bytes()) == content
    with client.files.with_streaming_response.list(limit=1) as listed:
        assert listed.parse().data


def test_repeating_an_idempotency_key_makes_one_of_each(api: Running) -> None:
    with api.client() as client:
        key = {"Idempotency-Key": "k1"}
        files = [
            client.files.create(file=lines(1), purpose="batch", extra_headers=key) for _ in range(2)
        ]
        assert files[0] == files[1]
        assert len(list(api.app.blobs.list_keys("files/"))) == 1
        with pytest.raises(openai.ConflictError) as caught:
            client.files.create(file=lines(2), purpose="batch", extra_headers=key)
        assert caught.value.code == "idempotency_key_reused"
        assert len(list(api.app.blobs.list_keys("files/"))) == 1
        answers = [
            client.batches.with_raw_response.create(
                input_file_id=files[0].id,
                endpoint=CHAT,
                completion_window="24h",
                extra_headers=key,
            )
            for _ in range(2)
        ]
        assert answers[0].parse().id == answers[1].parse().id
        replayed = [one.headers.get("idempotent-replayed") for one in answers]
        assert replayed == [None, "true"]
        with pytest.raises(openai.ConflictError):
            client.batches.create(
                input_file_id=files[0].id,
                endpoint=CHAT,
                completion_window="2h",  # type: ignore[arg-type]  # an extension
                extra_headers=key,
            )


def test_the_asynchronous_client_does_the_same(working: Running) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{working.url}/v1",
            api_key="none",
            max_retries=0,
            _strict_response_validation=True,
        ) as client:
            file = await client.files.create(file=lines(5), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            async with asyncio.timeout(60):
                while batch.status not in TERMINAL:
                    await asyncio.sleep(0.05)
                    batch = await client.batches.retrieve(batch.id)
            assert batch.status == "completed"
            assert batch.output_file_id is not None
            content = await client.files.content(batch.output_file_id)
            assert len(content.text.splitlines()) == 5
            ids = [one.id async for one in client.batches.list(limit=1)]
            assert len(ids) == len(set(ids))
            assert batch.id in ids
            assert [model.id async for model in client.models.list()] == ["demo", "simulated"]

    asyncio.run(run())


def test_a_batch_of_responses_is_read_by_the_types_of_the_client(client: openai.OpenAI) -> None:
    asked = [
        {"custom_id": f"r{n}", "method": "POST", "url": RESPONSES, "body": {"input": f"hello {n}"}}
        for n in range(3)
    ]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in asked)
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=RESPONSES,
        completion_window="24h",
        extra_body={"model": "simulated"},
    )
    wait_for(lambda: client.batches.retrieve(batch.id).status in TERMINAL)
    batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.endpoint) == ("completed", RESPONSES)
    assert batch.output_file_id is not None
    found = [
        Response.model_validate(json.loads(line)["response"]["body"], strict=True)
        for line in client.files.content(batch.output_file_id).text.splitlines()
    ]
    assert [answer.status for answer in found] == ["completed"] * 3
    assert all(answer.output_text for answer in found)
    assert batch.usage is not None
    assert batch.usage.output_tokens == sum(
        answer.usage.output_tokens for answer in found if answer.usage is not None
    )
