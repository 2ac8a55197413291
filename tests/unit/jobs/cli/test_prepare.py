import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.domain.errors import InvalidInput, NotFound
from jobs.domain.request import CHAT, COMPLETIONS, Constraint, parse_line
from jobs.domain.responses import RESPONSES
from jobs.prepare import Source, prepare_input

SCHEMA = Constraint("json_schema", '{"type":"object","const":1.10}')


def prepare(path: Path, **options: Any) -> bytes:  # noqa: ANN401
    return b"".join(prepare_input(path, **options))


def lines_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def request_line(custom_id: str = "a", **body: Any) -> bytes:  # noqa: ANN401
    asked = {"messages": [{"role": "user", "content": "hi"}], **body}
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": asked}
    return json.dumps(line).encode()


def refusal(path: Path, **options: Any) -> str:  # noqa: ANN401
    with pytest.raises(InvalidInput) as caught:
        prepare(path, **options)
    return caught.value.message


# --- request lines ---


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n",
        b"{bad\n\xff\xfe\n",
        b"\xef\xbb\xbf" + request_line() + b"\r\n\r\n" + request_line("b"),
        request_line() + b"\n" + b"x" * 3_000_000,
    ],
)
def test_request_lines_pass_byte_for_byte(tmp_path: Path, data: bytes) -> None:
    assert prepare(write(tmp_path, "in.jsonl", data)) == data


def test_constraint_is_added_where_a_line_asks_for_none(tmp_path: Path) -> None:
    own = {"type": "json_object"}
    rows = [
        request_line("plain"),
        request_line("null", response_format=None),
        request_line("own", response_format=own),
        request_line("older", guided_regex="a+"),
        request_line("newer", structured_outputs={"choice": ["a"]}),
    ]
    made = lines_of(prepare(write(tmp_path, "in.jsonl", b"\n".join(rows)), constraint=SCHEMA))
    by_id = {line["custom_id"]: line["body"] for line in made}
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": json.loads(SCHEMA.spec), "strict": True},
    }
    assert by_id["plain"]["response_format"] == wanted
    assert by_id["null"]["response_format"] == wanted
    assert by_id["own"]["response_format"] == own
    assert "response_format" not in by_id["older"]
    assert "response_format" not in by_id["newer"]


def test_constraint_leaves_bad_lines_and_line_numbers_alone(tmp_path: Path) -> None:
    long = b'{"x": "' + b"y" * 500 + b'"}'
    bad = [b"{nope", b"[1]", b"", b'{"body": 3}', b"\xff", long, b"[" * 400]
    data = b"\xef\xbb\xbf" + b"\r\n".join([request_line("first"), *bad, request_line("last")])
    path = write(tmp_path, "in.jsonl", data)
    made = prepare(path, constraint=SCHEMA, max_line_bytes=450).split(b"\r\n")
    assert made[1:-1] == bad
    assert "response_format" in json.loads(made[0])["body"]
    assert "response_format" in json.loads(made[-1])["body"]


def test_constraint_keeps_numbers_as_they_are_written(tmp_path: Path) -> None:
    line = request_line().replace(b'"messages"', b'"temperature": 1.10, "seed": 1e0, "messages"')
    made = prepare(write(tmp_path, "in.jsonl", line), constraint=SCHEMA)
    assert b'"temperature":1.10' in made
    assert b'"seed":1e0' in made
    assert b'"const":1.10' in made


