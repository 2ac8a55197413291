import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.worker.launcher import Pauses
from tests.builders import await_true

LAUNCHER = """
import dataclasses, json, sys
from jobs.worker.launcher import Command, Pauses, launch
given = json.loads(sys.argv[1])
launch(
    [
        Command(
            name=name,
            arguments=("/bin/sh", "-c", script),
            environment={"LOG": given["log"], "NAME": name},
            device="cpu",
        )
        for name, script in given["scripts"].items()
    ],
    patience_seconds=given["patience_seconds"],
    on_event=lambda event: print(json.dumps(dataclasses.asdict(event)), flush=True),
    pauses=Pauses(first_seconds=0.01, longest_seconds=0.05),
)
"""
WAITS = 'echo "$NAME up" >> "$LOG"; while true; do sleep 100 & wait $!; done'
DRAINS = f'trap \'echo "$NAME drained" >> "$LOG"; exit 0\' TERM; {WAITS}'
STUBBORN = f"trap : TERM; {WAITS}"


class Launched:
    """A launcher in a process of its own, and the log that its processes write."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process = process
        self._log = log

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the launcher ended"
        event: dict[str, Any] = json.loads(line)
        return event

    def await_event(self, kind: str) -> dict[str, Any]:
        while (event := self.event())["kind"] != kind:
            pass
        return event

    def said(self) -> list[str]:
        return self._log.read_text().splitlines()

    def await_said(self, *lines: str) -> None:
        await_true(lambda: set(lines) <= set(self.said()))


@contextmanager
def launched(tmp_path: Path, *, patience_seconds: float = 60, **scripts: str) -> Iterator[Launched]:
    log = tmp_path / "log"
    log.touch()
    given = {"log": str(log), "patience_seconds": patience_seconds, "scripts": scripts}
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps(given)],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        try:
            yield Launched(process, log)
        finally:
            # More than once: the second kills what a failed test left.
            while process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)


def is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_what_ends_is_started_again_after_a_growing_pause(tmp_path: Path) -> None:
    with launched(tmp_path, failing="exit 3") as launcher:
        ends = [launcher.await_event("ended") for _ in range(5)]
        assert [end["code"] for end in ends] == [3] * 5
        assert [end["pause_seconds"] for end in ends] == [0.01, 0.02, 0.04, 0.05, 0.05]
        assert len({end["pid"] for end in ends}) == 5


def test_one_that_dies_does_not_disturb_another(tmp_path: Path) -> None:
    with launched(tmp_path, failing="kill -9 $$", steady=DRAINS) as launcher:
        assert launcher.await_event("ended")["code"] == -9
        launcher.await_said("steady up")
        assert launcher.await_event("ended")["name"] == "failing"
        assert launcher.said() == ["steady up"]


def test_a_long_life_makes_the_next_pause_short_again() -> None:
    pauses = Pauses()
    pause = None
    shown = []
    for lived in (0, 0, 0, 59, 60, 0):
        pause = pauses.after(pause, lived_seconds=lived)
        shown.append(pause)
    assert shown == [1, 2, 4, 8, 1, 2]
    assert pauses.after(40, lived_seconds=0) == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_every_process_and_ends_the_launcher(
    tmp_path: Path, number: signal.Signals
) -> None:
    with launched(tmp_path, a=DRAINS, b=DRAINS) as launcher:
        launcher.await_said("a up", "b up")
        launcher.process.send_signal(number)
        assert launcher.process.wait(30) == 0
        assert sorted(launcher.said()) == ["a drained", "a up", "b drained", "b up"]


def test_draining_signals_the_process_and_not_its_children(tmp_path: Path) -> None:
    child = 'trap \'echo "child told" >> "$LOG"\' TERM; echo "child up" >> "$LOG"; sleep 100 & wait'
    main = f"({child}) & {DRAINS}"
    with launched(tmp_path, main=main) as launcher:
        pid = launcher.await_event("started")["pid"]
        launcher.await_said("main up", "child up")
        children = children_of(pid)
        assert children
        launcher.process.terminate()
        assert launcher.process.wait(30) == 0
        assert sorted(launcher.said()) == ["child up", "main drained", "main up"]
        await_true(lambda: not any(map(is_there, children)))


def test_ctrl_c_in_a_terminal_reaches_the_launcher_alone(tmp_path: Path) -> None:
    script = f'trap \'echo "interrupted" >> "$LOG"\' INT; {DRAINS}'
    with launched(tmp_path, main=script) as launcher:
        launcher.await_said("main up")
        os.killpg(launcher.process.pid, signal.SIGINT)  # as the terminal does
        assert launcher.process.wait(30) == 0
        assert launcher.said() == ["main up", "main drained"]


def test_what_does_not_end_in_time_is_killed_with_its_children(tmp_path: Path) -> None:
    with launched(tmp_path, patience_seconds=1, stubborn=STUBBORN, good=DRAINS) as launcher:
        launcher.await_said("stubborn up", "good up")
        pids = [launcher.await_event("started")["pid"] for _ in range(2)]
        left = [child for pid in pids for child in children_of(pid)]
        launcher.process.terminate()
        assert launcher.await_event("killed")["name"] == "stubborn"
        assert launcher.await_event("ended")["code"] == -9
        assert launcher.process.wait(30) == 0
        assert "good drained" in launcher.said()
        await_true(lambda: not any(map(is_there, left)))


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, patience_seconds=3600, stubborn=STUBBORN) as launcher:
        launcher.await_said("stubborn up")
        launcher.process.send_signal(signal.SIGINT)
        launcher.await_event("draining")
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.await_event("ended")["code"] == -9
        assert launcher.process.wait(30) == 0


def test_processes_drain_when_their_launcher_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path, main=DRAINS) as launcher:
        pid = launcher.await_event("started")["pid"]
        launcher.await_said("main up")
        launcher.process.kill()
        launcher.await_said("main drained")
        await_true(lambda: not is_there(pid))


def test_what_processes_say_is_no_output_of_the_launcher(tmp_path: Path) -> None:
    with launched(tmp_path, main=f"echo noise; {DRAINS}") as launcher:
        launcher.await_said("main up")
        launcher.process.terminate()
        assert launcher.process.stdout is not None
        kinds = [json.loads(line)["kind"] for line in launcher.process.stdout]
        assert kinds == ["started", "draining", "ended"]


def test_a_program_that_is_not_there_is_tried_again_and_not_the_end(tmp_path: Path) -> None:
    with launched(tmp_path, gone="exec /no/such/program", good=DRAINS) as launcher:
        assert launcher.await_event("ended")["code"] == 127
        launcher.await_said("good up")
        assert launcher.process.poll() is None
