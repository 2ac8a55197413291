"""`batchctl serve`: the API and the workers of one machine, in one process tree."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from jobs.catalogue import EngineChoice
from jobs.cli import options, output
from jobs.settings import Settings


def serve(
    *,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 127.0.0.1 if nothing says.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 takes a free one; else 8000.")
    ] = None,
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
    from jobs.embedded import Embedded, FolderLock

    settings = options.load_settings(
        config, quiet=False, data=data, server__host=host, server__port=port, engine=engine
    )
    settings.check_serving()
    key = settings.api_key
    folder = server_folder(settings)

    def tell(_host: str, real_port: int) -> None:
        url = f"http://{_host_in_url(settings.server.host)}:{real_port}"
        if as_json:
            output.print_json_line({"url": url, "data": str(folder), "pid": os.getpid()})
        else:
            output.write(f"Ready at {url} (data in {folder}; Ctrl-C ends)\n")

    # The port first: that it is taken shows before a database is touched.
    with (
        open_listener(settings.server.host, settings.server.port) as listener,
        FolderLock(folder),
        open_app(settings, folder=folder) as app,
        ExitStack() as stack,
    ):
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
        output.say("Stopping: what is finished is written, what runs goes on at the next start.")


def server_folder(settings: Settings) -> Path:
    """Return the folder that `serve` has for itself."""
    return settings.data / "server"


def _host_in_url(host: str) -> str:
    if host in {"0.0.0.0", "::"}:  # noqa: S104  said, not listened on
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"  # noqa: S104
    return f"[{host}]" if ":" in host else host
