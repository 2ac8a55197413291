"""What `batchctl run` does beside what earlier runs have left."""

from pathlib import Path

import pytest

from tests.builders import make_line, make_lines
from tests.integration.runs import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_resume_after_a_change_of_the_catalogue_names_the_setting(folder: Folder) -> None:
    name = folder.write("in.jsonl", make_lines(3))
    assert folder.run(name, "-o", "out.jsonl").code == 0
    folder.options = {"reply_tokens": 9}
    ended = folder.run(name, "-o", "out.jsonl", "--resume")
    ended.assert_refused(3, "settings.models.simulated.options.reply_tokens (then 4, now 9)")
    folder.options, folder.settings = {}, {"BATCHCTL_HF__QUANTIZATION": "nf4"}
    ended = folder.run(name, "-o", "out.jsonl", "--resume")
    ended.assert_refused(3, "settings.hf.quantization (then unset, now nf4)")
    folder.settings = {"BATCHCTL_HF__TOKEN": "secret", "HF_HOME": str(folder.path)}
    assert folder.run(name, "-o", "out.jsonl", "--resume").code == 0


def test_message_of_another_model_is_short(folder: Folder) -> None:
    assert folder.run_file(make_lines(3)).code == 0
    ended = folder.run("in.jsonl", "-o", "out.jsonl", "--resume")
    ended.assert_refused(3, "model (then simulated, now unset)")
    assert "reply_tokens" not in ended.stderr


def test_engine_of_the_settings_holds_where_no_flag_says(folder: Folder) -> None:
    name = folder.write("in.jsonl", make_lines(1))
    folder.settings = {"BATCHCTL_ENGINE": "simulated"}
    ended = folder.run(name, "--model", "anything", "-o", "out.jsonl")
    assert ended.code == 0, ended.stderr


def test_error_file_of_an_earlier_run_stays_and_is_told(folder: Folder) -> None:
    assert folder.run_file(make_line("bad", "[[fault=error]]")).code == 4
    earlier = (folder / "out.errors.jsonl").read_bytes()
    ended = folder.run_file(make_lines(1))
    assert ended.code == 0
    assert "out.errors.jsonl is of an earlier run" in ended.stderr
    assert (folder / "out.errors.jsonl").read_bytes() == earlier


def test_standard_input_cannot_be_resumed_and_a_file_of_it_can(folder: Folder) -> None:
    arguments = ("--model", "simulated", "-o", "out.jsonl")
    folder.options = {"ledger": str(folder / "ledger")}
    assert folder.run("-", *arguments, stdin=make_lines(2)).code == 0
    ended = folder.run("-", *arguments, "--resume", stdin=make_lines(2))
    assert ended.code == 2
    assert "save the same lines to a file" in " ".join(ended.stderr.split())
    generated = (folder / "ledger").stat().st_size
    assert folder.run(folder.write("in.jsonl", make_lines(2)), *arguments, "--resume").code == 0
    assert (folder / "ledger").stat().st_size == generated
