"""Looking after the batches of a server: an audit of one, and removing what nobody needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import exits, options, output
from jobs.domain.errors import NotFound
from jobs.domain.ids import BatchId
from jobs.settings import Settings

if TYPE_CHECKING:
    from jobs.audit import Report
    from jobs.collector import Collected
    from storage.blobs.base import BlobStore
    from storage.database import Database


def audit(
    batch_id: Annotated[
        str | None, typer.Argument(metavar="BATCH", help="Id of a batch: batch_...")
    ] = None,
    *,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="Instead: folder of a `batchctl run`."),
    ] = None,
    data: options.Data = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Prove that a batch is complete: every line once, counts and bytes as recorded."""
    from jobs.audit import audit as check

    if (batch_id is None) == (run is None):
        raise typer.BadParameter("name a batch, or a run with --run", param_hint="BATCH")
    settings = options.load_settings(config, data=data)
    if run is not None:
        batch_id, settings = _open_run(run, settings)
    # Whoever resumes a run takes its leases back at once, however old they are.
    grace_seconds = None if run is not None else 2 * settings.leases.lease_seconds
    with _open(settings, run) as (db, blobs), output.BatchProgress(quiet=as_json) as progress:
        report = check(
            db,
            blobs,
            BatchId(batch_id or ""),
            grace_seconds=grace_seconds,
            on_progress=lambda n: progress.update(total=None, completed=n, phase="auditing"),
        )
    _show_report(report, as_json=as_json)
    if report.violated:
        raise typer.Exit(exits.VIOLATED)


def _open_run(folder: Path, settings: Settings) -> tuple[str, Settings]:
    """Return the batch of a local run and the settings under which it stands by itself.

    Raises:
        NotFound: there is no run in the folder.
    """
    from jobs.cli import rundir
    from storage.config import BlobSettings, DatabaseSettings

    record = rundir.read_record(folder)
    if record is None:
        raise NotFound(
            f"There is no run in {folder}. Runs are the folders in {settings.data / 'runs'}; "
            "`batchctl run --json` names its own."
        )
    alone = {"database": DatabaseSettings(), "blobs": BlobSettings()}
    return record.batch_id, settings.model_copy(update=alone)


@contextmanager
def _open(settings: Settings, run: Path | None = None) -> Iterator[tuple["Database", "BlobStore"]]:
    """Yield database and blobs of a server or a run, as they are: nothing is made or upgraded.

    Raises:
        NotFound: there is no database.
    """
    from jobs.app import server_folder
    from storage.blobs import open_blobs
    from storage.database import check_schema, open_database

    folder = run or server_folder(settings)
    url = settings.database.resolve_url(folder)
    place = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not place.exists():
        raise NotFound(
            f"There is no database {place}. Name the server's folder with --data, or its Postgres "
            "with database.url.",
            param="data",
        )
    with open_database(url, settings=settings.database) as db:
        check_schema(db)
        with open_blobs(settings.blobs, folder) as blobs:
            yield db, blobs


def _show_report(report: "Report", *, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {
                "batch": report.batch_id,
                "status": report.status,
                "lines": report.num_lines,
                "ok": not report.violated,
                "checks": [
                    {
                        "name": check.name,
                        "what": check.what,
                        "ok": check.ok,
                        "checked": check.num_checked,
                        "problems": check.num_problems,
                        "told": check.told,
                        "skipped": check.skipped,
                    }
                    for check in report.checks
                ],
            }
        )
        return
    output.print_table(
        ("check", "result", ">checked", ">problems", "~about"),
        (
            (
                check.name,
                "failed" if not check.ok else "ok" if check.skipped is None else "skipped",
                output.count(check.num_checked),
                output.count(check.num_problems),
                "; ".join(check.told) or check.skipped or check.what,
            )
            for check in report.checks
        ),
    )
    lines = f"{output.count(report.num_lines)} lines, {report.status}"
    if report.violated:
        output.report(f"Batch {report.batch_id} ({lines}) fails: {', '.join(report.violated)}.")
    else:
        output.say(f"Batch {report.batch_id} ({lines}) is as it should be.")


def collect(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; say what would go.")
    ] = False,
    data: options.Data = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Remove what nobody needs: expired files, old segments, bytes that killed writers left.

    Servers and control workers do the same by themselves; this may run beside them.
    """
    from jobs import collector
    from jobs.app import server_folder
    from storage import workers

    settings = options.load_settings(config, data=data)
    rules = collector.Rules(**settings.collect.model_dump(exclude={"every_seconds"}))
    place, total = None, collector.Collected()
    with _open(settings) as (db, blobs), output.BatchProgress(quiet=as_json) as progress:
        while True:
            found = collector.collect(
                db,
                blobs,
                rules,
                place=place,
                dry_run=dry_run,
                on_progress=partial(_show_progress, progress, total.num_seen),
            )
            total, place = total + found, found.place
            if place is None:
                break
        now = db.now()
        num_logs = collector.remove_engine_logs(
            server_folder(settings),
            alive={one.id for one in workers.list_recent(db, since=now - timedelta(days=1))},
            before=now - timedelta(seconds=rules.orphan_seconds),
            dry_run=dry_run,
        )
    _show_collected(total, num_logs, dry_run=dry_run, as_json=as_json)


def _show_progress(progress: output.BatchProgress, before: int, number: int) -> None:
    progress.update(total=None, completed=before + number, phase="looking")


def _show_collected(total: "Collected", num_logs: int, *, dry_run: bool, as_json: bool) -> None:
    told = {
        "expired_files": total.expired_files,
        "old_segments": total.old_segments,
        "expired_answers": total.expired_answers,
        "orphans": total.orphans,
        "uploads": total.uploads,
        "engine_logs": num_logs,
        "bytes": total.num_bytes,
    }
    if as_json:
        output.print_json({"dry_run": dry_run, **told})
        return
    output.print_fields((name.replace("_", " "), output.count(n)) for name, n in told.items())
    if dry_run:
        output.say("Nothing was removed.")
