"""How the name of a model that a caller gives becomes one that can run here."""

import importlib.util
import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import SecretStr, TypeAdapter, ValidationError

from engine.choice import Choice, Machine, Plan, choose, find_size, look_around
from engine.config import HfConfig, VllmConfig, is_placed
from engine.gguf import is_gguf
from engine.gguf import read as read_gguf
from engine.paths import expand
from engine.tuning import HF_BATCH_TOKENS, HF_SLOTS, VLLM_BATCH_TOKENS, VLLM_SLOTS
from jobs.domain.errors import EngineMisconfigured, InvalidInput, NotFound
from jobs.model_settings import (
    EngineChoice,
    EngineGroups,
    EngineKind,
    ModelSettings,
    QuantizationChoice,
    RemoteSettings,
    concrete,
    did_you_mean,
    needs_hf,
    needs_vllm,
    option_names,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NEEDED = {
    "hf": ("torch", "transformers"),
    "vllm": ("torch", "vllm"),
    "llamacpp": ("llama_cpp", "transformers"),
}
_OPENAI = "https://api.openai.com"


class Completed(NamedTuple):
    """A model with nothing left open, and what was chosen for it, where anything was."""

    name: str
    settings: ModelSettings
    choice: Choice | None


def resolve(
    models: Mapping[str, ModelSettings],
    name: str,
    *,
    groups: EngineGroups,
    engine: EngineChoice,
    quantization: str | None = None,
    check_installed: bool = True,
    machine: Machine | None = None,
) -> Completed:
    """Return the name and the completed settings of a model: nothing in them says "auto".

    `name` is a name of the catalogue, a local folder or a hub id, tried in this order; on the
    remote engine it may be anything that its server knows.

    Args:
        groups: what the models of each engine start from.
        engine: goes before the entry's own, unless it is "auto".
        quantization: likewise, unless it is None or "auto".
        check_installed: whether the engine will run here, so that it has to be installed, and
            to fit; if not, nothing is looked at, and what is open becomes hf at 16 bit, or vllm
            where the entry's quantization is one that only vllm has.
        machine: what there is to run it on; unset, this one.

    Raises:
        NotFound: there is no such model.
        InvalidInput: the folder holds no model, or the quantization is none that is known.
        EngineMisconfigured: what the engine needs is not installed, or the weights are damaged.
        EngineOutOfMemory: nothing that was left open makes it fit.
    """
    entry = models.get(name) or _from_source(models, name, engine=engine, remote=groups.remote)
    wanted = entry.engine if engine == "auto" else engine
    quantization = _checked_quantization(quantization)
    if wanted == "auto" and not entry.url:
        wanted = _only_engine_with(quantization, entry.quantization)
    kind = concrete(wanted, url=entry.url, source=entry.source)
    choice = None
    changes: dict[str, Any] = {}
    if kind == "remote":
        changes = _remote_changes(name, entry, groups)
    elif kind == "llamacpp":
        changes = _gguf_changes(name, entry, groups, quantization)
        if check_installed:
            _require_installed(kind, name)
            choice = _gguf_choice(name, changes["source"]) if wanted == "auto" else None
    elif kind != "simulated":
        if check_installed:
            machine = machine or look_around()
            kind = machine.best_engine if wanted == "auto" else kind
            _require_installed(kind, name)
        changes = _local_changes(kind, name, entry, groups, quantization)
        asked = str(changes["quantization"])
        if machine is not None and check_installed:
            found = choose(
                name,
                find_size(changes["source"], cache_folder=groups.hf.cache_folder)
                if asked == "auto"
                else None,
                machine,
                plan_of(entry.model_copy(update=changes), groups),
                engine="vllm" if kind == "vllm" else "hf",
                quantization=asked,
            )
            changes["quantization"] = found.quantization
            choice = found if "auto" in {wanted, asked} else None
        elif asked == "auto":
            changes["quantization"] = "none"
    changes |= {"engine": kind, "options": _options_for(kind, entry, groups)}
    unset = {key: getattr(entry, key) for key in type(entry).model_fields}
    try:
        return Completed(name, ModelSettings.model_validate(unset | changes), choice)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise InvalidInput(
            f"The model {name} cannot run so: {where}{first['msg'].removeprefix('Value error, ')}",
            param="model",
        ) from None


def _checked_quantization(word: str | None) -> str | None:
    """Return the one spelling of a quantization that a flag gave."""
    try:
        return TypeAdapter(QuantizationChoice | None).validate_python(word)
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InvalidInput(f"{told[0].upper()}{told[1:]}", param="quantization") from None


def _only_engine_with(*words: str | None) -> EngineChoice:
    """Return the engine that the first of these words that says anything leaves, if only one."""
    if needs_vllm(*words):
        return "vllm"
    return "hf" if needs_hf(*words) else "auto"


def _remote_changes(name: str, entry: ModelSettings, groups: EngineGroups) -> dict[str, Any]:
    url = entry.url or groups.remote.url
    if url is None:
        raise InvalidInput(
            f"The model {name} on the remote engine needs the url of a server: set "
            "`remote.url` (BATCHCTL_REMOTE__URL) or the model's `url`.",
            param="model",
        )
    return {
        "url": url,
        "api_key": entry.api_key or _shared_key(url, groups.remote),
        "served_model": entry.served_model or groups.remote.model,
    }


def _shared_key(url: str, remote: RemoteSettings) -> SecretStr | None:
    """Return the key of `remote` where it is meant for this URL: no key goes to another server.

    It belongs to the origin of `remote.url`; without that it can only be one of OpenAI's.
    """
    return remote.api_key if _origin(url) == _origin(remote.url or _OPENAI) else None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2].lower()


