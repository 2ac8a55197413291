"""The remote engine against servers that fail in every way, for a while or for ever."""

# ruff: noqa: ANN401 - what a test changes is whatever field there is

import asyncio
import ipaddress
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from engine.config import RemoteConfig
from engine.process import ProcessEngine
from jobs.domain.errors import EngineMisconfigured, EngineUnavailable
from tests.builders import await_set
from tests.sources import ListSource
from tests.unit.engine.loopback import (
    PROMPT,
    SECRET,
    Call,
    OpenRemote,
    Server,
    answer,
    ask,
    collect,
    error,
)

# --- what may yet succeed ---


async def _html(call: Call) -> None:
    await call.respond(200, b"<!doctype html><p>Back soon", kind="text/html")


async def _html_error(call: Call) -> None:
    await call.respond(502, b"<html>Bad gateway", kind="text/html")


async def _half(call: Call) -> None:
    whole = json.dumps(answer()).encode()
    await call.raw(200, headers={"content-length": str(len(whole)), "content-type": "x/json"})
    await call.send(whole[:20])
    call.close()


async def _half_stream(call: Call) -> None:
    await call.begin_stream()
    await call.event(content="half an ")


async def _wrong_json(call: Call) -> None:
    await call.respond(200, {"result": "ok"})


async def _not_json(call: Call) -> None:
    await call.respond(200, b"{'choices': []}")


async def _empty(call: Call) -> None:
    await call.respond(200, b"")


async def _nothing(call: Call) -> None:
    call.close()


async def _hang(call: Call) -> None:
    await call.hang()


async def _error_in_answer(call: Call) -> None:
    await call.respond(200, error("overloaded", code=502))


async def _busy(call: Call) -> None:
    await call.respond(503, error("later"), headers={"retry-after-ms": "20"})


async def _limited(call: Call) -> None:
    await call.respond(429, error("slow down", type="rate_limit_error"))


async def _broken(call: Call) -> None:
    await call.respond(
        500, error(f"failed on {call.text} with {call.headers.get('authorization')}")
    )


PASSING = [
    (_html, "a web page"),
    (_html_error, "status 502"),
    (_half, "the connection was closed"),
    (_half_stream, "half an answer"),
    (_wrong_json, "none of OpenAI's API"),
    (_not_json, "none of OpenAI's API"),
    (_empty, "an empty answer"),
    (_nothing, "the connection was closed"),
    (_hang, "no byte in time"),
    (_error_in_answer, "status 502"),
    (_busy, "status 503"),
    (_limited, "status 429"),
    (_broken, "status 500"),
]
KINDS = [behave.__name__.strip("_") for behave, _ in PASSING]


@pytest.mark.parametrize("behave", [behave for behave, _ in PASSING], ids=KINDS)
def test_passing_failure_costs_time_only(
    open_remote: OpenRemote, behave: Callable[[Call], Any]
) -> None:
    async def sometimes(call: Call) -> None:
        if call.number in {0, 3}:
            await behave(call)
        else:
            await call.answer()

    with Server(sometimes) as server:
        timeout = 0.5 if behave is _hang else 30
        engine = open_remote(server, timeout_seconds=timeout, patience_seconds=30)
        results = collect(engine, *[ask(i) for i in range(6)])
    assert set(results) == set(range(6))
    assert {result.error for result in results.values()} == {None}
    assert len(server.calls) == 8 or behave is _hang


