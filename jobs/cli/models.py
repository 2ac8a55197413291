"""Models: what the catalogue of this machine knows, or a server's; and making them smaller."""

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import msgspec
import typer

from engine.choice import gigabytes
from engine.config import ComputeDtype, HfConfig
from engine.paths import expand
from jobs.cli import options, output
from jobs.domain.errors import BatchctlError, InvalidInput
from jobs.model_settings import ModelSettings
from jobs.settings import Settings, resolve_model

_KINDS = ("nf4", "fp4", "int8")

app = typer.Typer(
    help="List the models that requests may name; quantize one.", invoke_without_command=True
)


@app.callback()
def models(
    context: typer.Context,
    *,
    server: Annotated[
        bool, typer.Option("--server", help="Those of the server, not of this machine.")
    ] = False,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """List the models that requests may name; quantize one."""
    if context.invoked_subcommand is not None:
        return
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


@app.command()
def quantize(
    *,
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A name, a folder or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    quantization: Annotated[
        str, typer.Option(metavar="KIND", help="nf4, fp4 (4 bits) or int8.")
    ] = "nf4",
    compute_dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="bfloat16, float16 or float32.")
    ] = "bfloat16",
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Write a model with quantized weights, which then load without being quantized."""
    from engine.registry import quantize_model

    if quantization not in _KINDS:
        raise InvalidInput(
            f"A model is quantized to {', '.join(_KINDS)}, not to {quantization}.",
            param="quantization",
        )
    if compute_dtype not in get_args(ComputeDtype):
        raise InvalidInput(
            f"The compute dtype is one of {', '.join(get_args(ComputeDtype))}, not "
            f"{compute_dtype}.",
            param="compute_dtype",
        )
    settings = options.load_settings(config)
    entry = resolve_model(settings, source, engine="hf", quantization=quantization)[1]
    given: Any = entry.to_engine_config()
    made = quantize_model(
        cast("HfConfig", given).model_copy(update={"compute_dtype": compute_dtype}),
        expand(target).absolute(),
        told=lambda stage: output.say(f"{stage} ..."),
    )
    if as_json:
        output.print_json(msgspec.to_builtins(made))
        return
    output.print_fields(
        [
            ("folder", made.folder),
            ("quantization", made.quantization),
            ("weights", gigabytes(made.stored_bytes)),
            ("before", gigabytes(made.source_bytes)),
        ]
    )


def _describe(settings: Settings, name: str, entry: ModelSettings) -> dict[str, str | bool | None]:
    from engine.registry import describe_model, looks_local

    problem = None
    try:
        _, entry = resolve_model(settings, name)
        if entry.source is not None and looks_local(entry.source):
            describe_model(entry.to_engine_config(), name)
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