@pytest.mark.parametrize(
    ("constraint", "endpoint"),
    [
        (Constraint("json_schema", '{"type":"string"}'), CHAT),
        (Constraint("json_object"), CHAT),
        (Constraint("regex", 'a"+'), CHAT),
        (Constraint("choice", '["yes","no"]'), CHAT),
        (Constraint("grammar", 'start: "a"'), COMPLETIONS),
        (Constraint("json_schema", '{"type":"string"}'), COMPLETIONS),
        (Constraint("json_schema", '{"type":"string"}'), RESPONSES),
        (Constraint("json_object"), RESPONSES),
        (Constraint("regex", 'a"+'), RESPONSES),
    ],
)
def test_added_constraint_is_what_planning_reads(
    tmp_path: Path, constraint: Constraint, endpoint: str
) -> None:
    path = write(tmp_path, "in.csv", "text\nhi\n")
    (line,) = prepare(
        path, prompt="{text}", model="m", constraint=constraint, endpoint=endpoint
    ).splitlines()[1:]
    parsed = parse_line(line, endpoint=endpoint)
    assert parsed.constraint == constraint


def test_made_responses_ask_what_made_chats_ask(tmp_path: Path) -> None:
    path = write(tmp_path, "in.csv", "text\nhi\n")
    asked = [
        parse_line(line, endpoint=endpoint).to_request(1)
        for endpoint in (CHAT, RESPONSES)
        for line in prepare(
            path, prompt="{text}", model="m", endpoint=endpoint, system="s", max_tokens=5
        ).splitlines()
        if line
    ]
    assert len(asked) == 2
    assert asked[0] == asked[1]


# --- records ---


def test_csv_row_becomes_request_on_its_own_line(tmp_path: Path) -> None:
    text = '\ufefftext, id \r\n"a\r\nb",one\r\n\r\nc,two\r\n'
    made = prepare(
        write(tmp_path, "in.csv", text),
        prompt="Say {{x}}: {text}!",
        model="m",
        system="Be kind.",
        max_tokens=7,
        temperature=0.0,
    )
    lines = made.split(b"\n")
    # The header is line 1, the first row lines 2 and 3, line 4 is blank.
    assert [bool(line) for line in lines] == [False, True, False, False, True, False]
    first = json.loads(lines[1])
    assert first == {
        "custom_id": "one",
        "method": "POST",
        "url": CHAT,
        "body": {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Say {x}: a\r\nb!"},
            ],
            "max_tokens": 7,
            "temperature": 0.0,
        },
    }
    assert json.loads(lines[4])["custom_id"] == "two"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("in.tsv", "n,a\ttext\n1\t2,3\n"),
        ("in.csv", "n,a;text\n1;2,3\n".replace("n,a", "na")),
        ("table", 'text,other\n"2,3",x\n'),
    ],
)
def test_delimiter_is_found(tmp_path: Path, name: str, text: str) -> None:
    (made,) = lines_of(prepare(write(tmp_path, name, text), prompt="{text}"))
    assert made["body"]["messages"][0]["content"] == "2,3"
    assert made["custom_id"] == "row-1"


def test_records_give_their_values_as_text(tmp_path: Path) -> None:
    text = '{"a": "x\\ny", "n": 1.10, "no": null, "l": [1, 2], "id": 7}\n\n{"a": "z", "n": 2}'
    path = write(tmp_path, "in.jsonl", text.replace(', "id": 7', ', "no2": false, "id": 7'))
    made = lines_of(prepare(path, prompt="{a}|{n}"))
    assert [line["body"]["messages"][0]["content"] for line in made] == ["x\ny|1.10", "z|2"]
    assert [line["custom_id"] for line in made] == ["7", "row-2"]


