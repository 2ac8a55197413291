"""The wheel, installed alone with the core's dependencies, outside of the source tree."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _run(command: Sequence[str | Path], *, folder: Path) -> str:
    """Run a command that must succeed, without what would lead it back to the source tree."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith("BATCHCTL_")
    }
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of commands of an environment that holds the wheel and the core."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    _run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], folder=folder)
    wheel = next(folder.glob("batchctl-*.whl"))
    _run([sys.executable, "-m", "venv", folder / "venv"], folder=folder)
    commands = folder / "venv" / "bin"
    _run(
        [commands / "python", *pip[1:], "install", "-c", ROOT / "constraints.txt", wheel],
        folder=folder,
    )
    return commands


def test_wheel_holds_what_is_read_at_run_time(installed: Path, tmp_path: Path) -> None:
    program = """
import json
from pathlib import Path
import engine.demo, migrations, jobs

model = engine.demo.model_path()
versions = Path(migrations.__file__).parent / "versions"
print(json.dumps({
    "home": str(Path(jobs.__file__).parent.parent),
    "model": sorted(path.name for path in model.iterdir()),
    "migrations": sorted(path.name for path in versions.glob("[0-9]*.py")),
}))
"""
    found = json.loads(_run([installed / "python", "-c", program], folder=tmp_path))
    assert Path(found["home"]).is_relative_to(installed.parent)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["model"])
    source = ROOT / "migrations" / "versions"
    assert found["migrations"] == sorted(path.name for path in source.glob("[0-9]*.py"))
    assert found["migrations"]


def test_wheel_brings_no_engine(installed: Path, tmp_path: Path) -> None:
    listed = _run([installed / "python", "-m", "pip", "list", "--format=json"], folder=tmp_path)
    names = {distribution["name"].lower() for distribution in json.loads(listed)}
    assert "batchctl" in names
    assert names.isdisjoint({"torch", "transformers", "boto3", "psycopg"})


def test_command_says_its_version(installed: Path, tmp_path: Path) -> None:
    assert "0.6.2" in _run([installed / "batchctl", "--version"], folder=tmp_path)


def test_simulated_run_answers_every_line(installed: Path, tmp_path: Path) -> None:
    ids = [f"line-{number}" for number in range(20)]
    lines = [
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "any", "messages": [{"role": "user", "content": "Hello"}]},
        }
        for custom_id in ids
    ]
    source = tmp_path / "input.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "output.jsonl"
    _run(
        [installed / "batchctl", "run", source, "--output", output, "--engine", "simulated"],
        folder=tmp_path,
    )
    assert [json.loads(line)["custom_id"] for line in output.read_text().splitlines()] == ids
