import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import exits
from jobs.cli.main import app


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BATCHCTL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BATCHCTL_DATABASE__URL", "postgresql://u:hunter2@127.0.0.1:1/d")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, args, prog_name="batchctl")


def assert_refused(shown: Result, code: int, said: str) -> None:
    assert (shown.exit_code, shown.stdout) == (code, "")
    assert shown.stderr.startswith("error: ")
    assert shown.stderr.count("\n") == 1
    assert said in shown.stderr
    assert "hunter2" not in shown.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gpus", "0"), "There is no GPU 0 on this machine"),
        (("--gpus", "first"), "should be all, none, or indices"),
        (("--models", "demo,dmo"), "'dmo'"),
        (("--role", "boss"), "boss"),
        (("--engines", "0"), "engines"),
    ],
)
def test_what_cannot_be_started_is_one_line(flags: tuple[str, ...], said: str) -> None:
    assert_refused(invoke("worker", *flags), exits.USAGE, said)


def test_workers_without_a_shared_database_say_what_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BATCHCTL_DATABASE__URL")
    assert_refused(invoke("worker"), exits.USAGE, "Workers need a Postgres")


def test_workers_of_a_server_that_is_not_there() -> None:
    shown = invoke("workers", "--base-url", "http://127.0.0.1:9")
    assert shown.exit_code == exits.UNREACHABLE