@pytest.mark.parametrize(
    ("name", "text", "options", "said"),
    [
        ("a.csv", "x,y\n1,2\n", {"prompt": "{z}"}, ("Line 2", "'z'", "x, y")),
        ("a.csv", "x,y\n1,2\n", {"prompt": "{x}", "id_column": "k"}, ("Line 2", "'k'", "x, y")),
        ("a.csv", "x,y\n1,2\n3\n", {"prompt": "{x}"}, ("Line 3", "1 columns", "has 2")),
        ("a.csv", "x,x\n1,2\n", {"prompt": "{x}"}, ("Line 1", "'x'", "twice")),
        ("a.csv", 'x,y\n"a"b,2\n', {"prompt": "{x}"}, ("Line 2", "table")),
        ("a.csv", 'x,y\n1,"a\n', {"prompt": "{x}"}, ("table",)),
        ("a.csv", "", {"prompt": "{x}"}, ("empty", "header")),
        ("a.csv", "x,y\n", {"prompt": "{x}"}, ("no records",)),
        ("a.csv", b"x\n\xff\n", {"prompt": "{x}"}, ("Line 2", "UTF-8")),
        ("a.csv", "x,id\n1,\n", {"prompt": "{x}"}, ("Line 2", "'id'", "empty")),
        ("a.csv", "x\n1\n", {}, ("--prompt",)),
        ("a.jsonl", '{"x": 1}\n', {}, ("Line 1", "--prompt")),
        ("a.jsonl", '{"x": 1}\n[1]\n', {"prompt": "{x}"}, ("Line 2", "JSON object")),
        ("a.jsonl", '{"x": 1}\n{"y": 1}\n', {"prompt": "{x}"}, ("Line 2", "'x'", "there are y")),
        ("a.jsonl", request_line(), {"prompt": "{x}"}, ("Line 1", "already")),
        ("a.csv", "x\n1\n", {"prompt": "no field"}, ("{text}",)),
        ("a.csv", "x\n1\n", {"prompt": "{x"}, ("template", "{{")),
        ("a.csv", "x\n1\n", {"prompt": "{x.__class__}"}, ("{x.__class__}", "plain")),
        ("a.csv", "x\n1\n", {"prompt": "{x!r}"}, ("plain",)),
        ("a.csv", "x\n1\n", {"prompt": "{}"}, ("plain",)),
        ("a.csv", "x\n1\n", {"prompt": "{x}", "system": "s", "endpoint": COMPLETIONS}, (CHAT,)),
        ("a.csv", "x\n" + "1" * 99, {"prompt": "{x}", "max_line_bytes": 50}, ("Line 2", "50")),
        ("a.csv", "x\n1\n".encode("utf-16"), {"prompt": "{x}"}, ("UTF-16",)),
    ],
)
def test_what_cannot_be_made_into_requests_is_refused(
    tmp_path: Path, name: str, text: str | bytes, options: dict[str, Any], said: tuple[str, ...]
) -> None:
    message = refusal(write(tmp_path, name, text), **options)
    assert all(part in message for part in said), message


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="There is no file"):
        prepare(tmp_path / "nope.jsonl")
    with pytest.raises(InvalidInput, match="is a folder"):
        prepare(tmp_path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        prepare(Path("a\0b"))


_NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n.[]{}!:,;\t\"'\x00"), min_size=1
).filter(lambda name: name == name.strip() and bool(name) and not name.isspace())
_VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), names=st.lists(_NAMES, min_size=2, max_size=4, unique=True))
def test_every_row_of_any_table_comes_through(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, names: list[str]
) -> None:
    names = [name for name in names if name not in {"id", "custom_id"}] or ["x", "y"]
    row = st.lists(_VALUES, min_size=len(names), max_size=len(names))
    # A row of nothing at all reads as a blank line.
    rows = data.draw(st.lists(row.filter(any), min_size=1, max_size=5))
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([names, *rows])
    path = write(tmp_path_factory.mktemp("t"), "in.csv", text.getvalue())
    template = "|".join(f"{{{name}}}" for name in names)
    made = prepare(path, prompt=template)
    physical = made.split(b"\n")
    assert [line["body"]["messages"][0]["content"] for line in lines_of(made)] == [
        "|".join(values) for values in rows
    ]
    begin = 2 + names[0].count("\n")
    for ordinal, values in enumerate(rows, 1):
        assert json.loads(physical[begin - 1])["custom_id"] == f"row-{ordinal}"
        begin += 1 + sum(value.count("\n") for value in values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.just(request_line())), max_size=8))
