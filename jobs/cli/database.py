"""The database: its tables brought up to this version."""

import typer

from jobs.cli import options, output

app = typer.Typer(help="The database.", no_args_is_help=True)


@app.command()
def upgrade(
    *, data: options.Data = None, config: options.Config = None, as_json: options.Json = False
) -> None:
    """Create the tables, or bring them up to this version; nothing is lost by repeating it."""
    import sqlalchemy as sa

    from jobs.cli.serve import server_folder
    from storage.config import PRIVATE
    from storage.database import check_schema, open_database
    from storage.database import upgrade as upgrade_tables

    settings = options.load_settings(config, data=data)
    folder = server_folder(settings)
    if not settings.database.url:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    url = settings.database.resolve_url(folder)
    with open_database(url, settings=settings.database) as db:
        upgrade_tables(db)
        check_schema(db)
        shown = sa.make_url(url).render_as_string(hide_password=True)
    if as_json:
        output.print_json({"database": shown, "upgraded": True})
    else:
        output.say(f"The tables of {shown} are up to date.")
