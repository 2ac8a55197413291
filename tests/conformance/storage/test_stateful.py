"""Random calls of the statements on both databases; and that they find a guard that is gone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

import storage
from storage.database import open_database
from storage.tables import metadata
from tests.conformance.storage import machine
from tests.conformance.storage.bench import Bench, FixedClock

_ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Bench]:
    """What opens an empty database for each example."""
    if request.param == "sqlite":
        return machine.copies_of(request.getfixturevalue("sqlite_template"), tmp_path)
    url: str = request.getfixturevalue("postgres_url")

    def emptied() -> Bench:
        clock = FixedClock()
        db = open_database(url, clock=clock)
        with db.transaction() as tx:
            for table in reversed(metadata.sorted_tables):
                tx.execute(sa.delete(table))
        return Bench(db=db, clock=clock)

    return emptied


def test_any_calls_in_any_order_leave_every_rule_whole(opened: Callable[[], Bench]) -> None:
    machine.run(opened, examples=6, steps=40, derandomize=True, shrink=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_calls_in_any_order_leave_every_rule_whole(opened: Callable[[], Bench]) -> None:
    machine.run(opened, examples=15, steps=100, derandomize=False, shrink=True)


# --- tests of the test: copies of `storage` that lack a guard ---


@dataclass(frozen=True, kw_only=True)
class Lack:
    """A guard of the code: lines as they are written there, and what stands in their place."""

    name: str
    module: str
    lines: dict[str, str]


LACKS = (
    Lack(
        name="a commit does not look at the epoch",
        module="segments.py",
        lines={"        or held.epoch != lease.epoch\n": ""},
    ),
    Lack(
        name="a commit does not look for lines that are done",
        module="segments.py",
        lines={"    if bitmaps_overlap(shard.done, segment.positions):": "    if False:"},
    ),
    Lack(
        name="a lease is not held against the epoch of its unit",
        module="transitions.py",
        lines={
            "    if row is not None and row.epoch == lease.epoch:": "    if row is not None:",
        },
    ),
    Lack(
        name="a claim does not ask for a pending unit",
        module="units.py",
        lines={
            "            _is_pending(units),\n            _is_one_of(units.c.kind, [str": (
                "            _is_one_of(units.c.kind, [str"
            ),
            "scalar_subquery(), _STILL_PENDING)": "scalar_subquery())",
        },
    ),
    Lack(
        name="a reap leaves the epoch",
        module="units.py",
        lines={
            "                epoch=units.c.epoch + 1,\n                crash_count": "crash_count"
        },
    ),
)


def run_copy(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run the machine over the copy of `storage` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "tests.conformance.storage.machine", "120", "60"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(_ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def copy_storage(folder: Path) -> Path:
    copy = folder / "storage"
    shutil.copytree(
        Path(storage.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    return copy


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lack", LACKS, ids=lambda lack: lack.name)
def test_a_guard_that_is_gone_is_missed(lack: Lack, tmp_path: Path) -> None:
    copy = copy_storage(tmp_path)
    module = copy / lack.module
    text = module.read_text()
    for guard, instead in lack.lines.items():
        assert text.count(guard) == 1, "the guard is written in another way now"
        text = text.replace(guard, instead)
    module.write_text(text)
    ran = run_copy(tmp_path)
    assert ran.stdout.startswith(str(copy)), ran.stdout
    assert ran.returncode != 0, "nothing was missed"
    # The machine says which calls broke which rule; it did not end for another reason.
    assert "state = Machine()" in ran.stdout, ran.stdout[-2000:]
    assert "state.teardown()" in ran.stdout, ran.stdout[-2000:]
