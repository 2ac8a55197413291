import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from jobs.cli import exits, output
from jobs.cli.main import app
from jobs.domain.errors import (
    BatchctlError,
    Conflict,
    DatabaseUnavailable,
    EngineMisconfigured,
    InvalidInput,
    NotFound,
)

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\x9b2J\u202eevil\x00\x08\r"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name.startswith(("BATCHCTL_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BATCHCTL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BATCHCTL_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def invoke(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, args, input=stdin, prog_name="batchctl")


def request_line(custom_id: str = "a", **more: Any) -> str:  # noqa: ANN401
    body = {"model": "simulated", "messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps({**line, **more})


def assert_one_line(result: Result, code: int, *said: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for part in said:
        assert part in result.stderr


# --- errors and exit codes ---


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("nothing",), exits.USAGE, ("No such command", "batchctl --help")),
        (("list", "--wrong"), exits.USAGE, ("--wrong", "batchctl list --help")),
        (("submit",), exits.USAGE, ("INPUT", "batchctl submit --help")),
        (("submit", "in.jsonl", "--metadata", "x"), exits.USAGE, ("--metadata", "KEY=VALUE")),
        (("submit", "in.jsonl", "--system", "x"), exits.USAGE, ("--system", "--prompt")),
        (("submit", "in.jsonl", "--output", "x"), exits.USAGE, ("--wait",)),
        (("submit", "x", "--wait", "-o", "./x"), exits.USAGE, ("--output", "the input")),
        (("submit", "x", "--wait", "-o", "a", "-e", "./a"), exits.USAGE, ("--errors",)),
        (("submit", "x", "--idempotency-key", "L\u00e4ufe"), exits.USAGE, ("ASCII",)),
        (("files", "upload", "x", "--idempotency-key", ""), exits.USAGE, ("ASCII",)),
        (("run", "x", "--quantization", "nf4"), exits.USAGE, ("--quantization", "--model")),
        (("serve", "--no-workers"), exits.USAGE, ("needs a Postgres",)),
        (("submit", "in.jsonl"), exits.NOT_FOUND, ("There is no file in.jsonl",)),
        (("submit", "."), exits.REFUSED, ("is a folder",)),
        (("list",), exits.UNREACHABLE, ("Is `batchctl serve` running at http://127.0.0.1:9?",)),
        (("list", "--base-url", "ftp://x"), exits.USAGE, ("base_url", "http://")),
        (("list", "--config", "no.toml"), exits.NOT_FOUND, ("no.toml",)),
        (("results", "b", "--output", "no/x"), exits.REFUSED, ("no/x",)),
        (("results", "b", "--follow", "--output", "x"), exits.USAGE, ("--follow",)),
        (("validate", "no.jsonl"), exits.NOT_FOUND, ("no.jsonl",)),
        (("serve", "--host", "0.0.0.0"), exits.USAGE, ("api_key",)),  # noqa: S104
        (("files", "upload", "."), exits.REFUSED, ("is a folder",)),
        (("files", "download", "f", "--json"), exits.USAGE, ("--output",)),
    ],
)
def test_mistake_is_one_line_and_a_code(
    args: tuple[str, ...], code: int, said: tuple[str, ...]
) -> None:
    assert_one_line(invoke(*args), code, *said)


def test_wrong_setting_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHCTL_SERVER__PROT", "1")
    assert_one_line(invoke("config", "show"), exits.USAGE, "BATCHCTL_SERVER__PROT")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_says_so(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.touch(mode=0)
    assert_one_line(invoke("submit", "in.jsonl"), exits.REFUSED, "Permission denied")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("x"), exits.NOT_FOUND),
        (InvalidInput("x"), exits.REFUSED),
        (InvalidInput("x", param="settings"), exits.USAGE),
        (InvalidInput("x", param="BATCHCTL_FOO"), exits.USAGE),
        (Conflict("x"), exits.CONFLICT),
        (DatabaseUnavailable("x"), exits.UNREACHABLE),
        (EngineMisconfigured("x"), exits.ENGINE),
        (BatchctlError("x"), exits.INTERNAL),
    ],
)
def test_every_kind_of_error_has_its_code(error: BatchctlError, code: int) -> None:
    assert exits.for_error(error) == code


