"""Batches on a server: submit, status, watch, results, cancel, list."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from jobs.cli import exits, interrupts, options, output
from jobs.client import Client, Upload, write_atomically
from jobs.client_types import Batch
from jobs.domain.batch import BatchStatus
from jobs.places import is_same
from jobs.prepare import Source

check_endpoint, load_constraint = options.check_endpoint, options.load_constraint

_POLL_SECONDS = 0.5
_MAX_POLL_SECONDS = 5.0
_SHOWN_PROBLEMS = 20

OutputFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the answers to this file.")
]
ErrorsFile = Annotated[
    Path | None, typer.Option("--errors", "-e", help="Write the failed requests to this file.")
]


def submit(
    input_file: options.Input,
    *,
    endpoint: options.Endpoint = None,
    completion_window: Annotated[
        str, typer.Option(help="Time until the batch expires: 90s, 30m, 2h, 7d.")
    ] = "24h",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Kept with the batch; repeatable.")
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs earlier.")] = None,
    model: options.Model = None,
    schema: options.Schema = None,
    output_type: options.OutputType = None,
    prompt: options.Prompt = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    id_column: options.IdColumn = None,
    reuse: options.Reuse = False,
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Submitting again with the same key changes nothing."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch until the batch has ended.")] = False,
    output_file: OutputFile = None,
    errors_file: ErrorsFile = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Upload a file and start a batch over it."""
    if not wait and (output_file or errors_file):
        raise typer.BadParameter("results can be written only after waiting", param_hint="--wait")
    pairs = options.parse_pairs(metadata or [])
    options.check_key(idempotency_key)
    _check_places(output_file, errors_file, input_file=input_file)
    making = options.Making.of(
        prompt=prompt,
        system=system,
        max_tokens=max_tokens,
        id_column=id_column,
        model=model,
        schema=schema,
        output_type=output_type,
    )
    with ExitStack() as stack:
        source = stack.enter_context(Source.open(input_file))
        endpoint = making.endpoint_for(source, endpoint)
        client = stack.enter_context(options.open_client(config, base_url, api_key))
        # A wrong address or key shows before anything large is sent.
        known = client.list_models()
        making = making.with_default_model(known[0].id if known else "demo")
        upload = _upload(source, making, endpoint)
        with output.TransferProgress("uploading", upload.num_bytes, quiet=as_json) as progress:
            file = client.upload(
                upload,
                idempotency_key=f"{idempotency_key}/file" if idempotency_key else None,
                on_progress=progress.update,
            )
        batch = client.create_batch(
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window=completion_window,
            metadata=pairs,
            idempotency_key=idempotency_key,
            model=making.batch_model,
            priority=priority,
            reuse=reuse or None,
        )
        if not wait:
            if as_json:
                output.print_json(client.get_json_batch(batch.id))
            else:
                output.write(f"{batch.id}\n")
                output.say(f"Look at it with: batchctl watch {batch.id}")
            return
        if not as_json:
            output.say(f"Batch {output.one_line(batch.id)}")
        batch = _wait(client, batch.id, quiet=as_json)
        _finish(client, batch, output_file=output_file, errors_file=errors_file, as_json=as_json)


def status(
    batch_id: options.BatchArgument,
    *,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Show how a batch stands."""
    with options.open_client(config, base_url, api_key) as client:
        if as_json:
            output.print_json(client.get_json_batch(batch_id))
        else:
            _show(client.get_batch(batch_id))


def watch(
    batch_id: options.BatchArgument,
    *,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Show the progress of a batch until it has ended."""
    with options.open_client(config, base_url, api_key) as client:
        batch = _wait(client, batch_id, quiet=False, stream=as_json)
        if not as_json:
            _show(batch)
        raise typer.Exit(_code(batch))


def results(
    batch_id: options.BatchArgument,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what finishes until the batch ends.")
    ] = False,
    output_file: OutputFile = None,
    errors_file: ErrorsFile = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The same: results are JSON lines already.")
    ] = False,
) -> None:
    """Write the results of a batch, or follow them as they come."""
    if follow and (output_file or errors_file):
        raise typer.BadParameter("it writes to standard output only", param_hint="--follow")
    _check_places(output_file, errors_file)
    with options.open_client(config, base_url, api_key) as client:
        if not output_file and not errors_file:
            try:
                with interrupts.noticed() as check:
                    for line in client.results(batch_id, follow=follow):
                        check()
                        output.write_line(line, flush=follow)
            except KeyboardInterrupt:
                _say_goes_on(batch_id, "results --follow" if follow else "results")
                raise typer.Exit(exits.INTERRUPTED) from None
            return
        batch = client.get_batch(batch_id)
        if not batch.is_terminal:
            output.fail(
                f"Batch {batch.id} is {batch.status}; its files are written when it has ended. "
                f"Wait with: batchctl watch {batch.id}, or read on with --follow.",
                exits.CONFLICT,
            )
        if batch.status == BatchStatus.FAILED:
            output.fail(
                f"Batch {batch.id} was refused and has no results; what is wrong with it: "
                f"batchctl status {batch.id}",
                exits.REFUSED,
            )
        written = _write_files(client, batch, output_file, errors_file, quiet=as_json)
        if as_json:
            output.print_json(written)


