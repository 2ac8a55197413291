"""What becomes of each schema of the corpus: `python -m tests.corpus.table` prints it.

`--write` puts the corpus, with what planning says of each schema, into `schemas.jsonl`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import jsonschema_rs

from engine.sandbox import Sandbox
from jobs.domain.request import Constraint
from tests.corpus.families import entries

PATH = Path(__file__).with_name("schemas.jsonl")
HARD = frozenset({"invalid", "unsatisfiable", "elsewhere", "unsupported", "bombs"})
"""Families whose schemas planning has to refuse."""
UNSEEN = frozenset({"unsatisfiable-002"})
"""No value satisfies `not: {}`, and planning does not see it."""
_WIDE_BYTES, _MANY_TOKENS, _TOKENS = 1500, 1500, 256

Entry = dict[str, Any]


def family_of(name: str) -> str:
    return name.rpartition("-")[0]


def constraint_of(entry: Entry) -> Constraint:
    return Constraint("json_schema", json.dumps(entry["schema"]))


def plan(corpus: list[Entry]) -> dict[str, str]:
    """Return what planning says of each schema: enforced, validated or invalid."""
    with Sandbox() as sandbox:
        verdicts = sandbox.check_many([constraint_of(entry) for entry in corpus])
    return {e["id"]: verdict.outcome for e, verdict in zip(corpus, verdicts, strict=True)}


def line_of(entry: Entry) -> str:
    spelled = json.dumps(entry["schema"])
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Return one record as JSON."}],
        # Enough to write the shortest answer twice over.
        "max_tokens": _MANY_TOKENS if len(spelled) > _WIDE_BYTES else _TOKENS,
        "temperature": 0.8,
        "seed": 7,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": entry["schema"]},
        },
    }
    url = "/v1/chat/completions"
    return json.dumps({"custom_id": entry["id"], "method": "POST", "url": url, "body": body}) + "\n"


def batchctl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def refused_lines(corpus: list[Entry], folder: Path) -> set[str]:
    """Return whose lines planning names as faulty, all of them in one file."""
    source = folder / "all.jsonl"
    source.write_text("".join(map(line_of, corpus)), encoding="utf-8")
    told = json.loads(batchctl("validate", source, "--json").stdout)
    return {corpus[one["line"] - 1]["id"] for one in told["errors"]}


def run(corpus: list[Entry], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the answers of the output file, and the codes of the error file."""
    source, output, errors = (folder / name for name in ("in.jsonl", "out.jsonl", "err.jsonl"))
    source.write_text("".join(map(line_of, corpus)), encoding="utf-8")
    done = batchctl(
        *("run", source, "--output", output, "--errors", errors, "--data", folder / "data")
    )
    assert done.returncode in {0, 4}, done.stderr
    answers = {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in map(json.loads, output.read_text(encoding="utf-8").splitlines())
    }
    codes = {
        line["custom_id"]: line["response"]["body"]["error"]["code"]
        for line in map(json.loads, errors.read_text(encoding="utf-8").splitlines())
    }
    assert sorted([*answers, *codes]) == sorted(entry["id"] for entry in corpus)
    return answers, codes


def misfits(corpus: list[Entry], answers: Mapping[str, str]) -> list[str]:
    """Return the answers that either of two validators refuses."""
    found = []
    for entry in corpus:
        if entry["id"] not in answers:
            continue
        value, schema = json.loads(answers[entry["id"]]), entry["schema"]
        fits = jsonschema_rs.is_valid(schema, value, validate_formats=True)
        if not fits or not _fits_in_python(schema, value):
            found.append(entry["id"])
    return found


def _fits_in_python(schema: Any, value: Any) -> bool:  # noqa: ANN401 -- any JSON
    kind = jsonschema.validators.validator_for(
        schema, default=jsonschema.validators.Draft202012Validator
    )
    try:
        return bool(kind(schema).is_valid(value))
    except re.error:
        return True  # a pattern that Python's own expressions do not know


def render(
    corpus: Iterable[Entry],
    planned: Mapping[str, str],
    answers: Mapping[str, str],
    codes: Mapping[str, str],
) -> str:
    """Return the table: for each family what planning said and what became of its lines."""
    heads = ("enforced", "validated", "invalid", "answered", "truncated", "schema_mismatch")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in corpus:
        name = entry["id"]
        became = "answered" if name in answers else codes.get(name)
        for family in (family_of(name), "all"):
            counts[family][planned[name]] += 1
            if became is not None:
                counts[family][became] += 1
    counts["all"] = counts.pop("all")
    titles = ("enforced", "validate-only", "refused", "answered", "truncated", "mismatch")
    rows = [("family", "schemas", *titles), ("---", *["---:"] * (len(titles) + 1))]
    for family, count in counts.items():
        total = sum(count[head] for head in heads[:3])
        rows.append((family, str(total), *(str(count[head] or "") for head in heads)))
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def spell(corpus: list[Entry], planned: Mapping[str, str]) -> str:
    """Return the corpus as JSONL; bombs are left to the code that makes them."""
    return "".join(
        json.dumps(
            {"id": entry["id"], "plan": planned[entry["id"]], **entry},
            ensure_ascii=False,
            separators=(",", ":"),
        )
        + "\n"
        for entry in corpus
        if family_of(entry["id"]) != "bombs"
    )


def main() -> None:
    corpus = list(entries())
    planned = plan(corpus)
    if "--write" in sys.argv:
        PATH.write_text(spell(corpus, planned), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        running = [entry for entry in corpus if planned[entry["id"]] != "invalid"]
        answers, codes = run(running, Path(folder))
    print(render(corpus, planned, answers, codes))
    enforced = [name for name, outcome in planned.items() if outcome == "enforced"]
    share = sum(name in answers for name in enforced) / len(enforced)
    print(f"{share:.1%} of {len(enforced)} enforceable schemas answered;", end=" ")
    print(f"answers that do not fit: {len(misfits(corpus, answers))}")
    print(*(f"{name}: {code}" for name, code in codes.items()), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