@pytest.mark.parametrize(
    ("status", "failed", "code"),
    [
        ("completed", 0, exits.OK),
        ("completed", 1, exits.PARTIAL),
        ("failed", 0, exits.REFUSED),
        ("cancelled", 3, exits.STOPPED),
        ("expired", 3, exits.STOPPED),
    ],
)
def test_ending_of_a_batch_has_its_code(status: str, failed: int, code: int) -> None:
    assert exits.for_batch(status, failed=failed) == code


def _run(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


_BREAK = """
import jobs.cli.main as m
import typer
@m.app.command("break")
def broken():
    from jobs.cli import options
    options.load_settings(None)
    raise {what}
m.main()
"""


def test_unforeseen_error_is_one_line_with_the_way_to_more() -> None:
    done = _run(_BREAK.format(what="ZeroDivisionError('boom\\x1b[31m')"), "break")
    assert done.returncode == exits.INTERNAL
    assert done.stderr == (
        "error: ZeroDivisionError: boom (set BATCHCTL_LOG__LEVEL=debug for the traceback)\n"
    )
    debug = _run(
        _BREAK.format(what="ZeroDivisionError('boom')"), "break", BATCHCTL_LOG__LEVEL="debug"
    )
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.endswith("error: ZeroDivisionError: boom\n")


def test_interrupt_is_quiet_and_has_its_code() -> None:
    done = _run(_BREAK.format(what="KeyboardInterrupt"), "break")
    assert (done.returncode, done.stderr) == (exits.INTERRUPTED, "Interrupted.\n")


def test_reader_that_goes_away_is_quiet() -> None:
    code = "import sys; from jobs.cli.main import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "config", "show"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    with child.stderr:
        assert child.stderr.read() == b""
    assert child.wait(30) == exits.BROKEN_PIPE


# --- commands that need no server ---


def test_version_and_help() -> None:
    assert invoke("--version").stdout.startswith("batchctl ")
    shown = invoke("--help")
    assert shown.exit_code == exits.OK
    for command in ("submit", "watch", "results", "validate", "serve", "files", "config", "db"):
        assert command in shown.stdout
    assert invoke().exit_code == exits.USAGE


def test_every_command_explains_itself() -> None:
    for command in (
        "run",
        "submit",
        "results",
        "serve",
        "files upload",
        "config show",
        "db upgrade",
    ):
        shown = invoke(*command.split(), "--help")
        assert shown.exit_code == exits.OK
        assert "--json" in shown.stdout


def test_config_shows_where_values_come_from(tmp_path: Path) -> None:
    (tmp_path / "batchctl.toml").write_text('api_key = "sesame"\n[server]\nport = 1\n')
    shown = json.loads(invoke("config", "show", "--origin", "--json").stdout)
    assert shown["server.port"] == {"value": "1", "origin": "file:batchctl.toml"}
    assert shown["data"]["origin"] == "env:BATCHCTL_DATA"
    assert "sesame" not in json.dumps(shown)
    lines = invoke("config", "show").stdout.splitlines()
    assert "server.port\t1" in lines


def test_models_lists_the_catalogue_and_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "batchctl.toml").write_text('[models.lost]\nengine = "hf"\n')
    shown = {one["id"]: one for one in json.loads(invoke("models", "--json").stdout)}
    assert next(iter(shown)) == "demo"
    assert shown["simulated"]["engine"] == "simulated"
    assert shown["demo"]["default"] is True
    assert shown["lost"]["problem"]
    assert "demo" in invoke("models").stdout


