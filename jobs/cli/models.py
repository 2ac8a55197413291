"""Models: what the catalogue of this machine knows, or a server's."""

from typing import Annotated

import typer

from jobs.catalogue import ModelSettings
from jobs.cli import options, output
from jobs.domain.errors import BatchctlError
from jobs.settings import Settings, resolve_model


def models(
    *,
    server: Annotated[
        bool, typer.Option("--server", help="Those of the server, not of this machine.")
    ] = False,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """List the models that requests may name."""
    if server or base_url is not None:
        with options.open_client(config, base_url, api_key) as client:
            names = [model.id for model in client.list_models()]
        if as_json:
            output.print_json([{"id": name} for name in names])
        else:
            output.print_table(("model",), ((name,) for name in names))
        return
    settings = options.load_settings(config)
    found = [_describe(settings, name, entry) for name, entry in settings.models.items()]
    if as_json:
        output.print_json(found)
        return
    output.print_table(
        ("model", "engine", "?type", "?quantization", "~state", "~source"),
        (
            (
                one["id"],
                one["engine"],
                one["type"],
                one["quantization"] or "",
                "default" if one["default"] and not one["problem"] else one["problem"] or "",
                one["source"] or "",
            )
            for one in found
        ),
    )


def _describe(settings: Settings, name: str, entry: ModelSettings) -> dict[str, str | bool | None]:
    problem = None
    try:
        _, entry = resolve_model(settings, name)
    except BatchctlError as error:
        problem = error.message
    return {
        "id": name,
        "type": entry.type,
        "engine": entry.engine,
        "source": entry.source,
        "revision": entry.revision,
        "quantization": entry.quantization,
        "default": name == settings.default_model,
        "problem": problem,
    }
