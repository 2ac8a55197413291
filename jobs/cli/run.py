"""`batchctl run`: one batch, here and now, without a server."""

import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from engine.tuning import Tuning, render_tuning
from jobs import collector, fields
from jobs.app import App, open_app
from jobs.cli import exits, interrupts, options, output, rundir
from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.errors import BatchctlError, InvalidInput, StorageError
from jobs.domain.ids import BatchId, FileId
from jobs.embedded import Embedded
from jobs.model_settings import EngineChoice
from jobs.places import is_same, is_special
from jobs.prepare import Source
from jobs.settings import Settings, complete_model
from storage import batches, files, references
from storage.blobs.base import segments_prefix
from storage.config import BlobSettings, DatabaseSettings

_POLL_SECONDS = 0.25
_COPY_BYTES = 1 << 20
_FOREVER_SECONDS = 1e9


def run(
    input_file: options.Input,
    *,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where answers go; else stdout."),
    ] = None,
    errors_file: Annotated[
        Path | None,
        typer.Option(
            "--errors", metavar="FILE", help="Where failed requests go; else beside the output."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A model of the catalogue, a local folder, a .gguf file or a hub id.",
        ),
    ] = None,
    engine: Annotated[
        EngineChoice | None, typer.Option(help="What runs the model; auto if nothing says.")
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="nf4 or fp4 keeps weights in 4 bits, int8 in 8; none; vLLM has more.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where an earlier run of the same input stopped."),
    ] = False,
    endpoint: options.Endpoint = None,
    schema: options.Schema = None,
    output_type: options.OutputType = None,
    on_unsupported_schema: Annotated[
        Literal["validate", "refuse"],
        typer.Option(help="A schema that cannot be enforced: validate answers, or refuse it."),
    ] = "validate",
    reuse: options.Reuse = False,
    prompt: options.Prompt = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    id_column: options.IdColumn = None,
    data: options.Data = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Run a batch on this machine: requests in, answers out."""
    _check_places(input_file, output_file, errors_file)
    settings = options.load_settings(config, data=data, engine=engine)
    # A local run stands by itself, whatever a server on this machine uses.
    # Nobody waits for another model than this batch: each loads once, and runs all its lines.
    settings = settings.model_copy(
        update={
            "database": DatabaseSettings(),
            "blobs": BlobSettings(),
            "worker": settings.worker.model_copy(update={"model_stay_seconds": _FOREVER_SECONDS}),
        }
    )
    if reuse and not settings.reuse.expire_days:
        raise InvalidInput(
            "No answers are kept for later runs; say for how long with reuse.expire_days or "
            "BATCHCTL_REUSE__EXPIRE_DAYS, such as 30.",
            param="reuse",
        )
    name, settings, told = _choose_model(settings, model, engine or "auto", quantization, prompt)
    making = options.Making.of(
        prompt=prompt,
        system=system,
        max_tokens=max_tokens,
        id_column=id_column,
        model=name,
        schema=schema,
        output_type=output_type,
    )
    with Source.open(input_file) as source:
        endpoint = making.endpoint_for(source, endpoint)
        plan = rundir.RunPlan(
            input_name=source.name,
            endpoint=endpoint,
            model=name,
            on_unsupported_schema=on_unsupported_schema,
            reuse=reuse,
            options={
                **told,
                "endpoint": endpoint,
                "on_unsupported_schema": on_unsupported_schema,
                **({"reuse": "yes"} if reuse else {}),
            },
        )

        def pieces() -> Iterator[bytes]:
            return making.prepare(source, endpoint)

        held = _find_or_create(settings, plan, source, pieces, resume=resume)
    with ExitStack() as stack:
        stack.enter_context(held.lock)
        app = stack.enter_context(open_app(settings, folder=held.folder, any_model=True))
        app.remove_leftovers()
        if reuse:
            app = replace(app, cache_app=stack.enter_context(_open_cache(settings)))
        if held.told is not None:
            output.say(held.told)
        batch, tuning = _execute(app, held.folder, quiet=as_json, again=_command_again(input_file))
        code = _deliver(
            app, batch, source.name, output_file, errors_file, tuning=tuning, as_json=as_json
        )
    raise typer.Exit(code)


@contextmanager
def _open_cache(settings: Settings) -> Iterator[App]:
    """Yield what all runs in a data folder have together: the answers that they keep."""
    with open_app(settings, folder=settings.data / "reuse") as cache:
        # Nobody else looks after this folder.
        rules = collector.Rules(**settings.collect.model_dump(exclude={"every_seconds"}))
        collector.collect(cache.db, cache.blobs, rules)
        yield cache


def _choose_model(
    settings: Settings,
    model: str | None,
    engine: EngineChoice,
    quantization: str | None,
    prompt: str | None,
) -> tuple[str | None, Settings, dict[str, str]]:
    """Return the model that everything runs on (None: what the lines name), and what it means."""
    if model is None and prompt is None:
        if quantization is not None:
            raise typer.BadParameter(
                "it is of one model: say which one with --model", param_hint="--quantization"
            )
        if engine == "simulated":  # everything but the models, whatever their entries say
            entries = {
                name: entry.model_copy(update={"engine": engine})
                for name, entry in settings.models.items()
            }
            settings = settings.model_copy(update={"models": entries})
        groups = {"models", "hf", "vllm", "llamacpp", "remote"}
        catalogue = settings.model_dump(include=groups, exclude_defaults=True)
        return None, settings, {"model": "", "engine": settings.engine, **_told_of(catalogue)}
    name, entry, choice = complete_model(settings, model, engine=engine, quantization=quantization)
    if choice is not None and choice.is_notable:
        output.say(choice.reason)
    changed = settings.model_copy(update={"models": {**settings.models, name: entry}})
    told = {
        "model": name,
        "engine": entry.engine,
        **_told_of(entry.model_dump(exclude={"engine"}, exclude_defaults=True)),
    }
    return name, changed, told


def _told_of(values: Mapping[str, object]) -> dict[str, str]:
    """Return each setting by its name that may decide answers: no token, nor a cache's place."""
    return {
        ".".join(("settings", *path)): value if isinstance(value, str) else json.dumps(value)
        for path, value in fields.leaves(values)
        if value is not None and path[-1] not in {"token", "api_key", "cache_folder"}
    }