def cancel(
    batch_id: options.BatchArgument,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Until what ran has ended.")] = False,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """End a batch; what is finished is kept."""
    with options.open_client(config, base_url, api_key) as client:
        batch = client.cancel_batch(batch_id)
        if wait:
            batch = _wait(client, batch.id, quiet=as_json)
        if as_json:
            output.print_json(client.get_json_batch(batch_id))
        else:
            output.say(f"Batch {output.one_line(batch.id)} is {output.one_line(batch.status)}.")


def list_(
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    status_: Annotated[
        BatchStatus | None, typer.Option("--status", help="Only those in this status.")
    ] = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """List batches, the newest first."""
    with options.open_client(config, base_url, api_key) as client:
        chosen: list[Batch] = []
        for batch in client.list_batches():
            if status_ is None or batch.status == status_:
                chosen.append(batch)
                if len(chosen) == limit:
                    break
    if as_json:
        output.print_json(msgspec.to_builtins(chosen))
        return
    output.print_table(
        ("batch", "status", ">done", ">failed", "created", "?model"),
        (
            (
                batch.id,
                batch.status,
                _done(batch),
                batch.request_counts.failed,
                short_instant(batch.created_at),
                batch.model or ", ".join(batch.models),
            )
            for batch in chosen
        ),
    )


# --- what several of them do ---


def _done(batch: Batch) -> str:
    counts = batch.request_counts
    return f"{counts.completed + counts.failed}/{counts.total}"


def instant(seconds: int | None) -> str | None:
    """Return unix seconds as local time for people."""
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def short_instant(seconds: int) -> str:
    """Return unix seconds for a table: the time of a day that is today, the date of another."""
    if not output.out.is_terminal:
        return instant(seconds) or ""
    then = datetime.fromtimestamp(seconds, tz=UTC).astimezone()
    is_today = then.date() == datetime.now(tz=UTC).astimezone().date()
    return then.strftime("%H:%M:%S" if is_today else "%Y-%m-%d")


def _upload(source: Source, making: options.Making, endpoint: str) -> Upload:
    """Return the upload of `source`, made into request lines on the way."""
    return Upload(
        filename=f"{Path(source.name).stem}.jsonl" if making.changes_lines else source.name,
        open=lambda: making.prepare(source, endpoint),
        num_bytes=None if making.changes_lines else source.num_bytes,
        repeatable=source.repeatable,
    )


def _check_places(
    output_file: Path | None, errors_file: Path | None, *, input_file: str | None = None
) -> None:
    options.check_output_place(output_file)
    options.check_output_place(errors_file)
    if output_file and errors_file and is_same(output_file, errors_file):
        raise typer.BadParameter("name another file than --output", param_hint="--errors")
    for option, place in (("--output", output_file), ("--errors", errors_file)):
        if place is not None and input_file is not None and is_same(place, Path(input_file)):
            raise typer.BadParameter("it would overwrite the input", param_hint=option)


def _polls(client: Client, batch_id: str) -> Iterator[Batch]:
    """Yield the batch now and again until it has ended, the slower the longer it takes."""
    pause = _POLL_SECONDS
    while True:
        batch = client.get_batch(batch_id)
        yield batch
        if batch.is_terminal:
            return
        time.sleep(pause)
        pause = min(pause * 1.1, _MAX_POLL_SECONDS)


def _wait(client: Client, batch_id: str, *, quiet: bool, stream: bool = False) -> Batch:
    """Return the batch when it has ended, showing progress meanwhile.

    Args:
        stream: write each change as a JSON line instead.
    """
    last = Batch(id=batch_id, status="")
    try:
        with interrupts.noticed() as check, output.BatchProgress(quiet=quiet or stream) as progress:
            for batch in _polls(client, batch_id):
                check()
                if stream and batch != last:
                    output.print_json_line(msgspec.to_builtins(batch))
                last = batch
                if batch.status == BatchStatus.FAILED:
                    break
                counts = batch.request_counts
                progress.update(
                    total=counts.total,
                    completed=counts.completed,
                    failed=counts.failed,
                    completion_tokens=batch.usage.output_tokens if batch.usage else None,
                    phase=batch.status.replace("in_progress", "running"),
                )
    except KeyboardInterrupt:
        _say_goes_on(batch_id, "watch")
        raise typer.Exit(exits.INTERRUPTED) from None
    return last


def _say_goes_on(batch_id: str, command: str) -> None:
    name = output.one_line(batch_id)
    output.say(
        f"\nBatch {name} goes on at the server. Look again with: batchctl {command} {name}; "
        f"end it with: batchctl cancel {name}"
    )


def _code(batch: Batch) -> int:
    return exits.for_batch(batch.status, failed=batch.request_counts.failed)


def _finish(
    client: Client,
    batch: Batch,
    *,
    output_file: Path | None,
    errors_file: Path | None,
    as_json: bool,
) -> None:
    """Write the files that were asked for, say how the batch ended, and exit accordingly."""
    if batch.status != BatchStatus.FAILED:
        _write_files(client, batch, output_file, errors_file, quiet=as_json)
    if as_json:
        output.print_json(client.get_json_batch(batch.id))
    else:
        _show(batch)
        if not output_file and batch.output_file_id:
            output.say(f"Read the answers with: batchctl results {output.one_line(batch.id)}")
    raise typer.Exit(_code(batch))


def _write_files(
    client: Client,
    batch: Batch,
    output_file: Path | None,
    errors_file: Path | None,
    *,
    quiet: bool,
) -> dict[str, dict[str, object]]:
    """Write output and error file; one that the batch does not have becomes an empty file."""
    written: dict[str, dict[str, object]] = {}
    for kind, path, file_id in (
        ("output", output_file, batch.output_file_id),
        ("errors", errors_file, batch.error_file_id),
    ):
        if path is None:
            continue
        num_bytes = download_to(client, file_id, path, quiet=quiet) if file_id else 0
        if not file_id:
            write_atomically(path, ())
        written[kind] = {"path": str(path), "file_id": file_id, "bytes": num_bytes}
        if not quiet:
            output.say(f"{kind}: {path} ({output.size(num_bytes)})")
    return written


def download_to(client: Client, file_id: str, path: Path, *, quiet: bool) -> int:
    """Write the content of a file to `path` and return its number of bytes."""
    total = client.get_file(file_id).bytes

    def counted() -> Iterator[bytes]:
        done = 0
        for piece in client.download(file_id):
            yield piece
            done += len(piece)
            progress.update(done)

    with output.TransferProgress("downloading", total, quiet=quiet) as progress:
        return write_atomically(path, counted())


def _show(batch: Batch) -> None:
    counts, usage = batch.request_counts, batch.usage
    output.print_fields(
        (
            ("batch", batch.id),
            ("status", batch.status),
            ("model", batch.model or ", ".join(batch.models) or None),
            ("endpoint", batch.endpoint),
            ("requests", output.count(counts.total)),
            ("completed", output.count(counts.completed)),
            ("failed", output.count(counts.failed)),
            ("reused", output.reused(batch.num_reused, counts.total) if batch.reuse else None),
            (
                "tokens",
                f"{output.count(usage.input_tokens)} in, {output.count(usage.output_tokens)} out"
                if usage
                else None,
            ),
            ("created", instant(batch.created_at)),
            ("ended", instant(batch.ended_at)),
            ("expires", None if batch.is_terminal else instant(batch.expires_at)),
            ("input file", batch.input_file_id),
            ("output file", batch.output_file_id),
            ("error file", batch.error_file_id),
            *((f"metadata {name}", value) for name, value in (batch.metadata or {}).items()),
        )
    )
    if batch.errors and batch.errors.data:
        problems = batch.errors.data
        output.write("\n")
        output.print_problems(
            (one.line, one.code, one.param, one.message) for one in problems[:_SHOWN_PROBLEMS]
        )
        if len(problems) > _SHOWN_PROBLEMS:
            output.say(
                f"... and {len(problems) - _SHOWN_PROBLEMS} more; all of them with: "
                f"batchctl status --json {output.one_line(batch.id)}"
            )
