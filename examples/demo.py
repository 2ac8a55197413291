"""Runs every example through the bundled model and shows the answers: `make demo`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

EXAMPLES = Path(__file__).parent
FOLDER = EXAMPLES.parent / "build" / "demo"
_WIDTH = 100
_SOME_REFUSED = 4
"""The exit code of a run of which some requests ended in the error file."""


def main() -> int:
    """Run the examples; return 0 when every request has its result, in one file or the other."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    requests = FOLDER / "requests.jsonl"
    results, errors = FOLDER / "results.jsonl", FOLDER / "errors.jsonl"
    sources = sorted(EXAMPLES.glob("*.jsonl"))
    requests.write_bytes(b"".join(source.read_bytes() for source in sources))
    for earlier in (results, errors):
        earlier.unlink(missing_ok=True)
    code = subprocess.call(
        [
            *(sys.executable, "-m", "jobs.cli.main", "run", str(requests)),
            *("--output", str(results), "--errors", str(errors)),
            *("--model", "demo", "--data", str(FOLDER / "data")),
        ]
    )
    if code not in {0, _SOME_REFUSED}:
        return code
    asked = {line["custom_id"]: line["body"] for line in _read(requests)}
    answered = list(_read(results))
    failed = list(_read(errors))
    console = Console(width=_WIDTH, highlight=False)
    table = Table(title=f"\nWhat the demo model answered ({len(answered)} requests)")
    table.add_column("request", no_wrap=True)
    table.add_column("what it was asked about", ratio=3)
    table.add_column("answer", ratio=3)
    table.add_column("asked", justify="right")
    for line in answered:
        body = line["response"]["body"]
        attempts = body.get("batchctl", {}).get("attempts", 1)
        table.add_row(
            Text(line["custom_id"]),
            Text(_subject(asked[line["custom_id"]])),
            Text(body["choices"][0]["message"]["content"]),
            Text(f"{attempts} times" if attempts > 1 else "once"),
        )
    console.print(table)
    for line in failed:
        error = line["error"] or line["response"]["body"]["error"]
        console.print(Text(f"refused    {line['custom_id']}: {error['code']}: {error['message']}"))
    for name, value in (
        ("requests", len(asked)),
        ("completed", len(answered)),
        ("failed", len(failed)),
        ("results", results.relative_to(EXAMPLES.parent)),
        ("errors", errors.relative_to(EXAMPLES.parent)),
    ):
        print(f"{name:<10} {value}")
    return 0 if len(answered) + len(failed) == len(asked) else 1


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _subject(body: dict[str, Any]) -> str:
    content: str = body["messages"][-1]["content"]
    subject = content.rsplit("\n\n", 1)[-1]
    return subject if len(subject) <= _WIDTH else f"{subject[:_WIDTH]} ..."


if __name__ == "__main__":
    sys.exit(main())
