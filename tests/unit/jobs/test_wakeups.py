import ssl
import threading
from typing import Any
from urllib.parse import parse_qsl

import pytest
import redis

from jobs.broker import connect, transport_settings
from jobs.domain.errors import InvalidInput
from jobs.domain.ids import BatchId
from jobs.settings import load
from jobs.wakeups import BrokerConfig, Doorbell, Hint, control_queue, work_queue

BATCH = BatchId("batch_1")


class Fleet:
    """Notes what a doorbell tells the other processes."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.is_listening = False

    def ring(self) -> None:
        self.told.append("ring")

    def hint(self, hint: Hint, batch_id: BatchId) -> None:
        self.told.append((hint, batch_id))

    def listen(self) -> None:
        self.told.append("listen")

    def poke_every(self, seconds: float) -> None:
        self.told.append(seconds)


def test_ring_wakes_who_waits() -> None:
    doorbell = Doorbell()
    seen = doorbell.wait(0)
    woken: list[int] = []
    thread = threading.Thread(
        daemon=True, target=lambda: woken.append(doorbell.wait(20, seen=seen))
    )
    thread.start()
    doorbell.announce()
    thread.join(20)
    assert woken == [seen + 1]


def test_ring_before_the_wait_is_not_missed() -> None:
    doorbell = Doorbell()
    seen = doorbell.wait(0)
    doorbell.announce()
    assert doorbell.wait(20, seen=seen) == seen + 1


def test_hint_is_heard_within_the_block_and_only_for_its_kind() -> None:
    doorbell = Doorbell()
    heard: list[BatchId] = []
    with doorbell.listening(Hint.STOPPING, heard.append):
        doorbell.hint(Hint.PROGRESS, BatchId("batch_0"))
        doorbell.hint(Hint.STOPPING, BATCH)
    doorbell.hint(Hint.STOPPING, BatchId("batch_2"))
    assert heard == [BATCH]


def test_other_processes_are_told_what_happens_here_and_not_what_they_told() -> None:
    doorbell, fleet = Doorbell(), Fleet()
    doorbell.connect(fleet)
    with doorbell.listening(Hint.PROGRESS, lambda _batch_id: None):
        doorbell.announce()
        doorbell.hint(Hint.STOPPING, BATCH)
        doorbell.ring_here()
        doorbell.hint_here(Hint.PROGRESS, BATCH)
    assert fleet.told == ["listen", "ring", (Hint.STOPPING, BATCH)]


def test_doorbell_is_shared_while_others_are_heard() -> None:
    doorbell, fleet = Doorbell(), Fleet()
    assert not doorbell.is_shared
    doorbell.connect(fleet)
    assert not doorbell.is_shared
    fleet.is_listening = True
    assert doorbell.is_shared


# --- names ---


def test_queues_of_models_are_readable_and_differ() -> None:
    assert control_queue("ours") == "ours.control"
    assert work_queue("ours", "demo") == "ours.work.demo"
    names = ["Qwen/Qwen3-8B", "Qwen-Qwen3-8B", "Qwen:Qwen3-8B"]
    queues = [work_queue("ours", name) for name in names]
    assert len(set(queues)) == 3
    assert all(queue.startswith("ours.work.Qwen-Qwen3-8B") for queue in queues)
    assert not any(set("/: ,") & set(queue) for queue in queues)


# --- the broker's URL ---


def settings_of(url: str) -> tuple[str, object, dict[str, object]]:
    made = transport_settings(BrokerConfig(url=url, sentinel_master="ours"))
    return made["broker_url"], made["broker_use_ssl"], made["broker_transport_options"]


def test_plain_url_has_no_tls() -> None:
    url, tls, options = settings_of("redis://:secret@127.0.0.1:6379/2")
    assert (url, tls) == ("redis://:secret@127.0.0.1:6379/2", None)
    assert "master_name" not in options


def test_rediss_checks_certificates_unless_told_not_to() -> None:
    url, tls, _ = settings_of("rediss://host:6380/0?ssl_ca_certs=/etc/ca.pem")
    assert url == "rediss://host:6380/0"
    assert tls == {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": True,
        "ssl_ca_certs": "/etc/ca.pem",
    }
    for value in ("none", "CERT_NONE"):
        _, tls, _ = settings_of(f"rediss://host/0?ssl_cert_reqs={value}")
        assert tls == {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}


def test_sentinel_url_names_its_master() -> None:
    url, _, options = settings_of("sentinel://one:26379/0;sentinel://two:26379/0")
    assert url == "sentinel://one:26379/0;sentinel://two:26379/0"
    assert options["master_name"] == "ours"


@pytest.mark.parametrize(
    "url",
    [
        "amqp://host",
        "host:6379",
        "rediss://host?ssl_cert_reqs=perhaps",
        "redis://:s3cret@h:abc/0",
        "redis://:s3cret@h:99999/0",
        "redis://:s3cret/1@h/0",
        "redis://:s3cret@h/name",
        "redis://:s3cret@h/0?socket_timeout=x",
        "redis://h/0?password=s3cret",
        "redis://h/0?ssl_cert_reqs=none",
        "rediss://h/0?ssl_nonsense=1",
        "redis://:s3cret@[::1/0",
        "sentinel://:s3cret@h:26379/mymaster",
        "sentinel://:s3cret@h:x",
        "sentinel://h:26379;:s3cret@g:x",
    ],
)
def test_url_that_cannot_be_used_is_refused(url: str) -> None:
    for use in (transport_settings, connect):
        with pytest.raises(InvalidInput, match=r"broker\.url") as refused:
            use(BrokerConfig(url=url))
        assert "s3cret" not in refused.value.message
        assert "\n" not in refused.value.message
    with pytest.raises(InvalidInput, match=r"broker\.url \(flag\)") as refused:
        load(broker={"url": url})
    assert "s3cret" not in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:6379/",
        "redis://user:p%2Fss@[::1]:6379/15",
        "rediss://h/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=/ca.pem",
        "sentinel://h;g:1/2",
    ],
)
def test_url_that_can_be_used_is_taken_everywhere(url: str) -> None:
    transport_settings(BrokerConfig(url=url))
    connect(BrokerConfig(url=url)).close()
    assert load(broker={"url": url}).limiter is not None


@pytest.mark.parametrize(
    ("given", "rule", "checks_name"),
    [
        ("CERT_REQUIRED", "required", "True"),
        ("required", "required", "True"),
        ("CERT_NONE", "none", "False"),
    ],
)
def test_limiter_is_given_the_options_of_tls_in_its_own_words(
    given: str, rule: str, checks_name: str
) -> None:
    url = f"rediss://:p%40ss@h:1/2?ssl_cert_reqs={given}&ssl_ca_certs=/etc/ca.pem"
    limiter = load(broker={"url": url}).limiter
    assert limiter is not None
    handed = limiter.url.get_secret_value()
    base, _, query = handed.partition("?")
    assert base == "rediss://:p%40ss@h:1/2"
    assert dict(parse_qsl(query)) == {
        "ssl_cert_reqs": rule,
        "ssl_check_hostname": checks_name,
        "ssl_ca_certs": "/etc/ca.pem",
    }
    client = redis.Redis.from_url(handed)  # which refuses Celery's words only when it connects
    made: Any = client.connection_pool.make_connection()
    assert made.cert_reqs is ssl.VerifyMode[f"CERT_{rule.upper()}"]
    client.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:p@ss@h:6379/2", "redis://h:6379/2"),
        ("redis://user:ss@h", "redis://h"),
        ("redis://h/0?password=ss", "redis://h/0"),
        ("redis://:ss@[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://:ss/@h/0", "redis://..."),
        (
            "sentinel://u:ss@one:1/0;sentinel://u:ss@two:1/0",
            "sentinel://one:1/0;sentinel://two:1/0",
        ),
    ],
)
def test_password_of_the_broker_is_not_shown(url: str, shown: str) -> None:
    assert BrokerConfig(url=url).shown_url == shown