def test_constraint_never_changes_the_number_of_lines(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    data = b"\n".join([request_line("z"), *parts])
    path = write(tmp_path_factory.mktemp("t"), "in.jsonl", data)
    made = prepare(path, constraint=SCHEMA, max_line_bytes=200)
    assert made.count(b"\n") == data.count(b"\n")
    assert prepare(path) == data


# --- sources ---


@pytest.mark.parametrize(
    ("data", "endpoint"),
    [
        (request_line(), CHAT),
        (
            b"\xef\xbb\xbf\n\n" + request_line().replace(CHAT.encode(), b"/v1/completions"),
            COMPLETIONS,
        ),
        (b"{bad", None),
        (b"", None),
        (b'{"url": 3}', None),
    ],
)
def test_endpoint_is_that_of_the_first_line(
    tmp_path: Path, data: bytes, endpoint: str | None
) -> None:
    with Source.open(write(tmp_path, "in.jsonl", data)) as source:
        assert source.endpoint == endpoint


def _through_pipe(pieces: Iterable[bytes], code: str) -> subprocess.CompletedProcess[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None
    stdin = child.stdin

    def feed() -> None:
        for piece in pieces:
            stdin.write(piece)
            stdin.flush()
        stdin.close()

    child.stdin = None
    feeder = threading.Thread(daemon=True, target=feed)
    feeder.start()
    out, err = child.communicate(timeout=60)
    feeder.join()
    return subprocess.CompletedProcess("", child.returncode, out, err)


def test_standard_input_is_read_once_and_whole() -> None:
    data = request_line() + b"\n" + b"x" * 2_000_000 + b"\n" + request_line("b")
    code = (
        "import sys; from jobs.prepare import *\n"
        "with Source.open('-') as s:\n"
        "    sys.stderr.write(s.endpoint)\n"
        "    for p in prepare_input(s): sys.stdout.buffer.write(p)\n"
        "    try: list(prepare_input(s))\n"
        "    except Exception as e: sys.stderr.write(' ' + e.message)\n"
    )
    done = _through_pipe([data[:10], data[10:]], code)
    assert done.stdout == data
    assert done.stderr.decode() == f"{CHAT} Standard input can be read only once; use a file."


def test_table_from_standard_input() -> None:
    code = (
        "import sys; from jobs.prepare import *\n"
        "for p in prepare_input('-', prompt='{a}'): sys.stdout.buffer.write(p)\n"
    )
    done = _through_pipe([b"a,", b"b\n1", b",2\n3,4"], code)
    assert [line["custom_id"] for line in lines_of(done.stdout)] == ["row-1", "row-2"], done.stderr


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    code = (
        "import sys, resource; from jobs.prepare import *\n"
        "from jobs.domain.request import Constraint\n"
        "n = sum(map(len, prepare_input(sys.argv[1], prompt='{a}',"
        " constraint=Constraint('json_object'))))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for count in (1_000, 100_000):
        path = write(tmp_path, f"{count}.csv", "a\n" + ("x" * 100 + "\n") * count)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.2 * peaks[0]


def test_a_line_of_just_the_largest_size_is_held_as_well(tmp_path: Path) -> None:
    line = request_line()
    path = write(tmp_path, "in.jsonl", line + b"\n" + line + b" \n")
    first, second = prepare(path, constraint=SCHEMA, max_line_bytes=len(line)).splitlines()
    assert b"json_schema" in first
    assert second.strip() == line, "planning says that it is too long"
    table = write(tmp_path, "in.csv", "x\n" + "1" * 50 + "\n")
    assert prepare(table, prompt="{x}", max_line_bytes=50)


def test_a_long_first_line_says_which_endpoint_its_file_is_for(tmp_path: Path) -> None:
    body = {"model": "m", "input": "x" * (3 << 20)}
    line = {"custom_id": "a", "method": "POST", "url": RESPONSES, "body": body}
    path = write(tmp_path, "in.jsonl", b"\n" * 100_000 + json.dumps(line).encode() + b"\n")
    with Source.open(path) as source:
        assert source.endpoint == RESPONSES
        assert not source.is_records