def test_models_says_which_files_are_not_there_and_asks_no_hub(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "batchctl.toml").write_text(
        '[models.gone]\nsource = "./gone"\n[models.empty]\nsource = "./empty"\n'
        '[models.hub]\nsource = "nobody/nothing"\nengine = "hf"\n'
    )
    shown = {one["id"]: one["problem"] for one in json.loads(invoke("models", "--json").stdout)}
    assert "no folder" in shown["gone"]
    assert "no config.json" in shown["empty"]
    assert shown["hub"] is None
    assert shown["demo"] is None


def test_db_upgrade_can_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        shown = invoke("db", "upgrade", "--json")
        assert shown.exit_code == exits.OK, shown.output
        assert json.loads(shown.stdout)["upgraded"] is True
    assert (tmp_path / "data" / "server" / "batchctl.sqlite3").exists()


def test_db_upgrade_of_a_wrong_url_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHCTL_DATABASE__URL", "nonsense://u:secret@h/d")
    shown = invoke("db", "upgrade")
    assert_one_line(shown, exits.UNREACHABLE, "nonsense")
    assert "secret" not in shown.stderr


def test_validate_accepts_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{request_line('a')}\n\n{request_line('b')}")
    shown = invoke("validate", "in.jsonl")
    assert (shown.exit_code, shown.stderr) == (exits.OK, "Good: 2 requests for simulated.\n")
    told = json.loads(invoke("validate", "in.jsonl", "--json").stdout)
    assert (told["ok"], told["requests"], told["errors"]) == (True, 2, [])
    assert not (tmp_path / "data").exists()


