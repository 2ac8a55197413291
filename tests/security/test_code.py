"""What our own code never does: rows 18, 19, 20, 23, 24 and 25 of the security table."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.security.measuring import REPOSITORY

PACKAGES = ("jobs", "engine", "storage", "migrations", "scripts")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text("utf-8"))


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path, tree in sources():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kind))


def test_row_19_no_check_of_ours_goes_away_with_minus_o() -> None:
    assert [(path, node.lineno) for path, node in nodes(ast.Assert)] == []  # type: ignore[attr-defined]


def test_row_20_nothing_is_pickled_or_unpickled() -> None:
    found = set()
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            found |= {(path, name) for name in names if name.split(".")[0] in PICKLES}
    assert found == set()


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    for path, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        function = node.func
        name = function.id if isinstance(function, ast.Name) else ""
        yield path, node, name or (function.attr if isinstance(function, ast.Attribute) else "")


def test_row_20_no_text_is_run_and_no_shell_is_asked() -> None:
    wrong = [
        (path, node.lineno, name)
        for path, node, name in calls()
        if (isinstance(node.func, ast.Name) and name in RUNS_TEXT)
        or ast.unparse(node.func) in {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
        or any(word.arg == "shell" for word in node.keywords)
    ]
    assert wrong == []


def test_row_18_trust_in_code_of_models_is_never_anything_but_false_or_the_operators() -> None:
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found.append((path, node.value))
            if isinstance(node, ast.Dict):  # a text is why nobody may set it
                found += [
                    (path, value)
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant)
                    and key.value == "trust_remote_code"
                    and not (isinstance(value, ast.Constant) and isinstance(value.value, str))
                ]
    assert {path for path, _ in found} >= {"engine/hf/weights.py", "engine/vllm/tokenizers.py"}
    for _, value in found:
        # Only engine/trust.py decides it, and there only by what the operator has pinned.
        is_asked = isinstance(value, ast.Call) and ast.unparse(value.func) == "trusts_code"
        assert is_asked or (isinstance(value, ast.Constant) and value.value is False)


def test_row_24_row_25_only_the_api_and_the_metrics_take_connections() -> None:
    takes = {"create_server", "start_server", "bind", "start_http_server", "make_server"}
    found = {path for path, _, name in calls() if name in takes}
    assert found - {"scripts/fleet.py"} <= {"jobs/api/server.py", "jobs/metrics.py"}


@pytest.mark.slow  # without its compiled modules Python starts slowly
@pytest.mark.parametrize("switch", ["flag", "variable"])
def test_row_19_the_program_refuses_to_run_without_the_checks_of_libraries(switch: str) -> None:
    flags = ["-O"] if switch == "flag" else []
    variables = {} if switch == "flag" else {"PYTHONOPTIMIZE": "1"}
    done = subprocess.run(
        [sys.executable, *flags, "-m", "jobs.cli.main", "models"],
        cwd=REPOSITORY,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "Python runs without its checks" in done.stderr
