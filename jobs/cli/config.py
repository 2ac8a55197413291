"""Settings: what is in force, and where it came from."""

from typing import Annotated

import typer

from jobs.cli import options, output
from jobs.settings import origins

app = typer.Typer(help="Settings.", no_args_is_help=True)


@app.command()
def show(
    *,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say where each value came from.")
    ] = False,
    data: options.Data = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Show the settings in force; secrets are masked."""
    found = origins(options.load_settings(config, data=data))
    if as_json:
        output.print_json(
            {one.name: {"value": one.value, "origin": one.origin} for one in found}
            if origin
            else {one.name: one.value for one in found}
        )
        return
    if origin:
        output.print_table(("setting", "~value", "~origin"), found)
    else:
        output.print_table(("setting", "~value"), (one[:2] for one in found))
