"""Runs `batchctl run` in a process of its own, as a person would, and reads what came out."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    stdout: str
    stderr: str

    def assert_refused(self, code: int, *said: str) -> None:
        """Check that it ended with `code` and one clear line of error, and no traceback."""
        assert self.code == code, self.stderr
        assert "Traceback" not in self.stderr
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.stderr
        assert self.stderr.splitlines()[-1] == errors[0], "nothing comes after it"
        for part in said:
            assert part in self.stdout + self.stderr

    def assert_problem(self, line: int | None, code: str) -> None:
        """Check that planning refused the input for this, at this line, and nothing ran."""
        self.assert_refused(3, "Nothing was run")
        start = f"line {line}: {code}" if line is not None else f"{code}:"
        assert any(row.startswith(start) for row in self.stderr.splitlines()), self.stderr
        assert self.stdout == ""


@dataclass
class Folder:
    """A working folder with its own data folder."""

    path: Path
    options: dict[str, object] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, content: bytes) -> str:
        (self.path / name).write_bytes(content)
        return name

    def environment(self) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("BATCHCTL_", "HF_"))}
        options = {"step_seconds": 0.001, "reply_tokens": 4, **self.options}
        return {
            **plain,
            "PYTHONPATH": str(REPOSITORY),
            "BATCHCTL_DATA": str(self.path / "data"),
            "BATCHCTL_MODELS": json.dumps(
                {"simulated": {"engine": "simulated", "options": options}}
            ),
            **self.settings,
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "jobs.cli.main", "run", *arguments]

    def run(self, *arguments: str, stdin: bytes | None = None, seconds: float = 60) -> Ended:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=self.environment(),
            input=stdin if stdin is not None else b"",
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())

    def run_file(self, content: bytes, *arguments: str, name: str = "in.jsonl") -> Ended:
        """Run `content` on the simulated model, its answers to out.jsonl."""
        return self.run(
            self.write(name, content), "--model", "simulated", "--output", "out.jsonl", *arguments
        )

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name).read_bytes().splitlines()]

    def ids(self, name: str = "out.jsonl") -> list[str]:
        return [line["custom_id"] for line in self.lines(name)]
