"""The last client of the first generation, in a process of its own: httpx instead of httpx2."""

from collections.abc import Callable

import pytest

from tests.integration.api.servers import Running, lines

_SCRIPT = """
import io, time, openai
assert openai.__version__ == "1.109.1", openai.__version__
client = openai.OpenAI(_strict_response_validation=True)
CHAT = "/v1/chat/completions"
CONTENT = {content!r}
file = client.files.create(file=io.BytesIO(CONTENT), purpose="batch")
assert (file.filename, file.bytes, file.status) == ("upload", len(CONTENT), "processed"), file
named = client.files.create(file=("a b.jsonl", CONTENT), purpose="batch")
assert named.filename == "a b.jsonl"
assert client.files.wait_for_processing(file.id).status == "processed"
assert client.files.content(file.id).read() == CONTENT
batch = client.batches.create(
    input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={{"a": "b"}},
    extra_body={{"priority": 1}},
)
assert batch.status == "validating" and batch.metadata == {{"a": "b"}}
while batch.status not in ("completed", "failed"):
    time.sleep(0.1)
    batch = client.batches.retrieve(batch.id)
assert batch.status == "completed", batch
assert batch.request_counts.completed == {num}
assert len(client.files.content(batch.output_file_id).text.splitlines()) == {num}
with client.files.with_streaming_response.content(batch.output_file_id) as response:
    assert sum(1 for line in response.iter_lines()) == {num}
ids = [one.id for one in client.batches.list(limit=1)]
assert batch.id in ids and len(ids) == len(set(ids))
ids = [one.id for one in client.files.list(limit=1)]
assert file.id in ids and len(ids) == len(set(ids))
assert [model.id for model in client.models.list()][0] == "demo"
assert client.models.retrieve("demo").id == "demo"
for call, error in (
    (lambda: client.models.retrieve("org/none"), openai.NotFoundError),
    (lambda: client.batches.retrieve("batch_none"), openai.NotFoundError),
    (lambda: client.files.content("file-none"), openai.NotFoundError),
    (lambda: client.batches.cancel(batch.id), openai.ConflictError),
    (lambda: client.files.create(file=b"", purpose="tea"), openai.BadRequestError),
    (lambda: client.batches.create(input_file_id=file.id, endpoint="/tea",
                                   completion_window="24h"), openai.BadRequestError),
):
    began = time.monotonic()
    try:
        call()
    except error as caught:
        assert caught.request_id.startswith("req_") and set(caught.body) == {{
            "message", "type", "param", "code"}}
    else:
        raise AssertionError(error)
    assert time.monotonic() - began < 0.5, "it was tried again"
assert client.files.delete(file.id).deleted
cancelled = client.batches.create(
    input_file_id=named.id, endpoint=CHAT, completion_window="24h", metadata=None)
assert client.batches.cancel(cancelled.id).status in ("cancelling", "cancelled", "finalizing")
print("done")
"""


@pytest.mark.slow
def test_the_old_client_does_all_of_it(
    working: Running, run_old_client: Callable[[str, str], str]
) -> None:
    script = _SCRIPT.format(content=lines(10), num=10)
    assert run_old_client(script, f"{working.url}/v1") == "done\n"
