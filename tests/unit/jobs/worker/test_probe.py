import socket

import httpx2
import pytest

from jobs.domain.errors import Conflict
from jobs.setting_groups import WorkerSettings
from jobs.worker.probe import HEALTHY_SECONDS, Pulse, open_probe

FREE = WorkerSettings(metrics_port=0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_worker_without_a_port_serves_nothing() -> None:
    with open_probe(WorkerSettings(), lambda: None) as port:
        assert port is None


def test_health_says_what_is_wrong() -> None:
    problems: list[str | None] = [None, "The engine is gone."]
    with open_probe(FREE, lambda: problems.pop(0)) as port:
        url = f"http://127.0.0.1:{port}/health"
        well, ill = httpx2.get(url), httpx2.get(url)
    assert (well.status_code, well.json()) == (200, {"status": "ok"})
    assert (ill.status_code, ill.json()) == (
        503,
        {"status": "failing", "reason": "The engine is gone."},
    )


def test_metrics_are_those_of_the_process() -> None:
    with open_probe(FREE, lambda: None) as port:
        answer = httpx2.get(f"http://127.0.0.1:{port}/metrics")
        assert httpx2.get(f"http://127.0.0.1:{port}/elsewhere").status_code == 404
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "process_cpu_seconds_total" in answer.text
    assert "batchctl_leases_lost_total" in answer.text


def test_the_second_worker_of_a_machine_has_the_next_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        first = taken.getsockname()[1] - 1
    with open_probe(WorkerSettings(metrics_port=first), lambda: None, ordinal=1) as port:
        assert port == first + 1


def test_a_port_that_is_taken_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        probe = open_probe(WorkerSettings(metrics_port=port), lambda: None)
        with pytest.raises(Conflict, match=f"port {port}: address already in use"), probe:
            pass


def test_loops_that_turn_are_well_and_one_that_stopped_is_named() -> None:
    clock = Clock()
    pulse = Pulse(clock=clock)
    pulse.note("control")
    pulse.note("sweep")
    clock.now += HEALTHY_SECONDS + 1
    pulse.note("sweep")
    assert pulse.problem() == "The control loop has done nothing for 61 s."
    pulse.note("control")
    assert pulse.problem() is None


def test_a_long_turn_is_well_while_its_engine_makes_progress() -> None:
    clock = Clock()
    tokens = [0]
    pulse = Pulse(progress=lambda: tokens[0], clock=clock)
    pulse.note("work")
    for _ in range(5):
        clock.now += HEALTHY_SECONDS - 1
        tokens[0] += 1
        assert pulse.problem() is None
    clock.now += HEALTHY_SECONDS + 1
    assert pulse.problem() == "The work loop has done nothing for 61 s."


def test_a_loop_that_failed_is_ill_until_a_turn_succeeds() -> None:
    pulse = Pulse()
    pulse.note("work", failure="engine_out_of_memory")
    assert pulse.problem() == "The work loop failed with engine_out_of_memory."
    pulse.note("work")
    assert pulse.problem() is None