@pytest.mark.parametrize(("behave", "said"), PASSING, ids=KINDS)
def test_lasting_failure_is_said_and_no_line_is_to_blame(
    open_remote: OpenRemote,
    behave: Callable[[Call], Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Server(behave) as server:
        engine = open_remote(server, timeout_seconds=0.3, patience_seconds=0.4)
        with pytest.raises(EngineUnavailable) as raised:
            collect(engine, *[ask(i, PROMPT) for i in range(5)])
    assert said in raised.value.message
    assert server.url in raised.value.message
    assert raised.value.retryable
    for text in (raised.value.message, *capsys.readouterr()):
        assert PROMPT not in text
        assert SECRET not in text


def test_server_that_is_not_there_is_named(open_remote: OpenRemote) -> None:
    with Server(_hang) as server:
        pass  # its port is free again
    with pytest.raises(EngineUnavailable, match=f"{server.url}/v1 .* no connection"):
        collect(open_remote(server), ask())


def test_work_goes_on_when_the_server_is_back(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await asyncio.sleep(0.01)
        await call.answer()

    missed = threading.Event()

    def note(_logger: object, _method: str, event: Any) -> Any:
        if event["event"] == "remote_trouble":
            missed.set()
        raise structlog.DropEvent

    # Before the server goes: it is missed at once, and told once.
    structlog.configure(processors=[note])
    try:
        server = Server(behave)
        with server:
            engine = open_remote(server, patience_seconds=60)
            running = engine.generate(ListSource([ask(i) for i in range(200)]))
            found = [next(running).id for _ in range(20)]
        rest: list[int] = []
        collecting = threading.Thread(
            target=lambda: rest.extend(one.id for one in running), daemon=True
        )
        collecting.start()
        await_set(missed)
        with server:
            collecting.join(30)
    finally:
        structlog.reset_defaults()
    assert Counter(found + rest) == Counter(range(200))


def test_retry_after_is_waited_for_by_everybody(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.number == 0:
            await call.respond(429, error(), headers={"Retry-After": "1"})
        else:
            await call.answer()

    with Server(behave) as server:
        engine = open_remote(server, patience_seconds=30, slots=1)
        assert len(collect(engine, *[ask(i) for i in range(4)])) == 4
    first, *others = (call.at for call in server.calls)
    assert min(others) - first >= 0.95


@pytest.mark.parametrize(
    "header",
    [
        ("retry-after", "0"),
        ("retry-after-ms", "1"),
        ("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT"),
    ],
)
def test_server_that_asks_for_no_pause_is_not_asked_without_one(
    open_remote: OpenRemote, header: tuple[str, str]
) -> None:
    began = 0.0

    async def behave(call: Call) -> None:
        nonlocal began
        began = began or call.at
        if call.at - began < 1:
            await call.respond(429, error(), headers=dict([header]))
        else:
            await call.answer()

    with Server(behave) as server:
        engine = open_remote(server, patience_seconds=60, slots=1)
        assert len(collect(engine, ask(1))) == 1
    # Pauses of up to 0.5, 1 and 2 seconds, at random; without one there would be hundreds.
    assert 2 <= len(server.calls) <= 25


def test_concurrency_finds_what_the_server_bears(open_remote: OpenRemote) -> None:
    busy = 0
    seen: list[int] = []

    async def behave(call: Call) -> None:
        nonlocal busy
        if busy >= 6:
            await call.respond(503, error("later"), headers={"retry-after-ms": "1"})
            return
        busy += 1
        seen.append(busy)
        await asyncio.sleep(0.02)
        busy -= 1
        await call.answer()

    with Server(behave) as server:
        engine = open_remote(server, slots=64, patience_seconds=60)
        results = collect(engine, *[ask(i) for i in range(300)])
    assert {result.error for result in results.values()} == {None}
    assert max(seen) == 6  # it asks for all there is,
    assert len(server.calls) - 300 < 100  # and seldom for more


def test_concurrency_grows_to_the_slots_where_nothing_stands_against_it(
    open_remote: OpenRemote,
) -> None:
    async def behave(call: Call) -> None:
        # Long beside what sending forty takes, so that a slow machine keeps them all out as well.
        await asyncio.sleep(0.5)
        await call.answer()

    with Server(behave) as server:
        engine = open_remote(server, slots=40)
        collect(engine, *[ask(i) for i in range(130)])
        assert server.most_at_once == 40
        assert engine.num_slots == 40


# --- what is one line's fault ---


def test_line_that_fails_while_others_succeed_ends_with_an_error(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.text == PROMPT:
            await _broken(call)
        else:
            await asyncio.sleep(0.02)
            await call.answer()

    with Server(behave) as server:
        engine = open_remote(server, max_tries=3, slots=2, patience_seconds=30)
        results = collect(engine, ask(0, PROMPT), *[ask(i) for i in range(1, 60)])
    bad = results.pop(0)
    assert bad.error is not None
    assert bad.error.code == "server_error"
    assert bad.error.status_code == 500
    assert "500 x" in bad.error.message
    assert bad.attempts >= 3
    assert PROMPT not in bad.error.message
    assert SECRET not in bad.error.message
    assert {result.error for result in results.values()} == {None}


def test_line_that_rests_before_its_next_try_holds_nobody_up(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await (_broken(call) if call.text == PROMPT else call.answer())

    with Server(behave) as server:
        engine = open_remote(server, max_tries=4, slots=1, patience_seconds=30)
        requests = [ask(0, PROMPT), *[ask(i) for i in range(1, 6)]]
        order = [result.id for result in engine.generate(ListSource(requests))]
    assert sorted(order) == list(range(6))
    assert order[-1] == 0


@pytest.mark.parametrize(
    ("status", "fields", "code"),
    [
        (400, {"type": "BadRequestError", "code": 400}, "invalid_request"),
        (400, {"code": "invalid_value", "param": "temperature"}, "invalid_value"),
        (
            400,
            {"message": "This model's maximum context length is 2048 tokens. However, you ..."},
            "context_length_exceeded",
        ),
        (413, {}, "request_too_large"),
        (422, {"code": PROMPT}, "invalid_request"),
        (403, {"code": "content_policy_violation"}, "content_policy_violation"),
    ],
)
def test_refused_line_is_an_error_line(
    open_remote: OpenRemote, status: int, fields: dict[str, Any], code: str
) -> None:
    async def behave(call: Call) -> None:
        said = {"message": f"You said: {PROMPT}", **fields}
        await call.respond(status, error(**said))

    with Server(behave) as server:
        result = collect(open_remote(server), ask(1, PROMPT))[1]
    assert len(server.calls) == 1
    assert result.error is not None
    assert result.error.code == code
    assert result.error.status_code == status
    assert PROMPT not in result.error.message
    if code == "context_length_exceeded":
        assert "2048" in result.error.message


def test_content_filter_keeps_what_was_said(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        choices = [{"message": {"content": "Well, "}, "finish_reason": "content_filter"}]
        await call.answer(choices=choices)

    with Server(behave) as server:
        result = collect(open_remote(server), ask())[1]
    assert result.error is not None
    assert result.error.code == "content_filter"
    assert result.text == "Well, "


def test_large_answer_arrives_whole_and_a_huge_one_is_refused(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.text == "large":
            await call.answer("x" * (6 << 20))
            return
        call.keeps = False
        await call.raw(200, headers={"content-type": "application/json", "connection": "close"})
        for _ in range(70):
            await call.send(b" " * (1 << 20))

    with Server(behave) as server:
        results = collect(open_remote(server), ask(1, "large"), ask(2, "huge"))
    assert len(results[1].text) == 6 << 20
    assert results[2].error is not None
    assert results[2].error.code == "answer_too_large"


# --- what the settings have to change ---


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_ends_the_work_with_one_clear_line(
    open_remote: OpenRemote, status: int
) -> None:
    async def behave(call: Call) -> None:
        await call.respond(status, error(f"Incorrect API key: {call.headers.get('authorization')}"))

    with Server(behave) as server:
        engine = open_remote(server)
        with pytest.raises(EngineMisconfigured, match="refuses the API key") as raised:
            collect(engine, *[ask(i) for i in range(20)])
        assert SECRET not in raised.value.message
        with pytest.raises(EngineMisconfigured, match="asks for an API key"):
            collect(open_remote(server.url, api_key=None), ask())


def test_unknown_model_is_told_from_those_that_are_there(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.path == "/v1/models":
            await call.respond(200, {"object": "list", "data": [{"id": "big"}, {"id": "small"}]})
        else:
            await call.respond(404, error("no such model", code="model_not_found"))

    with Server(behave) as server:
        with pytest.raises(EngineMisconfigured, match="no model 'a-model'; it has: big, small"):
            collect(open_remote(server), ask())
        with pytest.raises(EngineMisconfigured, match="lists the model 'big', but"):
            collect(open_remote(server, served_model="big"), ask())


@pytest.mark.parametrize("status", [404, 405, 501])
def test_wrong_base_url_is_said(open_remote: OpenRemote, status: int) -> None:
    async def behave(call: Call) -> None:
        await call.respond(status, b"<html>Nothing here", kind="text/html")

    with Server(behave) as server, pytest.raises(EngineMisconfigured, match="There is no API at"):
        collect(open_remote(server), ask())


def test_spent_quota_is_said_at_once(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.respond(429, error("pay", code="insufficient_quota"))

    with Server(behave) as server, pytest.raises(EngineUnavailable, match="no quota left"):
        collect(open_remote(server, patience_seconds=3600), ask())


def _write_certificate(path: Path) -> None:
    """Write a certificate of this machine that nobody has signed, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))


def test_certificate_is_checked(
    open_remote: OpenRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def behave(call: Call) -> None:
        await call.answer()

    path = tmp_path / "certificate.pem"
    _write_certificate(path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    with Server(behave, tls=tls) as server:
        with pytest.raises(EngineMisconfigured, match=r"certificate .* is not trusted here"):
            collect(open_remote(server, patience_seconds=60), ask())
        assert not server.calls
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert collect(open_remote(server), ask())[1].text == "fine"


def test_redirect_is_not_followed(open_remote: OpenRemote) -> None:
    async def elsewhere(call: Call) -> None:
        await call.answer()

    with Server(elsewhere) as other:

        async def behave(call: Call) -> None:
            await call.respond(307, b"", headers={"location": f"{other.url}{call.path}"})

        with (
            Server(behave) as server,
            pytest.raises(EngineMisconfigured, match="sends callers elsewhere"),
        ):
            collect(open_remote(server), ask())
    assert not other.calls


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x/", "http://", "http://x:port/"])
def test_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="should be the URL of a server"):
        RemoteConfig(url=url)


def test_key_that_cannot_be_sent_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="should be one word") as raised:
        RemoteConfig(url="http://x", api_key=f"{SECRET}\nX-Evil: 1")
    assert SECRET not in str(raised.value)


# --- in a process of its own ---


def _open_process(server: Server, folder: Path, **changes: Any) -> ProcessEngine:
    config = RemoteConfig.model_validate({"url": server.url, "api_key": SECRET, **changes})
    return ProcessEngine(config, model="a-model", log_path=folder / "log", stall_seconds=5)


def test_server_that_refuses_the_key_has_no_suspects(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        await call.respond(401, error(f"{call.text} {call.headers['authorization']}"))

    with Server(behave) as server:
        engine = _open_process(server, tmp_path)
        with pytest.raises(EngineMisconfigured, match="refuses the API key"):
            collect(engine, *[ask(i, PROMPT) for i in range(50)])
        engine.close()
    written = (tmp_path / "log").read_text()
    assert PROMPT not in written
    assert SECRET not in written


def test_server_that_is_away_has_no_suspects(tmp_path: Path) -> None:
    with Server(_broken) as server:
        engine = _open_process(server, tmp_path, patience_seconds=1)
        with pytest.raises(EngineUnavailable, match="has answered no request"):
            collect(engine, *[ask(i, PROMPT) for i in range(50)])
        engine.close()
    written = (tmp_path / "log").read_text()
    assert "remote_trouble" in written
    assert PROMPT not in written
    assert SECRET not in written


@pytest.mark.slow
def test_silent_server_is_no_hang_of_the_engine(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        await asyncio.sleep(8)  # longer than an engine may be without progress
        await call.answer()

    with Server(behave) as server:
        engine = _open_process(server, tmp_path)
        assert collect(engine, ask())[1].error is None
        engine.close()
