"""Options that several commands share, and the settings that they lead to."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import stamina.instrumentation
import typer

from jobs.cli import output
from jobs.client import Client
from jobs.domain.errors import InvalidInput
from jobs.domain.mixed import BATCH_ENDPOINTS, MIXED
from jobs.domain.request import CHAT, Constraint
from jobs.prepare import Source, prepare_input
from jobs.settings import Settings, load, origins
from jobs.telemetry import configure_logging

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file; else BATCHCTL_CONFIG or ./batchctl.toml."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the database, files and runs; else BATCHCTL_DATA."),
]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="The server; else BATCHCTL_BASE_URL.")
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="Its key; better in BATCHCTL_API_KEY.")
]
_MAX_KEY_CHARS = 250
"""Of the 255 that the server takes: what a submission uploads has a longer one."""
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="Requests as JSONL, or with --prompt a CSV or records as JSONL; - is stdin.",
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint", metavar="PATH", help="If not the first line's url; mixed: each its own."
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", help="Run on this model, whatever the lines name.")
]
Schema = Annotated[
    Path | None,
    typer.Option("--schema", metavar="FILE", help="JSON schema that every answer has to fit."),
]
OutputType = Annotated[
    str | None,
    typer.Option(
        "--output-type", metavar="MODULE:NAME", help="The same as a pydantic or outlines type."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", metavar="TEMPLATE", help='Asks it of every record: "Classify: {text}".'
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message, with --prompt.")
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Longest answer, with --prompt.")
]
IdColumn = Annotated[
    str | None,
    typer.Option("--id-column", metavar="NAME", help="Column of the custom_id, with --prompt."),
]
Reuse = Annotated[
    bool,
    typer.Option("--reuse", help="Take answers of earlier batches, and give this one's to later."),
]
BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help="Id of a batch: batch_...")]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="Id of a file: file-...")]


def load_settings(config: Path | None, *, quiet: bool = True, **flags: Any) -> Settings:  # noqa: ANN401  typed by Settings
    """Return the settings in force, with logging set up as they say.

    Args:
        quiet: log warnings only, unless a level was chosen; a command that talks to a person has
            its own words for what goes on.
        flags: as `jobs.settings.load` takes them.
    """
    settings = load(config, **flags)
    level = settings.log.level
    if quiet and any(o.name == "log.level" and o.origin == "default" for o in origins(settings)):
        level = "warning"
    configure_logging(level=level, form=settings.log.format)
    return settings


def open_client(config: Path | None, base_url: str | None, api_key: str | None) -> Client:
    """Return a client of the server that flags and settings name."""
    settings = load_settings(config, base_url=base_url, api_key=api_key)
    # The client says itself when it tries again; stamina would log it a second time.
    stamina.instrumentation.set_on_retry_hooks([])
    key = settings.api_key
    told: set[str] = set()

    def say_once(reason: str) -> None:
        if reason not in told:
            told.add(reason)
            output.say(f"{output.one_line(reason)}; trying again ...", style="yellow")

    return Client(
        settings.base_url,
        api_key=key.get_secret_value() if key is not None else None,
        on_retry=say_once,
    )


def parse_pairs(pairs: list[str]) -> dict[str, str]:
    """Return what `--metadata key=value` said, given any number of times."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--metadata")
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--metadata")
        found[name] = value
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """How an input is made into request lines: what --prompt, --schema and the like said."""

    prompt: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    id_column: str | None = None
    model: str | None = None
    constraint: Constraint | None = None

    @classmethod
    def of(
        cls,
        *,
        prompt: str | None,
        system: str | None,
        max_tokens: int | None,
        id_column: str | None,
        model: str | None,
        schema: Path | None,
        output_type: str | None,
    ) -> Self:
        """Return it, after loading the schema or type.

        Raises:
            InvalidInput: the schema is none, or the type is not to be had.
        """
        for name, value in (
            ("--system", system),
            ("--max-tokens", max_tokens),
            ("--id-column", id_column),
        ):
            if value is not None and prompt is None:
                raise typer.BadParameter("it needs --prompt", param_hint=name)
        return cls(
            prompt=prompt,
            system=system,
            max_tokens=max_tokens,
            id_column=id_column,
            model=model,
            constraint=load_constraint(schema, output_type),
        )

    @property
    def changes_lines(self) -> bool:
        """Whether the lines are made or changed, and not passed on as they are."""
        return self.prompt is not None or self.constraint is not None

    @property
    def batch_model(self) -> str | None:
        """What the batch runs on whatever its lines name; made lines name it themselves."""
        return self.model if self.prompt is None else None

    def with_default_model(self, name: str) -> Self:
        """Return it with the model that made lines name where none was chosen."""
        if self.prompt is None or self.model is not None:
            return self
        return replace(self, model=name)

    def endpoint_for(self, source: Source, chosen: str | None) -> str:
        """Return the endpoint: the chosen one, else what the first line says, else chat.

        Raises:
            InvalidInput: it is none that is served.
        """
        if self.prompt is not None and chosen == MIXED:
            raise typer.BadParameter(
                "lines that are made with --prompt are all for one", param_hint="--endpoint"
            )
        return check_endpoint(chosen or (source.endpoint if self.prompt is None else None))

    def prepare(self, source: Source, endpoint: str) -> Iterator[bytes]:
        """Yield pieces of the request lines."""
        return prepare_input(
            source,
            prompt=self.prompt,
            model=self.model,
            constraint=self.constraint,
            endpoint=endpoint,
            system=self.system,
            max_tokens=self.max_tokens,
            id_column=self.id_column,
        )


def check_endpoint(endpoint: str | None) -> str:
    """Return the endpoint of a batch; chat where nobody says, so that planning lists the faults.

    Raises:
        InvalidInput: it is none that is served.
    """
    endpoint = endpoint or CHAT
    if endpoint not in BATCH_ENDPOINTS:
        raise InvalidInput(
            f"Endpoint {output.one_line(endpoint)} is not served; use "
            f"{' or '.join(BATCH_ENDPOINTS)}.",
            param="endpoint",
        )
    return endpoint


def load_constraint(schema: Path | None, output_type: str | None) -> Constraint | None:
    """Return what --schema or --output-type asks of every answer.

    Raises:
        InvalidInput: the schema is none, or the type is not to be had.
    """
    if schema is not None and output_type is not None:
        raise typer.BadParameter("give one of --schema and --output-type", param_hint="--schema")
    if schema is None and output_type is None:
        return None
    # A type brings outlines or pydantic models of the person along.
    from engine.output_types import load_output_type, load_schema_file

    if schema is not None:
        return load_schema_file(schema)
    return load_output_type(output_type or "")


def check_output_place(path: Path | None) -> None:
    """Check that a results file can be written, before any work is done for it.

    Raises:
        InvalidInput: it is a folder, or its folder is not there.
    """
    if path is None:
        return
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name a file in it.", param="output")
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"The folder of {path} does not exist.", param="output")


def check_key(key: str | None) -> None:
    """Check an idempotency key, before anything is sent under it.

    Raises:
        BadParameter: no header can hold it.
    """
    if key is None or (0 < len(key) <= _MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        return
    raise typer.BadParameter(
        f"a key is 1 to {_MAX_KEY_CHARS} printable ASCII characters", param_hint="--idempotency-key"
    )
