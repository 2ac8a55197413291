import ast
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from jobs.domain import errors

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "engine", "storage", "migrations")

DOMAIN_LIBRARIES = {"msgspec", "numpy", "xxhash", "uuid_utils"}
# Of the standard library, what reaches outside the process or waits.
DOES_IO = {
    *("asyncio", "http", "io", "logging", "multiprocessing", "os", "pathlib", "select", "shutil"),
    *("signal", "socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time"),
    *("urllib",),
}
# Who may touch the environment beside jobs/settings.py, and why.
TOUCHES_ENVIRONMENT = {
    "engine/devices.py": "looks which GPUs this process may see",
    "engine/process.py": "hands this process's environment on to the engine's process",
    "engine/sandbox.py": "hands the few variables on that the sandbox's process needs",
    "engine/hf/weights.py": "tells the tokenizers library before it is imported",
    "jobs/worker/celery_app.py": "tells Celery's child which drain file to look at",
    "jobs/worker/launcher.py": "starts workers with this environment and what pins them",
    "jobs/worker/process.py": "reads what the launcher of this process tells it",
}
# What the core is installed without: the extras.
EXTRAS = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "psutil"),
    *("outlines", "outlines_core", "boto3", "botocore", "psycopg", "psycopg_pool", "pynvml"),
    *("celery", "kombu", "redis"),
)


def _sources(*packages: str) -> Iterator[tuple[str, ast.Module]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def test_domain_imports_only_what_does_no_io() -> None:
    allowed = (set(sys.stdlib_module_names) - DOES_IO) | DOMAIN_LIBRARIES
    wrong = [
        (path, name)
        for path, tree in _sources("jobs/domain")
        for name in _imports(tree)
        if name.split(".")[0] not in allowed and not name.startswith("jobs.domain")
    ]
    assert wrong == []


def test_domain_opens_and_prints_nothing() -> None:
    wrong = [
        (path, node.lineno)
        for path, tree in _sources("jobs/domain")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"open", "print", "input"}
    ]
    assert wrong == []


def _is_heard(logger: object) -> TypeGuard[logging.Logger]:
    return isinstance(logger, logging.Logger) and not logger.disabled


def test_imports_point_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    there = [one for one in logging.root.manager.loggerDict.values() if _is_heard(one)]
    try:
        assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS, capsys.readouterr().out
    finally:
        for logger in there:  # it disables every logger that there is
            logger.disabled = False


def test_environment_is_read_in_settings_only() -> None:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    found = {
        path
        for path, tree in _sources(*PACKAGES)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.alias) and node.name in names)
    }
    assert found - TOUCHES_ENVIRONMENT.keys() == {"jobs/settings.py"}


def test_our_variables_are_named_in_settings_only() -> None:
    """Another name that starts so would be refused as a misspelled setting."""
    found = {
        (path, node.value)
        for path, tree in _sources(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch("BATCHCTL_[A-Z_]*", node.value)
    }
    assert {path for path, _ in found} == {"jobs/settings.py"}, found


def test_migrations_import_nothing_of_ours() -> None:
    wrong = [
        (path, name)
        for path, tree in _sources("migrations/versions")
        for name in _imports(tree)
        if name.split(".")[0] in PACKAGES
    ]
    assert wrong == []


def test_error_codes_are_unique() -> None:
    codes = [
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.BatchctlError)
    ]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    "module",
    ["jobs.settings", "jobs.api.app", "jobs.cli.main", "jobs.embedded", "engine.process"],
)
def test_core_imports_without_the_extras(module: str) -> None:
    program = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
importlib.import_module({module!r})
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
