"""Runs every suite, each in the environment it needs, and ends with one line for each.

An environment that cannot be built makes its suite "not run", which is no success: the exit code
is 3 then, and 1 where a test failed. BATCHCTL_ALLOW_NOT_RUN=1 lets such a machine pass all the
same; the lines still say it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / ".venv" / "bin" / "python"
REPORTS = ROOT / "build" / "reports"
NOT_RUN = 3
_ALLOW_NOT_RUN = "BATCHCTL_ALLOW_NOT_RUN"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tests that run together, and the script that makes the environment they need."""

    name: str
    python: Path
    arguments: tuple[str, ...]
    environment: Path | None = None
    on_fleet: bool = False


@dataclass(frozen=True, kw_only=True)
class Script:
    """A program of ours that checks by itself, and whose last line says what it found."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a suite ended."""

    name: str
    words: str
    is_failure: bool = False
    is_missing: bool = False


_ALONE = ("vllm", "llamacpp", "remote", "airflow")
SUITES = (
    Suite(
        name="core, hf bf16 and nf4, fleet",
        python=MAIN,
        arguments=(
            *("-n", os.environ.get("WORKERS", "2"), "--dist", "loadfile", "tests"),
            *(f"--ignore=tests/{folder}" for folder in _ALONE),
        ),
    ),
    Suite(
        name="vllm (CPU)",
        python=ROOT / ".venv-vllm" / "bin" / "python",
        arguments=("tests/vllm",),
        environment=ROOT / "scripts" / "vllm_env.sh",
    ),
    Suite(
        name="llamacpp (CPU)",
        python=ROOT / ".venv-llamacpp" / "bin" / "python",
        arguments=("tests/llamacpp",),
        environment=ROOT / "scripts" / "llamacpp_env.sh",
    ),
    Suite(
        name="remote (vllm serve)",
        python=MAIN,
        arguments=("tests/remote",),
        environment=ROOT / "scripts" / "vllm_env.sh",
    ),
    Suite(
        name="airflow",
        python=ROOT / ".venv-airflow" / "bin" / "python",
        arguments=("--confcutdir=tests/airflow", "tests/airflow"),
        environment=ROOT / "scripts" / "airflow_env.sh",
    ),
    Suite(
        name="airflow on a fleet",
        python=ROOT / ".venv-airflow" / "bin" / "python",
        arguments=(
            "--confcutdir=tests/airflow",
            "tests/airflow/test_openai_operator.py",
            "tests/airflow/test_operator.py",
        ),
        environment=ROOT / "scripts" / "airflow_env.sh",
        on_fleet=True,
    ),
)
SCRIPTS = (
    Script(
        name="chaos",
        arguments=(
            *("-m", "scripts.chaos", "--lines", "50000"),
            *("--kills", "25", "--pauses", "20", "--minutes", "15"),
        ),
    ),
)


# The engines of the conformance suite: the suite whose report has them, the class of their tests
# there, and how the names of these begin behind the bracket.
_CORE = ("core, hf bf16 and nf4, fleet", "tests.conformance.engine.test_engine")
CONFORMANCE = {
    "simulated": (*_CORE, "simulated"),
    "hf float32": (*_CORE, "hf-float32"),
    "hf bfloat16": (*_CORE, "hf-bfloat16"),
    "hf nf4": (*_CORE, "hf-nf4"),
    "hf with outlines_core": (*_CORE, "hf-outlines"),
    "vllm (CPU)": ("vllm (CPU)", "tests.vllm.test_conformance", ""),
    "llamacpp (CPU)": ("llamacpp (CPU)", "tests.llamacpp.test_conformance", ""),
    "remote (vllm serve)": ("remote (vllm serve)", "tests.remote.test_conformance", ""),
}
_NOTES = {"simulated": "; what changes the choice of tokens is taken and ignored"}
_NO_TESTS = ("hf on CUDA", "hf on MPS", "vllm on CUDA", "llamacpp on CUDA and Metal")
"""Engines that no test opens, whatever the machine has."""


