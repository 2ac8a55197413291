"""Files on a server: upload, list, show, download, delete."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from jobs.cli import options, output
from jobs.cli.batches import download_to, instant, short_instant
from jobs.client import Upload
from jobs.prepare import check_readable

if TYPE_CHECKING:
    from jobs.client_types import File

app = typer.Typer(help="Files on the server.", no_args_is_help=True)


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to send.")],
    *,
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "batch",
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Sending again with the same key changes nothing."),
    ] = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Send a file to the server."""
    options.check_key(idempotency_key)
    check_readable(path)
    source = Upload.from_path(path)
    with (
        options.open_client(config, base_url, api_key) as client,
        output.TransferProgress("uploading", source.num_bytes, quiet=as_json) as progress,
    ):
        file = client.upload(
            source,
            purpose=purpose,
            idempotency_key=idempotency_key,
            on_progress=progress.update,
        )
    if as_json:
        output.print_json(msgspec.to_builtins(file))
    else:
        output.write(f"{output.one_line(file.id)}\n")


@app.command("list")
def list_(
    *,
    purpose: Annotated[
        str | None, typer.Option(help="Only those for this: batch, batch_output.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 100,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """List files, the newest first."""
    chosen: list[File] = []
    with options.open_client(config, base_url, api_key) as client:
        for file in client.list_files(purpose=purpose):
            chosen.append(file)
            if len(chosen) == limit:
                break
    if as_json:
        output.print_json(msgspec.to_builtins(chosen))
        return
    output.print_table(
        ("file", "?purpose", ">size", "created", "~name"),
        (
            (
                file.id,
                file.purpose,
                output.size(file.bytes),
                short_instant(file.created_at),
                file.filename,
            )
            for file in chosen
        ),
    )


@app.command()
def show(
    file_id: options.FileArgument,
    *,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Show what the server knows of a file."""
    with options.open_client(config, base_url, api_key) as client:
        file = client.get_file(file_id)
    if as_json:
        output.print_json(msgspec.to_builtins(file))
        return
    output.print_fields(
        (
            ("file", file.id),
            ("name", file.filename),
            ("purpose", file.purpose),
            ("size", f"{output.size(file.bytes)} ({output.count(file.bytes)} bytes)"),
            ("created", instant(file.created_at)),
            ("expires", instant(file.expires_at)),
        )
    )


@app.command()
def download(
    file_id: options.FileArgument,
    *,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this file, else to standard output."),
    ] = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Write the content of a file."""
    options.check_output_place(output_file)
    if output_file is None and as_json:
        raise typer.BadParameter(
            "it describes what was written: give --output", param_hint="--json"
        )
    with options.open_client(config, base_url, api_key) as client:
        if output_file is None:
            output.write_pieces(client.download(file_id))
            return
        num_bytes = download_to(client, file_id, output_file, quiet=as_json)
    if as_json:
        output.print_json({"id": file_id, "path": str(output_file), "bytes": num_bytes})
    else:
        output.say(f"{output_file} ({output.size(num_bytes)})")


@app.command()
def delete(
    file_ids: Annotated[list[str], typer.Argument(metavar="FILE...", help="Ids: file-...")],
    *,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Delete files."""
    deleted = []
    with options.open_client(config, base_url, api_key) as client:
        for file_id in file_ids:
            client.delete_file(file_id)
            deleted.append({"id": file_id, "deleted": True})
            if not as_json:
                output.say(f"File {output.one_line(file_id)} is deleted.")
    if as_json:
        output.print_json(deleted)