def test_validate_lists_every_bad_line(tmp_path: Path) -> None:
    rows = [
        request_line("a"),
        "{bad",
        request_line("a"),
        request_line("c", url="/v1/x"),
        request_line("d", body={"model": f"no{HOSTILE}", "messages": []}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    shown = invoke("validate", "in.jsonl", "--json")
    assert shown.exit_code == exits.REFUSED
    told = json.loads(shown.stdout)
    assert {one["line"] for one in told["errors"]} == {2, 3, 4, 5}
    assert told["num_errors"] >= 4
    table = invoke("validate", "in.jsonl")
    assert table.stdout.splitlines()[0].split("\t") == ["LINE", "CODE", "PARAM", "MESSAGE"]
    assert not set(table.output) & set("\x1b\x9b\u202e\x00\x08")
    limited = invoke("validate", "in.jsonl", "--max-errors", "1")
    assert "not listed" in limited.stderr


def test_validate_names_the_models_of_lines_of_several_kinds(tmp_path: Path) -> None:
    text = {"model": "demo", "prompt": "hi"}
    rows = [request_line("a"), request_line("b", url="/v1/completions", body=text)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    (error,) = json.loads(invoke("validate", "in.jsonl", "--json").stdout)["errors"]
    assert (error["line"], error["code"]) == (2, "invalid_url")
    mixed = ("validate", "in.jsonl", "--endpoint", "mixed")
    shown = invoke(*mixed)
    assert (shown.exit_code, shown.stderr) == (exits.OK, "Good: 2 requests for simulated, demo.\n")
    told = json.loads(invoke(*mixed, "--json").stdout)
    assert (told["endpoint"], told["model"], told["models"]) == (
        "mixed",
        None,
        ["simulated", "demo"],
    )


def test_lines_made_by_a_prompt_are_all_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\nx\n")
    shown = invoke("validate", "in.csv", "--prompt", "Say {text}", "--endpoint", "mixed")
    assert_one_line(shown, exits.USAGE, "--endpoint", "--prompt")


def test_validate_checks_what_a_prompt_makes(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text\na,x\na,y\n")
    shown = invoke("validate", "in.csv", "--prompt", "Say {text}", "--model", "simulated", "--json")
    (error,) = json.loads(shown.stdout)["errors"]
    assert (error["line"], error["code"]) == (3, "duplicate_custom_id")


def test_validate_reads_standard_input() -> None:
    shown = invoke("validate", "-", "--prompt", "{a}", "--model", "simulated", stdin="a\n1\n2\n")
    assert (shown.exit_code, shown.stderr) == (exits.OK, "Good: 2 requests for simulated.\n")


def test_schema_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(request_line())
    (tmp_path / "s.json").write_text("[1")
    assert_one_line(invoke("validate", "in.jsonl", "--schema", "s.json"), exits.REFUSED, "s.json")
    assert_one_line(
        invoke("validate", "in.jsonl", "--output-type", "nowhere:X"), exits.REFUSED, "nowhere"
    )


# --- what is shown ---


def test_text_loses_what_a_terminal_would_obey() -> None:
    assert output.clean(HOSTILE) == "redevil"
    assert output.clean("a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\b\tc\nd") == "alinkb\tc\nd"
    assert output.one_line("a\nb\t\x1b[2J c") == "a b c"


def test_json_stays_json_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"name": HOSTILE, "\ud800": "é"}
    output.print_json(value)
    shown = capsys.readouterr().out
    assert json.loads(shown) == value
    assert not set(shown) & set(HOSTILE) - set("redownil]0;[31m2Jv ")
    assert "é" in shown


def test_numbers_for_people() -> None:
    assert [output.size(n) for n in (0, 999, 1500, 2_000_000_000, 5e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 GB",
        "5000.0 TB",
    ]
    assert [output.duration(n) for n in (0, 59.4, 60, 3725)] == ["0s", "59s", "1m00s", "1h02m"]
    assert output.count(1234567) == "1,234,567"


def test_progress_off_a_terminal_is_a_line_for_each_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with output.BatchProgress() as progress:
        progress.update(total=None, completed=0, phase="planning")
        progress.update(total=10, completed=0, phase="running")
        progress.update(total=10, completed=3, failed=1, completion_tokens=50)
        progress.update(total=10, completed=9, failed=1, phase="completed")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[:2] == ["planning", "running: 0/10 requests"]
    assert shown.err.splitlines()[-1].startswith("completed: 10/10 requests")
    assert "1 failed" in shown.err


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with output.BatchProgress(quiet=True) as progress:
        progress.update(total=1, completed=1)
    assert capsys.readouterr().err == ""


def test_table_never_cuts_an_id_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Console(force_terminal=True, width=80, markup=False, highlight=False)
    monkeypatch.setattr(output, "out", terminal)
    batch_id = "batch_" + "0" * 32
    output.print_table(
        ("batch", "status", ">done", ">failed", "created", "?model", "~name"),
        [(batch_id, "in_progress", "1/2", 0, "10:00:00", "a-long-model-name", f"x{HOSTILE}" * 9)],
    )
    shown = capsys.readouterr().out
    assert batch_id in shown
    assert "model" not in shown
    plain = output.clean(shown)
    assert max(map(len, plain.splitlines())) <= 80


# --- models ---


def test_models_quantize_writes_a_folder_that_the_catalogue_takes() -> None:
    made = invoke("models", "quantize", "demo", "small/four", "--json")
    assert made.exit_code == exits.OK, made.output
    told = json.loads(made.stdout)
    assert (told["quantization"], told["compute_dtype"]) == ("nf4", "bfloat16")
    stored = Path("small/four/model.safetensors").stat().st_size
    assert told["stored_bytes"] == stored < told["source_bytes"] / 2
    assert Path(told["folder"]) == Path("small/four").absolute()
    assert made.stderr.splitlines() == [
        line for line in made.stderr.splitlines() if line.endswith(" ...")
    ]
    assert_one_line(
        invoke("models", "quantize", "demo", "small/four"), exits.CONFLICT, "is not empty"
    )
    assert_one_line(
        invoke("models", "quantize", "demo", "other", "--quantization", "int4"),
        exits.REFUSED,
        "nf4, fp4, int8, not to int4",
    )
    assert [path.name for path in Path("small").iterdir()] == ["four"]
    assert not Path("other").exists()


def test_models_lists_as_before_it_had_commands() -> None:
    found = json.loads(invoke("models", "--json").stdout)
    assert [one["id"] for one in found] == ["demo", "simulated"]
    assert invoke("models").stdout.startswith("MODEL\t")