def run_script(script: Script) -> Outcome:
    """Run the script, and say what its last line says."""
    last = "nothing was said"
    environment = {name: value for name, value in os.environ.items() if name != _ALLOW_NOT_RUN}
    with subprocess.Popen(  # noqa: S603  our own script
        [str(MAIN), *script.arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        return Outcome(name=script.name, words=f"FAILED: {last}", is_failure=True)
    return Outcome(name=script.name, words=last)


def run(suite: Suite) -> Outcome:
    """Build what the suite needs, run it, and say how it went."""
    report = report_of(suite.name)
    report.unlink(missing_ok=True)  # first: that of an earlier run says nothing of this one
    if suite.environment is not None:
        built = subprocess.run(  # noqa: S603  our own script
            ["/bin/sh", str(suite.environment)], cwd=ROOT, check=False
        )
        if built.returncode == NOT_RUN:
            return Outcome(
                name=suite.name,
                words=f"not run: {suite.environment.name} could not make its environment",
                is_missing=True,
            )
        if built.returncode:
            return Outcome(
                name=suite.name,
                words=f"failed: {suite.environment.name} ended with {built.returncode}",
                is_failure=True,
            )
    began = time.monotonic()
    # The programs under test take every BATCHCTL_ name for a setting, and refuse this one.
    environment = {name: value for name, value in os.environ.items() if name != _ALLOW_NOT_RUN}
    with _surroundings(suite) as variables:
        if variables is None:
            return Outcome(name=suite.name, words="failed: no fleet started", is_failure=True)
        ended = subprocess.run(  # noqa: S603  our own tests
            [str(suite.python), "-m", "pytest", "-q", f"--junitxml={report}", *suite.arguments],
            cwd=ROOT,
            env=environment | variables,
            check=False,
        ).returncode
    return _read(suite, report, ended, time.monotonic() - began)


@contextmanager
def _surroundings(suite: Suite) -> Iterator[dict[str, str] | None]:
    """Run what the suite is run against; yield what it is told of it, or None where that fails."""
    if not suite.on_fleet:
        yield {}
        return
    folder = ROOT / "build" / "fleet-test"
    command = [str(MAIN), "scripts/fleet.py", "--port", "0", "--fresh", "--json"]
    with subprocess.Popen(  # noqa: S603  our own script
        [*command, "--folder", str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as fleet:
        try:
            said = fleet.stdout.readline() if fleet.stdout is not None else ""
            if said:
                told = json.loads(said)
                yield {"BATCHCTL_TEST_URL": told["url"], "BATCHCTL_TEST_MODEL": "simulated"}
            else:
                yield None
        finally:
            fleet.send_signal(signal.SIGINT)
            fleet.wait(60)


def _read(suite: Suite, report: Path, ended: int, seconds: float) -> Outcome:
    """Say what the report holds; a suite that ran nothing has not passed."""
    try:
        totals = [one.attrib for one in ET.parse(report).getroot().iter("testsuite")]  # noqa: S314  ours
    except (OSError, ET.ParseError):
        return Outcome(name=suite.name, words=f"failed: pytest ended with {ended}", is_failure=True)
    counts = {
        name: sum(int(one.get(name, 0)) for one in totals)
        for name in ("tests", "failures", "errors", "skipped")
    }
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    words = f"{passed} passed, {bad} failed, {counts['skipped']} skipped in {seconds:.0f} s"
    if ended or bad:
        return Outcome(name=suite.name, words=f"FAILED: {words}", is_failure=True)
    if not passed:
        return Outcome(name=suite.name, words=f"not run: {words}", is_missing=True)
    return Outcome(name=suite.name, words=words)


def report_of(suite: str, folder: Path = REPORTS) -> Path:
    """Return where pytest writes what it found in a suite."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', suite.lower()).strip('-')}.xml"


def conformance(ran: Iterable[str], folder: Path = REPORTS) -> list[Outcome]:
    """Say how each engine did in the conformance suite; one without a test that passed did not run.

    Args:
        ran: the suites whose reports are of this run.
    """
    ran, found = frozenset(ran), []
    for engine, (suite, of_class, begin) in CONFORMANCE.items():
        if suite not in ran:
            continue
        passed = bad = 0
        for case in _cases(report_of(suite, folder)):
            _, _, parameters = case.get("name", "").partition("[")
            if case.get("classname") == of_class and parameters.startswith(begin):
                kinds = {child.tag for child in case}
                bad += not kinds.isdisjoint({"failure", "error"})
                passed += kinds.isdisjoint({"failure", "error", "skipped"})
        words = f"{passed} passed{_NOTES.get(engine, '')}"
        if bad:
            words = f"FAILED: {passed} passed, {bad} failed"
        elif not passed:
            words = "not run"
        found.append(Outcome(name=f"conformance: {engine}", words=words))
    return found + [
        Outcome(name=f"conformance: {name}", words="not run: no test opens it")
        for name in _NO_TESTS
    ]


def _cases(report: Path) -> Iterator[ET.Element]:
    try:
        yield from ET.parse(report).getroot().iter("testcase")  # noqa: S314  ours
    except (OSError, ET.ParseError):
        return


def _never_here() -> list[Outcome]:
    """What this machine cannot run, whatever was built."""
    found = []
    if shutil.which("nvidia-smi") is None:
        found.append(Outcome(name="CUDA, NVML, FlashAttention", words="not run: no NVIDIA GPU"))
    # No test builds the images; where there is a daemon, that too is said.
    found.append(Outcome(name="Dockerfile, docker-compose.yml", words="not run: read as text only"))
    return found


def main(wanted: list[str]) -> int:
    """Run the suites whose names begin with one of `wanted` (all, if empty)."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for suite in SUITES:
        if wanted and not suite.name.startswith(tuple(wanted)):
            continue
        print(f"\n== {suite.name}", flush=True)
        outcomes.append(run(suite))
    for script in SCRIPTS:
        if wanted and not script.name.startswith(tuple(wanted)):
            continue
        print(f"\n== {script.name}", flush=True)
        outcomes.append(run_script(script))
    print("\n== all suites")
    last = [*outcomes, *conformance(one.name for one in outcomes), *_never_here()]
    width = max(len(one.name) for one in last)
    for one in last:
        print(f"{one.name:<{width}}  {one.words}")
    if any(one.is_failure for one in outcomes):
        return 1
    missing = any(one.is_missing for one in outcomes)
    return NOT_RUN if missing and os.environ.get(_ALLOW_NOT_RUN) != "1" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