def _find_or_create(
    settings: Settings,
    plan: rundir.RunPlan,
    source: Source,
    pieces: Callable[[], Iterator[bytes]],
    *,
    resume: bool,
) -> rundir.Held:
    runs = settings.data / "runs"
    if resume and not source.repeatable:
        raise typer.BadParameter(
            "standard input cannot be read a second time; save the same lines to a file and give "
            "that, with --resume",
            param_hint="--resume",
        )
    found = None
    if resume:
        found = rundir.find(runs, settings, rundir.hash_pieces(pieces()), plan)
    return found or rundir.create(runs, settings, plan, pieces())


def _execute(app: App, folder: Path, *, quiet: bool, again: str) -> tuple[Batch, Tuning | None]:
    """Work until the batch has ended; return it, and what its engine chose to work with.

    Args:
        again: the command that goes on with it.

    Raises:
        BatchctlError: it cannot be worked on; what is finished is kept.
        typer.Exit: the person interrupted it.
    """
    record = rundir.read_record(folder)
    if record is None:
        raise StorageError(f"{folder} is no run.")
    batch_id = BatchId(record.batch_id)
    batch = batches.get(app.db, batch_id)
    if batch.status.is_terminal:
        return batch, None
    lines: dict[str, int] = {}
    failure: BatchctlError | None = None
    both = (signal.SIGINT, signal.SIGTERM)
    with (
        # Nothing here blocks for long, so looking is enough.
        interrupts.noticed(both, at_once=False, on_first=_say_stopping) as check,
        output.BatchProgress(quiet=quiet) as progress,
    ):
        embedded = Embedded(
            app,
            fail_without_engine=False,
            does_chores=False,
            on_progress=lambda phase, n: lines.update({phase: n}),
        )
        try:
            with embedded:
                while not batch.status.is_terminal and embedded.failure is None:
                    _show(progress, batch, embedded, lines)
                    time.sleep(_POLL_SECONDS)
                    check()
                    batch = batches.get(app.db, batch_id)
            batch = batches.get(app.db, batch_id)
            _show(progress, batch, embedded, lines)
            failure = embedded.failure if not batch.status.is_terminal else None
        except KeyboardInterrupt:
            batch = batches.get(app.db, batch_id)
            _say_resumable(batch, again)
            raise typer.Exit(exits.INTERRUPTED) from None
    if failure is not None:
        if batch.request_counts.completed or batch.request_counts.failed:
            _say_resumable(batch, again)
        raise failure
    return batch, embedded.tuning


