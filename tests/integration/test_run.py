"""`batchctl run` end to end, with the engine that needs no model."""

import json
from pathlib import Path

import pytest

from engine.demo import model_path
from tests.builders import make_line, make_lines
from tests.integration.runs import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_every_request_has_its_answer_in_input_order(folder: Folder) -> None:
    folder.settings = {"BATCHCTL_SHARDS__MAX_LINES": "37"}
    content = b"".join(
        make_line(f"r{n}", f"[[tokens={n * 7 % 50 + 1}]][[reply=answer {n}]]") + b"\n"
        for n in range(400)
    )
    ended = folder.run_file(content)
    assert ended.code == 0, ended.stderr
    assert ended.stdout == ""
    lines = folder.lines("out.jsonl")
    assert [line["custom_id"] for line in lines] == [f"r{n}" for n in range(400)]
    for n, line in enumerate(lines):
        body = line["response"]["body"]
        assert body["choices"][0]["message"]["content"] == f"answer {n}"
        assert body["usage"]["completion_tokens"] == n * 7 % 50 + 1
        assert (line["error"], body["model"]) == (None, "simulated")
    assert not (folder / "out.errors.jsonl").exists()
    assert not list(folder.path.glob(".*.part"))


def test_failed_requests_go_to_the_error_file_in_input_order(folder: Folder) -> None:
    content = b"".join(
        make_line(f"r{n}", "[[fault=error]]" if n % 3 == 0 else "hello") + b"\n" for n in range(20)
    )
    ended = folder.run_file(content, "--json")
    assert ended.code == 4
    summed = json.loads(ended.stdout)
    assert (summed["requests"], summed["completed"], summed["failed"]) == (20, 13, 7)
    assert (summed["output"], summed["errors"]) == ("out.jsonl", "out.errors.jsonl")
    assert folder.ids("out.jsonl") == [f"r{n}" for n in range(20) if n % 3]
    assert folder.ids("out.errors.jsonl") == [f"r{n}" for n in range(0, 20, 3)]
    tokens = sum(
        line["response"]["body"]["usage"]["completion_tokens"]
        for name in ("out.jsonl", "out.errors.jsonl")
        for line in folder.lines(name)
    )
    assert summed["usage"]["completion_tokens"] == tokens
    assert ended.stderr == "", "nothing but JSON"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_engine_that_chose_its_slots_says_how_many_and_why(folder: Folder) -> None:
    name = folder.write("in.jsonl", make_lines(3))
    told = ("-m", "demo", "--engine", "hf", "-o", "out.jsonl")
    ended = folder.run(name, *told, "--json", seconds=180)
    assert ended.code == 0, ended.stderr
    tuning = json.loads(ended.stdout)["tuning"]
    assert (tuning["slots"], tuning["max_slots"], tuning["slots_by"]) == (128, 128, "device")
    assert tuning["cache_tokens"] > tuning["batch_tokens"] == 512
    model = {"source": str(model_path()), "engine": "hf", "options": {"slots": 3}}
    folder.settings = {"BATCHCTL_MODELS": json.dumps({"mine": model})}
    ended = folder.run(name, *("-m", "mine", "-o", "out.jsonl"), seconds=180)
    assert ended.code == 0, ended.stderr
    assert "engine     3 slots (as set), 512 tokens a step" in ended.stderr
    # Who chooses nothing says nothing.
    ended = Folder(folder.path).run_file(make_lines(3), "--json")
    assert json.loads(ended.stdout)["tuning"] is None


def test_answers_go_to_standard_output_when_no_file_is_named(folder: Folder) -> None:
    name = folder.write("in.jsonl", make_lines(3) + make_line("bad", "[[fault=error]]"))
    ended = folder.run(name, "--model", "simulated")
    assert ended.code == 4
    assert [json.loads(line)["custom_id"] for line in ended.stdout.splitlines()] == [
        "r0",
        "r1",
        "r2",
    ]
    assert folder.ids("in.errors.jsonl") == ["bad"]


def test_standard_input_is_read_to_its_end(folder: Folder) -> None:
    ended = folder.run("-", "--model", "simulated", "-o", "out.jsonl", stdin=make_lines(5))
    assert ended.code == 0, ended.stderr
    assert folder.ids() == [f"r{n}" for n in range(5)]


