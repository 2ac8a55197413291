"""`batchctl worker`: the workers of a machine; `batchctl workers`: those of the whole system."""

import socket
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.paths import expand
from jobs.cli import options, output

if TYPE_CHECKING:
    from jobs.worker.launcher import Event

_ADVICE = "Stopping: what is finished is written, the rest is given back; Ctrl-C again kills."


def worker(
    *,
    gpus: Annotated[
        str | None, typer.Option(metavar="all|0,1|none", help="GPUs to use; all if nothing says.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="A,B", help="Models to serve; else the whole catalogue.")
    ] = None,
    role: Annotated[
        Literal["engine", "control", "all"] | None,
        typer.Option(help="engine runs requests, control plans and finalizes."),
    ] = None,
    engines: Annotated[
        int | None, typer.Option(min=1, help="Engine workers on a machine without GPUs.")
    ] = None,
    data: options.Data = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Run the workers of this machine: one for each group of GPUs, and one for control."""
    from engine.devices import discover_visible
    from jobs.worker.launcher import launch
    from jobs.worker.roster import DRAIN_MARGIN_SECONDS, plan_commands

    flags = {
        "data": str(expand(data).absolute()) if data is not None else None,
        "worker__gpus": gpus,
        "worker__models": [name.strip() for name in models.split(",")] if models else None,
        "worker__role": role,
        "worker__engines": engines,
    }
    settings = options.load_settings(config, quiet=False, **flags)
    commands = plan_commands(
        settings, found=discover_visible(), host=socket.gethostname(), config=config, flags=flags
    )
    drains = False

    def tell(event: "Event") -> None:
        nonlocal drains
        if event.kind == "draining" and not drains:
            drains = True
            output.say(_ADVICE)
        if as_json:
            output.print_json_line(asdict(event))
        elif event.kind == "started":
            output.write(f"{event.name} runs on {event.device} (process {event.pid})\n")
        elif event.kind != "draining":
            output.say(_describe(event))

    launch(
        commands,
        patience_seconds=settings.leases.drain_seconds + DRAIN_MARGIN_SECONDS,
        on_event=tell,
    )


def _describe(event: "Event") -> str:
    again = f"; it starts again in {event.pause_seconds:g} s" if event.pause_seconds else ""
    match event.kind:
        case "failed":
            return f"{event.name} cannot be started: {event.error}{again}."
        case "killed":
            return f"{event.name} did not stop in time and is killed (process {event.pid})."
        case _:
            code = event.code or 0
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            return f"{event.name} {how} (process {event.pid}){again}."


def workers(
    *,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """List the workers of a server: those that live, and those that were lost lately."""
    with options.open_client(config, base_url, api_key) as client:
        if as_json:
            output.print_json(client.list_json_workers())
            return
        found = client.list_workers()
    output.print_table(
        ("host", "~device", "role", "~model", "state", ">shards", ">tokens/s", ">heartbeat", "?id"),
        (
            (
                one.host,
                one.device or "",
                one.role,
                one.model or ", ".join(one.models),
                one.state,
                one.num_shards,
                f"{one.tokens_per_second:.0f}",
                output.duration(one.heartbeat_age_seconds),
                one.id,
            )
            for one in found
        ),
    )
    for one in found:
        if one.reason:
            output.say(f"{one.id}: {one.reason}")
