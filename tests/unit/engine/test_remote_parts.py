"""The remote engine's parts: URLs, waiting times, limits, and what each failure means."""

import time

import httpx2
import pytest

from engine import openai_answers, openai_api
from engine.concurrency import AdaptiveLimit
from engine.exchange import MISCONFIGURED, TROUBLES
from engine.openai_answers import Answer, Refusal, StreamReader, Trouble
from jobs.domain.request import Constraint


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("http://h:8000/v1/", "http://h:8000/v1"),
        ("https://h/api/v1", "https://h/api/v1"),
        ("https://h/openai", "https://h/openai/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/v1/chat/completions", "https://h/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_base_url_ends_with_a_version(url: str, base: str) -> None:
    assert openai_api.base_url(url) == base


def test_shown_url_has_no_password() -> None:
    assert openai_api.shown_url("https://me:secret@h:1/v1?key=secret") == "https://h:1/v1"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "9", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "9", "retry-after-ms": "x"}, 9),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert openai_answers.read_retry_after(headers, now=1000) == seconds


def test_every_failure_of_the_http_client_has_a_meaning() -> None:
    todo = list(httpx2.HTTPError.__subclasses__())
    found = set()
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        found.add(kind)
    public = {kind for kind in found if getattr(httpx2, kind.__name__, None) is kind}
    meant = {*TROUBLES, *MISCONFIGURED}
    for kind in public:
        if not kind.__subclasses__():
            assert meant.intersection(kind.__mro__), kind
    assert not set(TROUBLES) & MISCONFIGURED


@pytest.mark.parametrize("status", [400, 404, 405, 406, 410, 413, 415, 422, 451, 501, 505])
def test_refusals_are_final(status: int) -> None:
    assert isinstance(openai_answers.read_failure(status, {}, b"{}"), Refusal)


@pytest.mark.parametrize(
    "status", [408, 409, 425, 429, 500, 502, 503, 504, 507, 520, 524, 529, 599]
)
def test_troubles_are_tried_again(status: int) -> None:
    trouble = openai_answers.read_failure(status, {"retry-after": "2"}, b"<html>")
    assert isinstance(trouble, Trouble)
    assert trouble.kind == ("load" if status in {429, 503, 529} else "fault")
    assert trouble.retry_after == 2


def test_limit_doubles_until_there_was_too_much_then_grows_by_one_a_round() -> None:
    limit = AdaptiveLimit(100)
    assert limit.limit == 16
    for _ in range(16):
        limit.note_success()
    assert limit.limit == 32
    assert limit.note_overload(started_at=1, now=2)
    assert limit.limit == 16
    for _ in range(17):
        limit.note_success()
    assert limit.limit == 17
    for _ in range(100_000):
        limit.note_success()
    assert limit.limit == 100


def test_limit_is_lowered_once_for_requests_that_were_out_together() -> None:
    limit = AdaptiveLimit(16)
    assert limit.note_overload(started_at=1, now=5)
    assert not limit.note_overload(started_at=2, now=6)
    assert not limit.note_outage(started_at=4, now=7)
    assert limit.limit == 8
    assert limit.note_overload(started_at=5.5, now=8)
    assert limit.limit == 4


def test_limit_is_one_while_the_server_is_away_and_soon_what_it_was() -> None:
    limit = AdaptiveLimit(64)
    for _ in range(48):
        limit.note_success()
    for at in range(10):
        limit.note_outage(started_at=at, now=at)
    assert limit.limit == 1
    for _ in range(31):
        limit.note_success()
    assert limit.limit == 32


def test_stream_is_read_however_it_is_cut() -> None:
    whole = (
        b'data: {"choices": [{"delta": {"role": "assistant"}}]}\r\n\r\n'
        b": a comment\n"
        b'event: x\ndata:{"choices": [{"delta": {"content": "a \xc3\xa9"}}]}\n\n'
        b'data: {"choices": [{"delta": {"content": null}, "finish_reason": "length"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n\n'
        b"data: [DONE]\n\n"
    )
    for size in (1, 2, 7, 50, len(whole)):
        reader = StreamReader()
        for start in range(0, len(whole), size):
            reader.feed(whole[start : start + size])
        answer = reader.result()
        assert isinstance(answer, Answer)
        assert (answer.text, answer.finish_reason) == ("a é", "length")
        assert answer.usage.completion_tokens == 2


def test_error_in_a_stream_is_seen() -> None:
    reader = StreamReader()
    reader.feed(b'data: {"choices": [{"delta": {"content": "so far"}}]}\n\n')
    reader.feed(b'data: {"error": {"message": "gone", "code": 503}}\n\ndata: [DONE]\n\n')
    trouble = reader.result()
    assert isinstance(trouble, Trouble)
    assert trouble.code == "503"


@pytest.mark.parametrize(
    ("spec", "levels"),
    [
        ('{"type": "object", "properties": {}, "additionalProperties": false}', "strict"),
        ('{"type": "object", "properties": {"a": {}}, "additionalProperties": false}', "plain"),
        ('{"type": "object", "properties": {"a": {}}, "required": ["a"]}', "plain"),
        ('{"type": "array", "items": {"type": "object"}}', "plain"),
        ('{"type": "array", "items": {"enum": [{"type": "object"}]}}', "strict"),
        ("true", "strict"),
    ],
)
def test_strict_is_asked_for_only_where_it_can_be_kept(spec: str, levels: str) -> None:
    constraint = Constraint("json_schema", spec)
    assert openai_api.constraint_levels(constraint, "openai", chat=True)[0] == levels
    assert openai_api.constraint_levels(constraint, "openai", chat=False) == ("none",)


def test_date_of_retry_after_is_taken_from_now() -> None:
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    seconds = openai_answers.read_retry_after({"retry-after": later})
    assert seconds is not None
    assert 50 < seconds <= 60


def test_prompt_that_leaves_a_vllm_server_no_room_is_too_long() -> None:
    body = (
        b'{"error":{"message":"max_tokens must be at least 1, got 0.",'
        b'"type":"BadRequestError","param":"max_tokens","code":400}}'
    )
    refused = openai_answers.read_failure(400, {}, body)
    assert isinstance(refused, Refusal)
    assert refused.error.code == "context_length_exceeded"
    assert not refused.about_max_tokens, "another name for it would change nothing"
