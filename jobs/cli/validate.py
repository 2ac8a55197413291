"""Checks an input as planning does, and runs nothing."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import exits, options, output
from jobs.prepare import Source

if TYPE_CHECKING:
    from jobs.domain.batch import Batch


def validate(
    input_file: options.Input,
    *,
    endpoint: options.Endpoint = None,
    model: options.Model = None,
    schema: options.Schema = None,
    output_type: options.OutputType = None,
    prompt: options.Prompt = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    id_column: options.IdColumn = None,
    max_errors: Annotated[int, typer.Option(min=1, help="How many bad lines to list.")] = 10_000,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Check every line of an input as a batch does, and run nothing."""
    # Planning brings the database along.
    from jobs.cli.check import check_input

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
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="batchctl-")))
        settings = options.load_settings(
            config,
            data=scratch,
            database__url="",
            blobs__kind="folder",
            blobs__folder=scratch / "blobs",
            limits__max_reported_errors=max_errors,
        )
        with output.BatchProgress(quiet=as_json) as progress:
            batch = check_input(
                settings,
                source,
                making.with_default_model(settings.default_model),
                endpoint=endpoint,
                folder=scratch,
                on_progress=lambda lines: progress.update(
                    total=None, completed=lines, phase="checking"
                ),
            )
    _tell(batch, as_json=as_json)
    raise typer.Exit(exits.REFUSED if batch.num_errors else exits.OK)


def _tell(batch: "Batch", *, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {
                "ok": not batch.num_errors,
                "requests": batch.request_counts.total,
                "endpoint": batch.endpoint,
                "model": batch.model,
                "models": batch.models,
                "num_errors": batch.num_errors,
                "errors": [
                    {
                        "line": one.line,
                        "code": one.code,
                        "param": one.param,
                        "message": one.message,
                    }
                    for one in batch.errors
                ],
            }
        )
        return
    if not batch.num_errors:
        output.say(
            f"Good: {output.count(batch.request_counts.total)} requests for "
            f"{output.one_line(batch.model or ', '.join(batch.models))}."
        )
        return
    output.print_problems((one.line, one.code, one.param, one.message) for one in batch.errors)
    more = batch.num_errors - len(batch.errors)
    output.report(
        f"{output.count(batch.num_errors)} fault{'s' if batch.num_errors > 1 else ''} found"
        + (f", {output.count(more)} of them not listed (see --max-errors)." if more > 0 else ".")
    )
