"""Paths, folders and what a terminal obeys: rows 9, 34 and 36 of the security table."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typing_extensions import override

from jobs.app import open_app, server_folder
from jobs.cli import output
from jobs.cli.rundir import RunPlan, create
from jobs.embedded import FolderLock
from jobs.settings import Settings
from storage.blobs import open_blobs
from storage.blobs.base import BlobStore
from storage.config import BlobSettings
from tests.builders import make_lines

BAD_KEYS = [
    *("", "/", "//", ".", "..", "../x", "a/../b", "a/../../x", "/etc/passwd", "a//b", "a/", "./a"),
    *("a\0b", "a\nb", "a\x1bb", "a\\..\\b", "\x7f", "files/..", "files/../../x"),
]
ODD_KEYS = ["CON", "files/NUL", "~root", "-rf", "%2e%2e%2f", "日" * 80, "a b", "$(x)", "..a", "a.."]


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobStore]:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text("secret")
    with open_blobs(BlobSettings(), tmp_path / "data") as opened:
        yield opened


def all_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# --- row 9: storage keys ---


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_row_9_a_key_that_leads_elsewhere_is_refused_by_everything_that_takes_one(
    blobs: BlobStore, tmp_path: Path, key: str
) -> None:
    before = all_below(tmp_path)
    for call in (
        lambda: blobs.put(key, b"x"),
        lambda: blobs.put(key, b"x", if_absent=True),
        lambda: blobs.get(key),
        lambda: blobs.open_writer(key),
        lambda: blobs.open_reader(key),
        lambda: blobs.get_size(key),
        lambda: blobs.exists(key),
        lambda: blobs.delete(key),
    ):
        with pytest.raises(ValueError, match="is not a blob key"):
            call()
    assert all_below(tmp_path) == before


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_row_9_a_key_with_an_odd_name_is_a_file_of_that_name(blobs: BlobStore, key: str) -> None:
    blobs.put(key, b"x")
    assert blobs.get(key) == b"x"
    assert list(blobs.list_keys()) == [key]


def test_row_9_no_link_leads_out_of_the_folder_for_reading_or_writing(
    blobs: BlobStore, tmp_path: Path
) -> None:
    root = tmp_path / "data" / "blobs"
    (root / "files").mkdir()
    (root / "files" / "link").symlink_to(tmp_path / "secret")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    for key in ("files/link", "out/secret", "out/new", "loop"):
        for call in (
            lambda key=key: blobs.get(key),
            lambda key=key: blobs.put(key, b"x"),
            lambda key=key: blobs.open_writer(key),
            lambda key=key: blobs.delete(key),
        ):
            with pytest.raises(ValueError, match="leads out"):
                call()
    assert (tmp_path / "secret").read_text() == "secret"
    assert not (tmp_path / "new").exists()


# --- row 36: who may look at the data ---


def test_row_36_folders_made_for_data_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        settings = Settings(data=tmp_path / "data", engine="simulated")
        plan = RunPlan(
            input_name="in.jsonl",
            endpoint="/v1/chat/completions",
            model="simulated",
            on_unsupported_schema="validate",
            options={},
        )
        held = create(settings.data / "runs", settings, plan, iter([make_lines(1)]))
        with ExitStack() as stack:
            stack.enter_context(held.lock)
            stack.enter_context(open_app(settings, folder=server_folder(settings)))
            stack.enter_context(FolderLock(tmp_path / "locked"))
            stack.enter_context(open_blobs(BlobSettings(), tmp_path / "elsewhere"))
            made = [
                *(settings.data / "runs", held.folder, settings.data / "server"),
                *(settings.data / "server" / "blobs", tmp_path / "locked"),
                *(tmp_path / "elsewhere" / "blobs", tmp_path / "elsewhere" / "blobs" / ".tmp"),
            ]
            assert {path: oct(stat.S_IMODE(path.stat().st_mode)) for path in made} == dict.fromkeys(
                made, "0o700"
            )
    finally:
        os.umask(before)


def test_row_36_a_folder_that_somebody_shared_on_purpose_stays_shared(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o770)
    with open_app(Settings(data=tmp_path), folder=shared):
        assert stat.S_IMODE(shared.stat().st_mode) == 0o770


# --- row 34: what a terminal obeys ---

ESCAPES = [
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;cm0gLXJmIH4=\x07",
    "\x1bP+q544e\x1b\\",
    "\x1b_Gf=100;AAAA\x1b\\",
    "\x9b31m",
    "\x9d0;x\x9c",
    "\x1bc",
    "\x1b(0",
    "\x08\x08\x08",
    "\r",
    "\x07",
    "\x00",
    "\u202etxt.exe",
    "\u2066x\u2069",
    "\u200b",
    "\x1b",
    "\x1b[",
    "\x1b]no end",
]
OBEYED = [*map(chr, range(0x09)), "\r", "\x1b", "\x7f", *map(chr, range(0x80, 0xA0)), "\u202e"]


class Terminal(io.StringIO):
    """Standard output as a person has it."""

    @override
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("escape", ESCAPES, ids=ascii)
def test_row_34_nothing_that_somebody_else_wrote_reaches_a_terminal_as_a_command(
    escape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"before{escape}after"
    output.say(text)
    output.report(text)
    output.print_fields([("name", text), (output.one_line(text), "x")])
    output.print_table(("id", "~message"), [(text, text)])
    output.print_problems([(1, text, text, text)])
    output.print_json({text: text})
    output.print_json_line([text])
    shown = capsys.readouterr()
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    content = ('{"custom_id":"' + text + '"}').encode("utf-8", "surrogatepass")
    output.write_line(content, flush=True)
    output.write_pieces([content[:9], content[9:]])
    for written in (shown.out, shown.err, terminal.getvalue()):
        assert not [character for character in OBEYED if character in written]


def test_row_34_lines_of_results_have_their_controls_escaped() -> None:
    from jobs.domain.result import Result, render_result  # noqa: PLC0415 - of this test only

    line = render_result(
        Result(id=1, text="\x1b[2J\r\n\0<script>\u2028"),
        custom_id="\x1b]0;x\x07\n",
        request_id="1",
        endpoint="/v1/chat/completions",
        model="m",
        created=1,
    )
    assert not any(byte < 0x20 or byte == 0x7F for byte in line), "one line, whatever is in it"