def _show(
    progress: output.BatchProgress, batch: Batch, embedded: Embedded, lines: dict[str, int]
) -> None:
    counts = batch.request_counts
    if batch.status is BatchStatus.VALIDATING:
        progress.update(total=None, completed=lines.get("planning", 0), phase="planning")
        return
    phase = "running"
    if batch.status is not BatchStatus.IN_PROGRESS:
        phase = "writing" if not batch.status.is_terminal else str(batch.status)
    elif embedded.engine_pid is None and (batch.models or not counts.completed + counts.failed):
        phase = "loading the model"
    progress.update(
        total=counts.total,
        completed=counts.completed,
        failed=counts.failed,
        completion_tokens=batch.usage.completion_tokens,
        phase=phase,
    )


def _say_stopping() -> None:
    output.say("\nStopping: writing what is finished ...")


def _say_resumable(batch: Batch, again: str) -> None:
    counts = batch.request_counts
    done = counts.completed + counts.failed
    output.say(
        f"Stopped with {output.count(done)} of {output.count(counts.total)} requests done; they "
        f"are kept. Go on with:\n  {again}"
    )


def _command_again(input_file: str) -> str:
    """Return the command that resumes this one; standard input has to be in a file by then."""
    parts = [part for part in sys.argv[1:] if part != "--resume"]
    if input_file == "-":
        parts = ["FILE-WITH-THE-SAME-LINES" if part == "-" else part for part in parts]
    return f"batchctl {shlex.join(parts)} --resume"


def _deliver(
    app: App,
    batch: Batch,
    input_name: str,
    output_file: Path | None,
    errors_file: Path | None,
    *,
    tuning: Tuning | None,
    as_json: bool,
) -> int:
    """Write the files where they were asked for, sum up, and return the exit code."""
    counts = batch.request_counts
    code = exits.for_batch(batch.status, failed=counts.failed)
    if batch.status is BatchStatus.FAILED:
        _tell_problems(batch, as_json=as_json)
        return code
    beside = _beside(input_name, output_file)
    if errors_file is None and batch.error_file_id is not None:
        errors_file = beside
    if output_file is not None:
        _copy(app, batch.output_file_id, output_file)
    elif not as_json:
        _copy(app, batch.output_file_id, None)
    if errors_file is not None:
        _copy(app, batch.error_file_id, errors_file)
    references.forget_segments(app.db, batch.id)  # the files hold everything now
    for key in list(app.blobs.list_keys(segments_prefix(batch.id))):
        app.blobs.delete(key)
    if as_json:
        usage = batch.usage
        output.print_json(
            {
                "status": batch.status,
                "requests": counts.total,
                "completed": counts.completed,
                "failed": counts.failed,
                "reused": batch.num_reused,
                "usage": {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                },
                "output": str(output_file) if output_file else None,
                "errors": str(errors_file) if errors_file else None,
                "models": batch.models or ((batch.model,) if batch.model else ()),
                "tuning": msgspec.structs.asdict(tuning)
                if tuning is not None and not batch.models
                else None,
                "batch": batch.id,
                "folder": str(app.folder),
            }
        )
        return code
    _sum_up(batch, output_file, errors_file, tuning)
    if errors_file is None and beside.exists():  # perhaps ours, perhaps not: it stays
        output.say(f"{beside} is of an earlier run: nothing failed in this one.")
    return code


