"""The commands against a real `batchctl serve` with the simulated engine."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jobs.cli import exits

_MAIN = (sys.executable, "-m", "jobs.cli.main")
_SECONDS = 120


def _environment(**more: str) -> dict[str, str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BATCHCTL_", "HF_", "LLM_"))
    }
    return {
        **clean,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "BATCHCTL_LEASES__TIMING_PROFILE": "fast",
        **more,
    }


class Server(NamedTuple):
    url: str
    folder: Path
    key: str

    def run(self, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*_MAIN, *args],
            input=stdin,
            capture_output=True,
            check=False,
            cwd=self.folder,
            timeout=_SECONDS,
            env=_environment(BATCHCTL_BASE_URL=self.url, BATCHCTL_API_KEY=self.key),
        )

    def json(self, *args: str, code: int = exits.OK, stdin: bytes = b"") -> Any:  # noqa: ANN401
        done = self.run(*args, "--json", stdin=stdin)
        assert done.returncode == code, done
        assert done.stderr == b"", done.stderr
        return json.loads(done.stdout)

    def start(self, *args: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*_MAIN, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=_environment(BATCHCTL_BASE_URL=self.url, BATCHCTL_API_KEY=self.key),
        )


@contextlib.contextmanager
def serving(folder: Path, *args: str, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the URL and the process of a server on a free port."""
    (folder / "slow.toml").write_text(
        '[models.slow]\nengine = "simulated"\n[models.slow.options]\nslots = 8\n'
    )
    child = subprocess.Popen(
        [*_MAIN, "serve", "--port", "0", "--data", str(folder / "data"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=_environment(**({"BATCHCTL_API_KEY": key} if key else {})),
    )
    assert child.stdout is not None
    ready = child.stdout.readline()
    found = re.search(r"http://[\d.:]+", ready)
    if found is None:
        child.kill()
        pytest.fail(f"not ready: {ready} {child.communicate()}")
    try:
        yield found[0], child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            raise


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--config", "slow.toml", key="sesame") as (url, _):
        yield Server(url, folder, "sesame")


def request_line(custom_id: str, text: str = "hello", model: str = "simulated") -> str:
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": text}]}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line)


def write_input(server: Server, name: str, lines: Iterable[str]) -> str:
    (server.folder / name).write_text("".join(f"{line}\n" for line in lines))
    return name


def ids_in(data: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in data.splitlines()]


def test_submit_and_wait_writes_the_answers(server: Server) -> None:
    name = write_input(server, "in.jsonl", (request_line(f"r{n}") for n in range(50)))
    done = server.run(
        "submit", name, "--wait", "--output", "out.jsonl", "--errors", "err.jsonl",
        "--metadata", "who=me", "--priority", "3",
    )  # fmt: skip
    assert done.returncode == exits.OK, done.stderr
    assert ids_in((server.folder / "out.jsonl").read_bytes()) == [f"r{n}" for n in range(50)]
    assert (server.folder / "err.jsonl").read_bytes() == b""
    said = done.stderr.decode()
    assert "completed: 50/50 requests" in said
    assert b"\x1b" not in done.stdout + done.stderr
    fields = dict(line.split("  ", 1) for line in done.stdout.decode().splitlines())
    assert fields["status"].strip() == "completed"
    assert fields["metadata who"].strip() == "me"


def test_same_file_is_a_new_batch_unless_a_key_says_otherwise(server: Server) -> None:
    name = write_input(server, "same.jsonl", [request_line("a")])
    first, second = (server.json("submit", name) for _ in range(2))
    assert first["id"] != second["id"]
    keyed = [server.json("submit", name, "--idempotency-key", "k") for _ in range(2)]
    assert keyed[0]["id"] == keyed[1]["id"]
    write_input(server, "same.jsonl", [request_line("b")])
    changed = server.run("submit", name, "--idempotency-key", "k")
    assert changed.returncode == exits.CONFLICT, changed.stderr
    assert changed.stderr.count(b"\n") == 1


def test_failed_requests_have_their_own_code(server: Server) -> None:
    lines = [request_line("good"), request_line("long", "word " * 20_000)]
    name = write_input(server, "some.jsonl", lines)
    ended = server.json("submit", name, "--wait", code=exits.PARTIAL)
    assert ended["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    written = server.json("results", ended["id"], "-o", "some.out", "-e", "some.err")
    assert set(written) == {"output", "errors"}
    assert ids_in((server.folder / "some.err").read_bytes()) == ["long"]
    shown = server.run("results", ended["id"])
    assert sorted(ids_in(shown.stdout)) == ["good", "long"]


def test_refused_input_lists_its_lines(server: Server) -> None:
    name = write_input(server, "bad.jsonl", [request_line("a"), "{", request_line("a")])
    done = server.run("submit", name, "--wait")
    assert done.returncode == exits.REFUSED
    rows = [line.split("\t") for line in done.stdout.decode().splitlines() if "\t" in line]
    assert [row[:2] for row in rows[1:]] == [
        ["2", "invalid_json_line"],
        ["3", "duplicate_custom_id"],
    ]
    batch_id = server.json("list", "--status", "failed", "--limit", "1")[0]["id"]
    assert server.json("status", batch_id)["errors"]["num_errors"] == 2
    assert server.run("watch", batch_id).returncode == exits.REFUSED


def test_table_with_a_prompt_and_a_schema(server: Server) -> None:
    (server.folder / "people.csv").write_text("id,text\nx,Ann\ny,Bob\n")
    (server.folder / "schema.json").write_text('{"type": "object"}')
    ended = server.json(
        "submit", "people.csv", "--prompt", "Who is {text}?", "--schema", "schema.json",
        "--model", "simulated", "--wait", "--output", "people.out",
    )  # fmt: skip
    assert ended["request_counts"]["completed"] == 2
    answers = [json.loads(line) for line in (server.folder / "people.out").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["x", "y"]
    for answer in answers:
        text = answer["response"]["body"]["choices"][0]["message"]["content"]
        assert isinstance(json.loads(text), dict)


def test_standard_input_can_be_submitted(server: Server) -> None:
    ended = server.json("submit", "-", "--wait", stdin=request_line("piped").encode())
    assert ended["request_counts"]["completed"] == 1


def test_results_are_followed_while_they_come(server: Server) -> None:
    lines = (request_line(f"f{n}", model="slow") for n in range(600))
    batch = server.json("submit", write_input(server, "follow.jsonl", lines))
    reader = server.start("results", batch["id"], "--follow")
    assert reader.stdout is not None
    first = reader.stdout.readline()
    assert server.json("status", batch["id"])["status"] == "in_progress"
    with reader, reader.stdout:
        rest = reader.stdout.read()
    assert reader.returncode == exits.OK
    assert sorted(ids_in(first + rest)) == sorted(f"f{n}" for n in range(600))


def test_watch_as_json_is_a_line_for_each_change(server: Server) -> None:
    lines = (request_line(f"w{n}", model="slow") for n in range(300))
    batch = server.json("submit", write_input(server, "watch.jsonl", lines))
    done = server.run("watch", batch["id"], "--json")
    assert done.returncode == exits.OK
    seen = [json.loads(line)["status"] for line in done.stdout.splitlines()]
    assert seen[-1] == "completed"
    assert len(seen) > 1


def test_interrupted_watch_says_that_the_batch_goes_on_and_cancel_ends_it(server: Server) -> None:
    lines = (request_line(f"c{n}", model="slow") for n in range(5000))
    batch_id = server.json("submit", write_input(server, "cancel.jsonl", lines))["id"]
    watcher = server.start("watch", batch_id)
    assert watcher.stderr is not None
    while b"running" not in watcher.stderr.readline():
        assert watcher.poll() is None
    watcher.send_signal(signal.SIGINT)
    _, said = watcher.communicate(timeout=_SECONDS)
    assert watcher.returncode == exits.INTERRUPTED
    assert f"batchctl watch {batch_id}".encode() in said
    assert b"Traceback" not in said
    early = server.run("results", batch_id, "--output", "early.out")
    assert (early.returncode, early.stderr.count(b"\n")) == (exits.CONFLICT, 1)
    ended = server.json("cancel", batch_id, "--wait")
    assert ended["status"] == "cancelled"
    assert ended["request_counts"]["failed"] > 0
    assert server.run("watch", batch_id).returncode == exits.STOPPED
    assert server.run("cancel", batch_id).returncode == exits.OK


def test_files_go_up_and_down(server: Server) -> None:
    content = os.urandom(300_000)
    (server.folder / "\u202ehostile\x1b[31m.bin").write_bytes(content)
    uploaded = server.json("files", "upload", "\u202ehostile\x1b[31m.bin")
    assert uploaded["bytes"] == len(content)
    file_id = uploaded["id"]
    assert server.run("files", "download", file_id).stdout == content
    server.json("files", "download", file_id, "--output", "down.bin")
    assert (server.folder / "down.bin").read_bytes() == content
    assert file_id in [file["id"] for file in server.json("files", "list")]
    for command in (("files", "list"), ("files", "show", file_id)):
        shown = server.run(*command)
        assert shown.returncode == exits.OK
        assert not set(shown.stdout.decode()) & set("\x1b\u202e")
    assert server.json("files", "delete", file_id) == [{"id": file_id, "deleted": True}]
    gone = server.run("files", "show", file_id)
    assert (gone.returncode, gone.stderr.count(b"\n")) == (exits.NOT_FOUND, 1)


def test_server_lists_its_models_the_demo_model_first(server: Server) -> None:
    names = [model["id"] for model in server.json("models", "--server")]
    assert names[0] == "demo"
    assert {"simulated", "slow"} <= set(names)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("status", "batch_none"), exits.NOT_FOUND, "batch_none"),
        (("results", "batch_none", "--follow"), exits.NOT_FOUND, "batch_none"),
        (("cancel", "../files"), exits.NOT_FOUND, ""),
        (("files", "download", "file-none"), exits.NOT_FOUND, "file-none"),
        (("list", "--api-key", "wrong"), exits.UNREACHABLE, "--api-key"),
        (("submit", "one.jsonl", "--api-key", "wrong"), exits.UNREACHABLE, "BATCHCTL_API_KEY"),
        (
            ("submit", "one.jsonl", "--completion-window", "soon"),
            exits.REFUSED,
            "completion_window",
        ),
        (("submit", "one.jsonl", "--model", "no-such"), exits.NOT_FOUND, "no-such"),
        (("submit", "one.jsonl", "--endpoint", "/v1/x"), exits.REFUSED, "/v1/chat/completions"),
    ],
)
def test_what_the_server_refuses_is_one_line(
    server: Server, args: tuple[str, ...], code: int, said: str
) -> None:
    write_input(server, "one.jsonl", [request_line("a")])
    done = server.run(*args)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1
    assert said in done.stderr.decode()


def test_second_server_on_the_same_folder_or_port_is_one_line(server: Server) -> None:
    data = str(server.folder / "data")
    for args, said in (
        (("--port", "0", "--data", data), "Another batchctl"),
        (("--port", server.url.rsplit(":", 1)[1], "--data", data), "in use"),
    ):
        done = server.run("serve", *args)
        assert done.returncode == exits.CONFLICT
        assert said in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_server_that_is_told_to_stop_goes_on_with_the_batch_later(tmp_path: Path) -> None:
    with serving(tmp_path, "--config", "slow.toml") as (url, child):
        server = Server(url, tmp_path, "")
        lines = (request_line(f"s{n}", model="slow") for n in range(300))
        batch_id = server.json("submit", write_input(server, "stop.jsonl", lines))["id"]
        follower = server.start("results", batch_id, "--follow")
        got: queue.Queue[bytes] = queue.Queue()

        def read() -> None:
            assert follower.stdout is not None
            for line in follower.stdout:
                got.put(line)

        reader = threading.Thread(daemon=True, target=read)
        reader.start()
        got.get(timeout=60)
        child.send_signal(signal.SIGTERM)
        child.wait(60)
        assert child.returncode == 0
    port = url.rsplit(":", 1)[1]
    with serving(tmp_path, "--config", "slow.toml", "--port", port):
        # The follower found the server again, and no line came twice.
        assert follower.wait(_SECONDS) == exits.OK
        reader.join()
        assert server.json("status", batch_id)["request_counts"]["completed"] == 300
    assert follower.stderr is not None
    assert b"trying again" in follower.stderr.read()
    rest = [got.get() for _ in range(got.qsize())]
    assert len(set(rest)) == len(rest) == 299
    for stream in (follower.stdout, follower.stderr):
        assert stream is not None
        stream.close()
