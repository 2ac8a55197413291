"""`batchctl serve`: the API, and unless told otherwise the workers of this machine with it."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli import options, output
from jobs.domain.errors import InvalidInput
from jobs.model_settings import EngineChoice
from jobs.settings import PREFIX, Settings


def serve(
    *,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 127.0.0.1 if nothing says.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 takes a free one; else 8000.")
    ] = None,
    workers: Annotated[
        bool,
        typer.Option(
            "--workers/--no-workers",
            help="Run batches here, or leave that to `batchctl worker` (needs Postgres).",
        ),
    ] = True,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Bring the database's tables up to date first.")
    ] = False,
    engine: Annotated[
        EngineChoice | None, typer.Option(help="Engine of models that say auto.")
    ] = None,
    data: options.Data = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Serve the API on this machine and run what it is given."""
    # A server brings the web framework and the database along.
    from jobs.api.server import open_listener
    from jobs.api.server import serve as serve_api
    from jobs.app import open_app

    settings = options.load_settings(
        config, quiet=False, data=data, server__host=host, server__port=port, engine=engine
    )
    settings.check_serving()
    if not workers:
        _check_shared(settings)
    key = settings.api_key
    folder = server_folder(settings)

    def tell(_host: str, real_port: int) -> None:
        url = f"http://{_host_in_url(settings.server.host)}:{real_port}"
        if as_json:
            output.print_json_line({"url": url, "data": str(folder), "pid": os.getpid()})
        elif workers:
            output.write(f"Ready at {url} (data in {folder}; Ctrl-C ends)\n")
        else:
            output.write(f"Ready at {url} (workers run elsewhere; Ctrl-C ends)\n")

    with ExitStack() as stack:
        # The port first: that it is taken shows before a database is touched.
        listener = stack.enter_context(open_listener(settings.server.host, settings.server.port))
        if workers and not _is_remote(settings):
            from jobs.embedded import FolderLock

            stack.enter_context(FolderLock(folder))
        if upgrade:
            _upgrade(settings, folder)
        app = stack.enter_context(open_app(settings, folder=folder))
        if workers:
            from jobs.embedded import Embedded

            app.remove_leftovers()
            stack.enter_context(Embedded(app))
        serve_api(
            app,
            settings.server.host,
            settings.server.port,
            api_key=key.get_secret_value() if key is not None else None,
            on_ready=tell,
            listener=listener,
        )
        if workers:
            output.say(
                "Stopping: what is finished is written, what runs goes on at the next start."
            )


def server_folder(settings: Settings) -> Path:
    """Return the folder that `serve` has for itself."""
    return settings.data / "server"


def _check_shared(settings: Settings) -> None:
    """Check that workers elsewhere can see what this API takes.

    Raises:
        InvalidInput: the database is a file of this API's own.
    """
    if not settings.database.url.startswith("postgres"):
        raise InvalidInput(
            "An API without workers needs a Postgres that the workers reach as well "
            f"({PREFIX}DATABASE__URL); without one, leave --no-workers out.",
            param="database.url",
        )


def _is_remote(settings: Settings) -> bool:
    """Return whether nothing of weight is in the data folder, so that servers may share it."""
    blobs = settings.blobs
    return settings.database.url.startswith("postgres") and (
        blobs.kind == "s3" or blobs.folder is not None
    )


def _upgrade(settings: Settings, folder: Path) -> None:
    from storage.database import open_database
    from storage.database import upgrade as upgrade_tables

    url = settings.database.resolve_url(folder)
    with open_database(url, settings=settings.database) as db:
        upgrade_tables(db)


def _host_in_url(host: str) -> str:
    if host in {"0.0.0.0", "::"}:  # noqa: S104  said, not listened on
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"  # noqa: S104
    return f"[{host}]" if ":" in host else host