def _sum_up(
    batch: Batch, output_file: Path | None, errors_file: Path | None, tuning: Tuning | None
) -> None:
    counts, usage = batch.request_counts, batch.usage
    told = [
        ("requests", output.count(counts.total)),
        ("completed", output.count(counts.completed)),
        ("failed", output.count(counts.failed)),
        (
            "tokens",
            f"{output.count(usage.prompt_tokens)} in, {output.count(usage.completion_tokens)} out",
        ),
        ("results", str(output_file) if output_file else "standard output"),
    ]
    if errors_file is not None:
        told.append(("errors", str(errors_file)))
    if batch.models:
        told.insert(1, ("models", ", ".join(batch.models)))
    elif tuning is not None:  # what the last of several worked with says nothing of the others
        told.append(("engine", render_tuning(tuning)))
    if batch.reuse:
        told.insert(3, ("reused", output.reused(batch.num_reused, counts.total)))
    for name, value in told:
        output.say(f"{name:<10} {value}")


def _tell_problems(batch: Batch, *, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {
                "status": batch.status,
                "num_errors": batch.num_errors,
                "errors": [
                    {"line": p.line, "code": p.code, "param": p.param, "message": p.message}
                    for p in batch.errors
                ],
            }
        )
        return
    for problem in batch.errors:  # not on standard output, which may be somebody's results file
        where = f"line {problem.line}: " if problem.line is not None else ""
        param = f" ({problem.param})" if problem.param else ""
        output.say(f"{where}{problem.code}{param}: {problem.message}")
    more = batch.num_errors - len(batch.errors)
    rest = f" ({output.count(more)} more are not shown)" if more > 0 else ""
    output.report(
        f"The input was refused: {output.count(batch.num_errors)} "
        f"problem{'s' if batch.num_errors != 1 else ''}{rest}. Nothing was run."
    )


def _copy(app: App, file_id: FileId | None, place: Path | None) -> None:
    """Copy a file of the batch (None: an empty one) to a place, whole or not at all."""
    key = files.get(app.db, file_id).blob_key if file_id is not None else None
    if place is None:
        if key is not None:
            with app.blobs.open_reader(key) as reader:
                output.write_pieces(iter(lambda: reader.read(_COPY_BYTES), b""))
        return
    target = place if is_special(place) else place.with_name(f".{place.name}.part")
    try:
        with target.open("wb") as written:
            if key is not None:
                with app.blobs.open_reader(key) as reader:
                    shutil.copyfileobj(reader, written, _COPY_BYTES)
        if target is not place:
            target.replace(place)
    except BrokenPipeError:
        raise
    except OSError as error:
        if target is not place:
            target.unlink(missing_ok=True)
        raise StorageError(
            f"{place} cannot be written: {error.strerror}. The answers are kept; once there is "
            "room, or with another file, --resume writes them."
        ) from error


def _beside(input_name: str, output_file: Path | None) -> Path:
    """Return where failed requests go when nobody says: beside the output, else here."""
    beside = output_file or Path(Path(input_name).name or "in")
    return beside.with_name(f"{beside.stem}.errors.jsonl")


def _check_places(input_file: str, output_file: Path | None, errors_file: Path | None) -> None:
    """Check, before any work is done for them, that results can be written and overwrite no input.

    Raises:
        InvalidInput: they cannot, or would.
    """
    for place in (output_file, errors_file):
        options.check_output_place(place)
        if place is None or is_special(place):
            continue
        try:
            with tempfile.TemporaryFile(dir=place.absolute().parent):
                pass
        except OSError as error:
            raise InvalidInput(
                f"No file can be made beside {place}: {error.strerror}; choose another folder.",
                param="output",
            ) from None
    errors_file = errors_file or _beside(input_file, output_file)
    for option, place in (("--output", output_file), ("--errors", errors_file)):
        if place is not None and is_same(place, Path(input_file)):
            raise InvalidInput(
                f"{place} is the input and would be overwritten; choose another file with "
                f"{option}.",
                param="output",
            )
    if output_file is not None and is_same(output_file, errors_file):
        raise InvalidInput(
            f"{output_file} is given for answers and for errors; choose two files.", param="output"
        )
