"""Everything a person can get wrong about the input of `batchctl run`: one clear line for each."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.builders import await_true, make_line, make_lines
from tests.integration.runs import Ended, Folder

GOOD = make_lines(3)
SLOW = pytest.mark.slow  # each costs a process; what planning says of them has unit tests too


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path)
    yield made
    left = [p for p in psutil.Process().children(recursive=True) if "engine.host" in p.cmdline()]
    assert left == [], "no engine outlives its run"


# --- input that is read as it was meant ---


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            b"\xef\xbb\xbf\r\n" + GOOD.replace(b"\n", b"\r\n\r\n").rstrip(), id="all of it"
        ),
        pytest.param(b"\xef\xbb\xbf" + GOOD, id="BOM", marks=SLOW),
        pytest.param(GOOD.replace(b"\n", b"\r\n"), id="CRLF", marks=SLOW),
        pytest.param(b"\n\n" + GOOD.replace(b"\n", b"\n \t\n"), id="blank lines", marks=SLOW),
        pytest.param(GOOD.rstrip(b"\n"), id="no last newline", marks=SLOW),
    ],
)
def test_harmless_form_is_understood(folder: Folder, content: bytes) -> None:
    ended = folder.run_file(content)
    assert ended.code == 0, ended.stderr
    assert folder.ids() == ["r0", "r1", "r2"]


# --- input that is refused by planning, with its line ---


@pytest.mark.parametrize(
    ("content", "line", "code"),
    [
        pytest.param(b"", None, "empty_file", id="empty"),
        pytest.param(GOOD + b"\xe9\n", 4, "invalid_utf8", id="not UTF-8"),
        pytest.param(
            b'{"a":' * 10_000 + b"\n" + GOOD, 1, "nesting_too_deep", id="nested deeply at once"
        ),
        pytest.param(
            GOOD + make_line("x", guided_json={"type": "nothing"}),
            4,
            "invalid_schema",
            id="schema that is none",
        ),
        pytest.param(
            GOOD + b"[" * 10_000 + b"\n", 4, "nesting_too_deep", id="nested deeply", marks=SLOW
        ),
        pytest.param(
            b"\r\n" + make_line("a").replace(b'"hello"', b"NaN"),
            2,
            "invalid_json_line",
            id="NaN",
            marks=SLOW,
        ),
        pytest.param(
            make_line("a").replace(b'"hello"', b"9" * 5000),
            1,
            "invalid_json_line",
            id="huge integer",
            marks=SLOW,
        ),
        pytest.param(
            make_line("a").replace(b'"a"', b'"\\ud800"'),
            1,
            "invalid_json_line",
            id="lone surrogate",
            marks=SLOW,
        ),
        pytest.param(GOOD + GOOD, 4, "duplicate_custom_id", id="duplicates", marks=SLOW),
        pytest.param(b"\x00" * 5000, 1, "invalid_json_line", id="zeros", marks=SLOW),
    ],
)
def test_bad_line_is_named(folder: Folder, content: bytes, line: int | None, code: str) -> None:
    ended = folder.run_file(content)
    ended.assert_problem(line, code)
    assert not (folder / "out.jsonl").exists()


def test_model_that_lines_name_and_nobody_has_is_named_with_those_there_are(
    folder: Folder,
) -> None:
    name = folder.write("in.jsonl", make_line("a", model="simulatd"))
    ended = folder.run(name, "--output", "out.jsonl")
    ended.assert_problem(1, "model_not_found")
    assert "Did you mean 'simulated'?" in ended.stderr


def test_long_line_costs_no_memory(folder: Folder) -> None:
    with (folder / "in.jsonl").open("wb") as file:
        file.write(make_line("a") + b'\n{"custom_id":"')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + make_line("b"))
    ended, peak_bytes = run_measured(folder, "in.jsonl", "--model", "simulated")
    ended.assert_problem(2, "line_too_long")
    assert peak_bytes < 400 * 2**20


def run_measured(folder: Folder, *arguments: str) -> tuple[Ended, int]:
    """Run, and return the most memory that any process of the run was seen to have had.

    From VmHWM, since what wait4 says of a child includes the test process it was forked from.
    """
    stdout, stderr = folder.path / "stdout", folder.path / "stderr"
    peak_bytes = 0
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = psutil.Popen(
            folder.command(*arguments),
            cwd=folder.path,
            env=folder.environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        while process.poll() is None:
            for one in [process, *process.children(recursive=True)]:
                peak_bytes = max(peak_bytes, high_water_bytes(one.pid))
            time.sleep(0.02)
    return Ended(process.returncode, stdout.read_text(), stderr.read_text()), peak_bytes


def high_water_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


# --- commands that name the wrong thing ---


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nothing.jsonl",), 5, ["nothing.jsonl", "no file"]),
        ((".",), 3, ["is a folder", "name a file"]),
        (("utf16.jsonl",), 3, ["UTF-16", "save it as UTF-8"]),
        (("in.jsonl", "--model", "nobody"), 5, ["nobody", "simulated"]),
        pytest.param(("in.jsonl", "--model", "."), 3, ["config.json"], marks=SLOW),
        pytest.param(
            ("in.jsonl", "--endpoint", "/v1/moderations"), 3, ["/v1/chat/completions"], marks=SLOW
        ),
        (("in.jsonl", "--output", "."), 3, ["is a folder", "name a file"]),
        (("in.jsonl", "--output", "no/out.jsonl"), 3, ["no/out.jsonl", "does not exist"]),
        (("in.jsonl", "--output", "/proc/out.jsonl"), 3, ["/proc/out.jsonl", "another folder"]),
        pytest.param(
            ("in.jsonl", "--errors", "/proc/err.jsonl"),
            3,
            ["/proc/err.jsonl", "another folder"],
            marks=SLOW,
        ),
        (("in.jsonl", "--output", "./in.jsonl"), 3, ["is the input", "--output"]),
        (("in.jsonl", "--output", "o", "--errors", "in.jsonl"), 3, ["is the input", "--errors"]),
        pytest.param(
            ("x.errors.jsonl", "--output", "x.jsonl"), 3, ["is the input", "--errors"], marks=SLOW
        ),
        (("in.jsonl", "--output", "o", "--errors", "./o"), 3, ["choose two files"]),
        (("in.jsonl", "--schema", "list.json"), 3, ["list.json"]),
        pytest.param(
            ("in.jsonl", "--schema", "broken.json"), 3, ["broken.json", "JSON"], marks=SLOW
        ),
        (("table.csv",), 3, ["--prompt"]),
        pytest.param(("records.jsonl",), 3, ["--prompt"], marks=SLOW),
        (("in.jsonl", "--data", "in.jsonl"), 6, ["--data"]),
        (("-", "--resume"), 2, ["standard input", "--resume"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistake_is_said_before_anything_runs(
    folder: Folder, arguments: tuple[str, ...], code: int, said: list[str]
) -> None:
    for name, content in (
        ("in.jsonl", GOOD),
        ("x.errors.jsonl", GOOD),
        ("utf16.jsonl", GOOD.decode().encode("utf-16")),
        ("list.json", b"[1]"),
        ("broken.json", b"{"),
        ("table.csv", b"id,text\n1,hello\n"),
        ("records.jsonl", b'{"text":"hello"}\n'),
    ):
        folder.write(name, content)
    given = arguments if "--model" in arguments else (*arguments, "--model", "simulated")
    ended = folder.run(*given)
    ended.assert_refused(code, *said)
    assert ended.stdout == ""
    assert "planning" not in ended.stderr
    assert (folder / "in.jsonl").read_bytes() == GOOD


def test_schema_file_that_is_no_schema_is_refused(folder: Folder) -> None:
    folder.write("schema.json", b'{"type":"nothing"}')
    folder.run_file(GOOD, "--schema", "schema.json").assert_refused(3, "schema")


def test_folder_that_may_not_be_written_is_said_at_once(folder: Folder) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; /proc stands in for it above")
    locked = folder / "locked"
    locked.mkdir(mode=0o555)
    name = folder.write("in.jsonl", GOOD)
    ended = folder.run(name, "--model", "simulated", "--output", "locked/out.jsonl")
    ended.assert_refused(3, "locked/out.jsonl", "Permission denied")


def test_disk_that_is_full_at_the_end_keeps_the_answers(folder: Folder) -> None:
    name = folder.write("in.jsonl", GOOD)
    full = folder.run(name, "--model", "simulated", "--output", "/dev/full")
    full.assert_refused(6, "/dev/full", "No space left", "--resume")
    again = folder.run(name, "--model", "simulated", "--output", "out.jsonl", "--resume")
    assert again.code == 0, again.stderr
    assert "planning" not in again.stderr, "nothing is run again"
    assert folder.ids() == ["r0", "r1", "r2"]


# --- engines that cannot work ---


def test_engine_that_is_configured_badly_is_one_line(folder: Folder) -> None:
    folder.options = {"ledger": "/proc/ledger"}
    folder.run_file(GOOD).assert_refused(9, "ledger")


def test_run_of_another_process_is_left_alone(folder: Folder) -> None:
    folder.options = {"step_seconds": 60.0}
    name = folder.write("in.jsonl", GOOD)
    arguments = (name, "--model", "simulated", "--output", "out.jsonl")
    with subprocess.Popen(
        folder.command(*arguments),
        cwd=folder.path,
        env=folder.environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as first:
        try:
            await_true(lambda: any((folder / "data" / "runs").glob("*-*/lock")))
            folder.run(*arguments).assert_refused(8, str(first.pid))
        finally:
            for process in [*psutil.Process(first.pid).children(), psutil.Process(first.pid)]:
                process.kill()
