"""The entry of `batchctl`: its commands, and what becomes of every error.

A mistake of the person is one line on standard error and an exit code of `jobs.cli.exits`; a
traceback is shown only when BATCHCTL_LOG__LEVEL is debug.
"""

import io
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException
from typing_extensions import override

from jobs.cli import (
    batches,
    config,
    database,
    doctor,
    exits,
    files,
    models,
    output,
    serve,
    upkeep,
    validate,
    worker,
)
from jobs.domain.errors import BatchctlError

_DEBUG = "set BATCHCTL_LOG__LEVEL=debug for the traceback"


class _Group(TyperGroup):
    """Ends every error in one line and one exit code, for the program and for tests alike."""

    @override
    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        try:
            code = super().main(
                args=args,
                prog_name=prog_name,
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
            sys.stdout.flush()
        except BrokenPipeError:
            output.quiet_stdout()
            code = exits.BROKEN_PIPE
        except BaseException as error:  # noqa: BLE001  sorted out by _explain
            code = _explain(error)
        sys.exit(code if isinstance(code, int) else exits.OK)

    @override
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load_run() if name == "run" else command, rest

    @override
    def invoke(self, ctx: Any) -> Any:
        # Here, because typer has its own answers to these two further out.
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            output.quiet_stdout()
            raise typer.Exit(exits.BROKEN_PIPE) from None
        except KeyboardInterrupt:
            output.say("Interrupted.")
            raise typer.Exit(exits.INTERRUPTED) from None


def _load_run() -> Any:  # noqa: ANN401  a click command, whichever click typer brings
    """Return the real `run`, which brings database and engines along: half a second of imports."""
    from jobs.cli.run import run

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command("run")(run)
    return typer.main.get_command(alone)


def _explain(error: BaseException) -> int:
    """Say what happened, where anything is to be said; return the exit code."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else exits.INTERNAL
        case BatchctlError():
            code = exits.for_error(error)
            if code == exits.INTERNAL:
                _show_traceback(error)
            output.report(error.message)
            return code
        case Abort():
            return exits.INTERRUPTED
        case TyperException():
            return _explain_usage(error)
        case OSError() if error.strerror:
            _show_traceback(error)
            where = f"{error.filename}: " if error.filename else ""
            output.report(f"{where}{error.strerror}.")
            return exits.REFUSED if error.filename else exits.INTERNAL
    shown = _show_traceback(error)
    hint = "" if shown else f" ({_DEBUG})"
    output.report(f"{type(error).__name__}: {output.one_line(error)[:300]}{hint}")
    return exits.INTERNAL


def _explain_usage(error: TyperException) -> int:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        if error.message:
            output.console.print(error.message)
        return exits.USAGE
    command = context.command_path if context is not None else "batchctl"
    message = output.one_line(error.format_message()).rstrip(".")
    output.report(f"{message}. See {command} --help.")
    return exits.USAGE


def _show_traceback(error: BaseException) -> bool:
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        return False
    output.console.print(output.clean("".join(traceback.format_exception(error))).rstrip())
    return True


def _show_version(wanted: bool) -> None:  # noqa: FBT001  typer calls it so
    if wanted:
        try:
            output.write(f"batchctl {version('batchctl')}\n")
        except PackageNotFoundError:
            output.write("batchctl, not installed\n")
        raise typer.Exit


app = typer.Typer(
    name="batchctl",
    cls=_Group,
    help="Run batches of language-model requests, here or on a server.",
    epilog="Exit codes: 0 done, 1 internal, 2 usage, 3 input refused, 4 some requests failed, "
    "5 not found, 6 unreachable, 7 cancelled or expired, 8 conflict, 9 engine, 10 audit failed, "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback()
def _options(
    _version: Annotated[
        bool | None,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and end."
        ),
    ] = None,
) -> None:
    """Run batches of language-model requests, here or on a server."""


_HERE, _CLIENT, _OPERATE = "On this machine", "With a server", "Operating"


@app.command("run", rich_help_panel=_HERE)
def _run() -> None:
    """Run a batch on this machine: requests in, answers out."""


app.command("validate", rich_help_panel=_HERE)(validate.validate)
app.command("serve", rich_help_panel=_HERE)(serve.serve)
app.command("submit", rich_help_panel=_CLIENT)(batches.submit)
app.command("status", rich_help_panel=_CLIENT)(batches.status)
app.command("watch", rich_help_panel=_CLIENT)(batches.watch)
app.command("results", rich_help_panel=_CLIENT)(batches.results)
app.command("cancel", rich_help_panel=_CLIENT)(batches.cancel)
app.command("list", rich_help_panel=_CLIENT)(batches.list_)
app.add_typer(files.app, name="files", rich_help_panel=_CLIENT)
app.command("doctor", rich_help_panel=_OPERATE)(doctor.doctor)
app.add_typer(models.app, name="models", rich_help_panel=_OPERATE)
app.command("worker", rich_help_panel=_OPERATE)(worker.worker)
app.command("workers", rich_help_panel=_OPERATE)(worker.workers)
app.command("audit", rich_help_panel=_OPERATE)(upkeep.audit)
app.command("collect", rich_help_panel=_OPERATE)(upkeep.collect)
app.add_typer(config.app, name="config", rich_help_panel=_OPERATE)
app.add_typer(database.app, name="db", rich_help_panel=_OPERATE)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character gets its number, not a traceback.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="batchctl")
    except SystemExit as ended:
        if ended.code == exits.INTERRUPTED:
            # A second Ctrl-C while the interpreter ends would show a traceback of its own.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise


if __name__ == "__main__":
    main()
