from prometheus_client.parser import text_string_to_metric_families

from tests.integration.api.servers import Running, Serve, lines, wait_for

KEY = "a-key"


def scrape(
    running: Running, **options: object
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with running.http(**options) as http:
        answer = http.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_an_empty_server_shows_its_process_and_no_queue(api: Running) -> None:
    found = scrape(api)
    assert found["batchctl_database_up", ()] == 1
    assert found["batchctl_batches", (("status", "completed"),)] == 0
    assert found["process_resident_memory_bytes", ()] > 1 << 20
    assert not [name for name, _ in found if name == "batchctl_queue_units"]


def test_work_that_nobody_does_is_seen_in_the_queue(api: Running) -> None:
    with api.client() as client:
        file = client.files.create(file=("in.jsonl", lines(3)), purpose="batch")
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    found = scrape(api)
    assert found["batchctl_batches", (("status", "validating"),)] == 1
    labels = (("kind", "plan"), ("model", ""), ("state", "ready"))
    assert found["batchctl_queue_units", labels] == 1
    assert found["batchctl_workers", (("state", "alive"),)] == 0


def test_a_finished_batch_is_counted_by_model_and_status(serve_api: Serve) -> None:
    with serve_api(workers=True) as running:
        with running.client() as client:
            file = client.files.create(file=("in.jsonl", lines(7)), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        found = scrape(running)
    assert found["batchctl_batches", (("status", "completed"),)] == 1
    # Other tests of this process may have counted as well.
    done = (("model", "simulated"), ("outcome", "completed"))
    assert found["batchctl_requests_total", done] >= 7
    tokens = (("kind", "completion"), ("model", "simulated"), ("outcome", "completed"))
    assert found["batchctl_tokens_total", tokens] >= 7
    assert found["batchctl_engine_starts_total", (("model", "simulated"),)] >= 1
    shard = (("kind", "shard"), ("model", "simulated"), ("outcome", "done"))
    assert found["batchctl_unit_seconds_count", shard] >= 1
    assert found["batchctl_segment_flush_seconds_count", ()] >= 1


def test_a_server_with_a_key_asks_for_it(serve_api: Serve) -> None:
    with serve_api(api_key=KEY) as running:
        with running.http() as http:
            assert http.get("/metrics").status_code == 401
            assert http.get("/health").status_code == 200
        found = scrape(running, headers={"authorization": f"Bearer {KEY}"})
        assert found["batchctl_database_up", ()] == 1


def test_a_database_that_is_away_leaves_the_metrics_of_the_process(serve_api: Serve) -> None:
    with serve_api() as running:
        running.app.db.close()
        (running.app.folder / "batchctl.sqlite3").unlink()
        found = scrape(running)
    assert found["batchctl_database_up", ()] == 0
    assert found["process_resident_memory_bytes", ()] > 1 << 20