def test_refusal_as_json_lists_every_fault(folder: Folder) -> None:
    ended = folder.run_file(make_lines(1) + b"{\n" + make_line("r0"), "--json")
    assert ended.code == 3
    told = json.loads(ended.stdout)
    assert (told["status"], told["num_errors"]) == ("failed", 2)
    assert [(error["line"], error["code"]) for error in told["errors"]] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
    ]
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", b'id,text,n\nb,"good, really",1\n\na,"two\nlines",2\n'),
        ("in.tsv", b"id\ttext\tn\nb\tgood, really\t1\na\ttwo\\nlines\t2\n"),
        ("in.jsonl", b'{"id":"b","text":"good, really","n":1}\n{"id":"a","text":"","n":null}\n'),
    ],
)
def test_records_become_requests_by_a_prompt(folder: Folder, name: str, content: bytes) -> None:
    prompt = "[[reply=<{n}>]] Say: {text}"
    ended = folder.run_file(content, "--prompt", prompt, "--max-tokens", "3", name=name)
    assert ended.code == 0, ended.stderr
    lines = folder.lines("out.jsonl")
    assert [line["custom_id"] for line in lines] == ["b", "a"]
    bodies = [line["response"]["body"] for line in lines]
    assert bodies[0]["choices"][0]["message"]["content"] == "<1>"
    assert {body["usage"]["completion_tokens"] for body in bodies} == {3}


def test_fault_in_a_table_names_the_line_of_the_table(folder: Folder) -> None:
    ended = folder.run_file(b"id,text\n1,a\n2\n", "--prompt", "{text}", name="in.csv")
    ended.assert_refused(3, "Line 3")
    ended = folder.run_file(b"id,text\n1,a\n\n1,b\n", "--prompt", "{text}", name="in.csv")
    ended.assert_problem(4, "duplicate_custom_id")


def test_schema_for_all_answers_is_kept(folder: Folder) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    folder.write("schema.json", json.dumps(schema).encode())
    ended = folder.run_file(make_lines(3), "--schema", "schema.json")
    assert ended.code == 0, ended.stderr
    for line in folder.lines("out.jsonl"):
        body = line["response"]["body"]
        assert isinstance(json.loads(body["choices"][0]["message"]["content"])["ok"], bool)
        assert body["batchctl"] == {"constraint": "enforced", "attempts": 1}


# --- again ---


def test_resume_of_a_finished_run_writes_its_files_again_and_runs_nothing(folder: Folder) -> None:
    folder.options = {"ledger": str(folder / "ledger")}
    content = make_lines(5) + make_line("bad", "[[fault=error]]")
    assert folder.run_file(content).code == 4
    before = (folder / "out.jsonl").read_bytes()
    generated = (folder / "ledger").stat().st_size
    (folder / "out.jsonl").unlink()
    ended = folder.run_file(content, "--resume", "--errors", "other.jsonl")
    assert ended.code == 4
    assert (folder / "out.jsonl").read_bytes() == before
    assert folder.ids("other.jsonl") == ["bad"]
    assert (folder / "ledger").stat().st_size == generated


def test_run_of_a_finished_batch_without_resume_starts_afresh(folder: Folder) -> None:
    folder.options = {"ledger": str(folder / "ledger")}
    assert folder.run_file(make_lines(3)).code == 0
    generated = (folder / "ledger").stat().st_size
    assert folder.run_file(make_lines(3)).code == 0
    assert (folder / "ledger").stat().st_size == 2 * generated
    assert folder.ids() == ["r0", "r1", "r2"]
    assert len(list((folder / "data" / "runs").iterdir())) == 1


def test_resume_where_there_is_no_earlier_run_starts_afresh(folder: Folder) -> None:
    ended = folder.run_file(make_lines(3), "--resume")
    assert ended.code == 0, ended.stderr
    assert folder.ids() == ["r0", "r1", "r2"]


def test_resume_with_other_options_says_which(folder: Folder) -> None:
    assert folder.run_file(make_lines(3)).code == 0
    ended = folder.run_file(make_lines(3), "--resume", "--on-unsupported-schema", "refuse")
    ended.assert_refused(3, "on_unsupported_schema", "then validate", "now refuse")
    folder.options = {"reply_tokens": 9}
    ended = folder.run_file(make_lines(3), "--resume")
    ended.assert_refused(3, "settings")


def test_resume_of_a_refused_input_refuses_it_again(folder: Folder) -> None:
    for arguments in ((), ("--resume",)):
        folder.run_file(b"{\n", *arguments).assert_problem(1, "invalid_json_line")


def test_changed_input_is_another_run(folder: Folder) -> None:
    assert folder.run_file(make_lines(3)).code == 0
    ended = folder.run_file(make_lines(4), "--resume")
    assert ended.code == 0, ended.stderr
    assert folder.ids() == ["r0", "r1", "r2", "r3"]


def test_earlier_output_is_replaced_whole(folder: Folder) -> None:
    folder.write("out.jsonl", b"old\n" * 1000)
    assert folder.run_file(make_lines(2)).code == 0
    assert folder.ids() == ["r0", "r1"]