def may_carry_keys(url: str) -> bool:
    """Return whether nobody on the way can read what is sent: TLS, or this very machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme == "https" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _local_changes(
    kind: EngineKind,
    name: str,
    entry: ModelSettings,
    groups: EngineGroups,
    quantization: str | None,
) -> dict[str, Any]:
    if entry.source is None:
        raise InvalidInput(f"The model {name} has no `source`.", param="model")
    if is_gguf(entry.source):
        raise InvalidInput(
            f"The model {name} is a .gguf file, which the llamacpp engine runs; {kind} cannot.",
            param="model",
        )
    folder = expand(entry.source)
    group = groups.vllm if kind == "vllm" else groups.hf
    words = (quantization, entry.quantization, group.quantization)
    changes: dict[str, Any] = {
        "source": str(folder.resolve()) if folder.is_dir() else entry.source,
        "quantization": next((word for word in words if word not in {None, "auto"}), "auto"),
        "token": entry.token or groups.hf.token,
    }
    if kind == "vllm":
        changes["context_tokens"] = entry.context_tokens or groups.vllm.context_tokens
    return changes


def _gguf_changes(
    name: str, entry: ModelSettings, groups: EngineGroups, quantization: str | None
) -> dict[str, Any]:
    if entry.source is None or not is_gguf(entry.source):
        raise InvalidInput(
            f"The model {name} on the llamacpp engine needs a .gguf file as its `source`.",
            param="model",
        )
    word = next((w for w in (quantization, entry.quantization) if w not in {None, "auto"}), None)
    if word is not None:
        raise InvalidInput(
            f"The model {name} has the weights of its .gguf file as they are: quantization {word} "
            "is not possible. Give another file, or leave it out.",
            param="quantization",
        )
    return {
        "source": str(expand(entry.source).resolve()),
        "quantization": None,
        "context_tokens": entry.context_tokens or groups.llamacpp.context_tokens,
    }


def _gguf_choice(name: str, source: str) -> Choice:
    file = read_gguf(source)
    stored = f" ({file.quantization})" if file.quantization else ""
    return Choice(
        engine="llamacpp",
        quantization=file.quantization,
        device="auto",
        reason=f"{name} runs on llamacpp, since its source is a .gguf file{stored}.",
    )


def plan_of(entry: ModelSettings, groups: EngineGroups) -> Plan:
    """Return what the settings of a model say about the memory it would need.

    Those of an engine that cannot be used as they stand count as unset.
    """
    hf, vllm = HfConfig(model=""), VllmConfig(model="")
    with suppress(ValidationError):
        hf = HfConfig.model_validate({"model": "", **_options_for("hf", entry, groups)})
    with suppress(ValidationError):
        vllm = VllmConfig.model_validate({"model": "", **_options_for("vllm", entry, groups)})
    return Plan(
        device=hf.device,
        is_placed=is_placed(hf),
        compute_dtype=hf.compute_dtype,
        context_tokens=entry.context_tokens,
        hf_slots=hf.slots or HF_SLOTS,
        hf_batch_tokens=hf.batch_tokens or HF_BATCH_TOKENS,
        vllm_slots=vllm.slots or VLLM_SLOTS,
        vllm_batch_tokens=vllm.batch_tokens or VLLM_BATCH_TOKENS,
        gpus_per_engine=vllm.tensor_parallel_size * vllm.pipeline_parallel_size,
        gpu_share=vllm.gpu_memory_utilization,
    )


def _options_for(kind: EngineKind, entry: ModelSettings, groups: EngineGroups) -> dict[str, Any]:
    """Return the engine's options: those of its group, then the entry's own that it has."""
    names = option_names(kind)
    group: Mapping[str, Any] = {}
    if kind == "hf":
        group = groups.hf.model_dump(exclude_none=True)
    elif kind == "vllm":
        group = {
            **groups.hf.model_dump(include={"cache_folder"}, exclude_none=True),
            **groups.vllm.model_dump(exclude_none=True),
        }
    elif kind == "llamacpp":
        group = groups.llamacpp.model_dump(exclude_none=True)
    elif kind == "remote":
        group = groups.remote.model_dump(exclude_none=True)
    options = {key: value for key, value in group.items() if key in names}
    return options | {key: value for key, value in entry.options.items() if key in names}


def _from_source(
    models: Mapping[str, ModelSettings],
    name: str,
    *,
    engine: EngineChoice,
    remote: RemoteSettings,
) -> ModelSettings:
    if engine == "simulated":
        return ModelSettings(engine="simulated")
    if engine == "remote":
        return ModelSettings(engine="remote", url=remote.url)
    folder = expand(name)
    if is_gguf(name) and folder.is_file():
        return ModelSettings(source=str(folder.resolve()))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidInput(
                f"The folder {name} holds no model: it has no config.json.", param="model"
            )
        return ModelSettings(source=str(folder.resolve()))
    if remote.url is not None and engine == "auto":
        return ModelSettings(engine="remote", url=remote.url)
    if _HUB_ID.fullmatch(name):
        return ModelSettings(source=name)
    raise NotFound(
        f"There is no model {name!r}.{did_you_mean(name, models)} Known are: "
        f"{', '.join(models)}; a local folder, a .gguf file or a hub id (owner/name) also does.",
        param="model",
    )


def _require_installed(kind: EngineKind, name: str) -> None:
    missing = [one for one in _NEEDED.get(kind, ()) if importlib.util.find_spec(one) is None]
    if missing:
        raise EngineMisconfigured(
            f"The model {name} runs on the {kind} engine, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'batchctl[{kind}]'. Without a model: --engine simulated."
        )
