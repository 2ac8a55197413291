import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobs.app import open_app
from jobs.cli import rundir
from jobs.domain.errors import AlreadyLocked, IdentityChanged
from jobs.domain.request import CHAT
from jobs.embedded import FolderLock
from jobs.settings import Settings
from storage import tables
from storage.database import Transaction, writes
from tests.builders import Bench, Clock, make_lines

CONTENT = make_lines(5)


class Runs:
    """The runs of one input in a data folder."""

    def __init__(self, data: Path) -> None:
        self.settings = Settings(data=data)
        self.folder = data / "runs"

    def plan(self, **options: str) -> rundir.RunPlan:
        return rundir.RunPlan(
            input_name="in.jsonl",
            endpoint=CHAT,
            model=None,
            on_unsupported_schema="validate",
            options={"model": "", **options},
        )

    def begin(self, pieces: Iterator[bytes] | None = None) -> rundir.Held:
        return rundir.create(self.folder, self.settings, self.plan(), pieces or iter([CONTENT]))

    def resume(self, **options: str) -> rundir.Held | None:
        sha256 = rundir.hash_pieces([CONTENT])
        return rundir.find(self.folder, self.settings, sha256, self.plan(**options))

    def leave(self, num_done: int, *, status: str = "in_progress") -> str:
        """Begin a run and stop with so many requests done; return its batch id."""
        held = self.begin()
        with held.lock, open_app(self.settings, folder=held.folder) as app:
            bench = Bench(db=app.db, blobs=app.blobs, clock=Clock())
            with bench.stack:
                batch = bench.plan()
            _set_done(app.db, num_done, status)
        return batch.id

    def names(self) -> list[str]:
        """Return what the runs are called beyond their identity, or what else is there."""
        return sorted(path.suffix or path.name[:4] for path in self.folder.iterdir())


@writes
def _set_done(tx: Transaction, num_done: int, status: str) -> None:
    tx.execute(sa.update(tables.shards).values(num_completed=num_done))
    tx.execute(sa.update(tables.batches).values(status=status))


def batch_of(held: rundir.Held | None) -> str:
    assert held is not None
    with held.lock:
        record = rundir.read_record(held.folder)
    assert record is not None
    return record.batch_id


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_every_run_with_finished_requests_is_kept(runs: Runs) -> None:
    begun = [runs.leave(done) for done in (3, 2, 1)]
    held = runs.begin()
    assert held.told is not None
    assert ".old-3 " in held.told.replace(";", " ")
    held.lock.__exit__()
    stem = held.folder.name
    found = [rundir.read_record(runs.folder / f"{stem}.old-{n}") for n in (1, 2, 3)]
    assert [record.batch_id if record else None for record in found] == begun
    assert len(runs.names()) == 4


@pytest.mark.parametrize(("done", "status"), [(0, "in_progress"), (5, "completed")])
def test_run_without_finished_requests_or_that_has_ended_makes_way(
    runs: Runs, done: int, status: str
) -> None:
    earlier = runs.leave(done, status=status)
    held = runs.begin()
    assert held.told is None
    assert batch_of(held) != earlier
    assert runs.names() == [held.folder.name[:4]]


def test_resume_goes_on_with_the_run_that_has_most_done(runs: Runs) -> None:
    runs.leave(2)
    most = runs.leave(4)
    least = runs.leave(1)
    held = runs.resume()
    assert batch_of(held) == most
    assert held is not None
    assert held.told is not None
    assert ".old-2" in held.told
    assert held.folder.suffix == ""
    later = rundir.read_record(held.folder.with_suffix(".old-3"))
    assert later is not None
    assert later.batch_id == least
    assert runs.names() == [".old-1", ".old-3", held.folder.name[:4]]


def test_resume_prefers_the_run_that_stands_there_of_equal_ones(runs: Runs) -> None:
    runs.leave(2)
    later = runs.leave(2)
    held = runs.resume()
    assert batch_of(held) == later
    assert held is not None
    assert held.told is None


def test_resume_replaces_a_run_without_results_by_a_kept_one(runs: Runs) -> None:
    kept = runs.leave(1)
    runs.leave(0)
    held = runs.resume()
    assert batch_of(held) == kept
    assert held is not None
    assert runs.names() == [held.folder.name[:4]]


def test_kept_run_is_found_where_nothing_took_its_place(runs: Runs) -> None:
    kept = runs.leave(1)
    held = runs.begin()
    held.folder.rename(runs.folder / ".incoming-killed")
    held.lock.__exit__()
    assert batch_of(runs.resume()) == kept


def test_kept_runs_say_nothing_of_changed_options(runs: Runs) -> None:
    runs.leave(1)
    with pytest.raises(IdentityChanged, match=r"engine \(then unset, now hf\)"):
        runs.resume(engine="hf")
    runs.begin().lock.__exit__()
    next(path for path in runs.folder.iterdir() if not path.suffix).rename(
        runs.folder / ".incoming-killed"
    )
    assert runs.resume(engine="hf") is None


def test_run_of_another_process_is_left_alone(runs: Runs) -> None:
    held = runs.begin()
    with held.lock:
        with pytest.raises(AlreadyLocked):
            runs.begin()
        with pytest.raises(AlreadyLocked):
            runs.resume()
    assert runs.names() == [held.folder.name[:4]]


def test_second_of_two_that_begin_at_once_is_told_so(runs: Runs) -> None:
    first: list[rundir.Held] = []

    def pieces() -> Iterator[bytes]:
        first.append(runs.begin())
        yield CONTENT

    with pytest.raises(AlreadyLocked):
        runs.begin(pieces())
    assert rundir.read_record(first[0].folder) is not None
    first[0].lock.__exit__()
    assert runs.names() == [first[0].folder.name[:4]]


def test_name_that_was_taken_just_now_is_not_taken_over(tmp_path: Path) -> None:
    for name in ("incoming", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    with pytest.raises(AlreadyLocked, match="just begun"):
        rundir._move(tmp_path / "incoming", tmp_path / "run")  # noqa: SLF001  needs a race else
    assert (tmp_path / "incoming" / "kept").exists()


def test_leftovers_are_told_by_their_free_locks(runs: Runs) -> None:
    own_pid = runs.folder / f".incoming-{os.getpid()}"
    (own_pid / "blobs").mkdir(parents=True)
    alive = runs.folder / ".incoming-alive"
    with FolderLock(alive):
        runs.begin().lock.__exit__()
        assert alive.exists()
    assert not own_pid.exists()
