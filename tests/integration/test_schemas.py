"""A batch in which every line has a JSON schema of its own, on the bundled model."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tests.schemas import make_schema

CODES = {"truncated", "schema_mismatch", "schema_unsupported"}


def line_of(number: int) -> str:
    schema = {"name": f"answer{number}", "schema": make_schema(number), "strict": True}
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": f"Return record {number} as JSON."}],
        "max_tokens": 400,
        "temperature": 0.8,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    url = "/v1/chat/completions"
    return json.dumps({"custom_id": f"s{number}", "method": "POST", "url": url, "body": body})


def run(folder: Path, num_lines: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    source, output, errors = (folder / name for name in ("in.jsonl", "out.jsonl", "err.jsonl"))
    source.write_text("".join(line_of(number) + "\n" for number in range(num_lines)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.cli.main", "run", str(source)),
            *("--output", str(output), "--errors", str(errors), "--data", str(folder / "data")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 4}, done.stderr
    return (
        [json.loads(line) for line in output.read_text().splitlines()],
        [json.loads(line) for line in errors.read_text().splitlines()],
    )


def check(folder: Path, num_lines: int) -> None:
    answered, failed = run(folder, num_lines)
    ids = [line["custom_id"] for line in (*answered, *failed)]
    assert sorted(ids) == sorted(f"s{number}" for number in range(num_lines))
    misfits = []
    for line in answered:
        number = int(line["custom_id"][1:])
        body = line["response"]["body"]
        answer = json.loads(body["choices"][0]["message"]["content"])
        if not jsonschema_rs.is_valid(make_schema(number), answer, validate_formats=True):
            misfits.append(line["custom_id"])
    codes = Counter(line["response"]["body"]["error"]["code"] for line in failed)
    share = 100 * len(answered) / num_lines
    print(f"\n{num_lines} schemas: {share:.1f} % answered, {len(misfits)} misfits, {dict(codes)}")
    assert not misfits
    assert set(codes) <= CODES
    assert share >= 95


def test_every_line_with_a_schema_of_its_own_gets_an_answer_that_fits(tmp_path: Path) -> None:
    check(tmp_path, 60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_thousand_schemas_on_two_thousand_lines(tmp_path: Path) -> None:
    check(tmp_path, 2000)
