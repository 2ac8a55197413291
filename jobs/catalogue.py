"""The models an installation knows, and how the name that a caller gives becomes one of them."""

import difflib
import importlib.util
import ipaddress
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from engine.choice import Choice, Machine, Plan, choose, find_size, look_around
from engine.config import (
    DEVICE_MAP_HELP,
    DROPPED_BY_VLLM,
    MAX_MEMORY_HELP,
    AskingConfig,
    DeviceMap,
    EngineConfig,
    GenerationDefaults,
    HfConfig,
    HfQuantization,
    LlamacppConfig,
    MaxMemory,
    NativeConstraints,
    RemoteConfig,
    SimulatedConfig,
    VllmConfig,
    VllmDtype,
    VllmQuantization,
    is_placed,
)
from engine.demo import model_path
from engine.gguf import is_gguf
from engine.gguf import read as read_gguf
from engine.tuning import HF_BATCH_TOKENS, HF_SLOTS, VLLM_BATCH_TOKENS, VLLM_SLOTS
from jobs.domain.errors import EngineMisconfigured, InvalidInput, NotFound

EngineKind = Literal["hf", "vllm", "llamacpp", "remote", "simulated"]
EngineChoice = Literal["auto", "hf", "vllm", "llamacpp", "remote", "simulated"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NEEDED = {
    "hf": ("torch", "transformers"),
    "vllm": ("torch", "vllm"),
    "llamacpp": ("llama_cpp", "transformers"),
}
_CONFIGS: Mapping[EngineKind, type[BaseModel]] = {
    "hf": HfConfig,
    "vllm": VllmConfig,
    "llamacpp": LlamacppConfig,
    "remote": RemoteConfig,
    "simulated": SimulatedConfig,
}
# Fields of an engine's own settings that a model entry spells itself.
_SPELLED = frozenset(
    {
        "kind",
        "model",
        "revision",
        "trusted_code",
        "quantization",
        "context_tokens",
        "token",
        "url",
        "api_key",
        "served_model",
        "limiter_url",
        "limiter_prefix",
        "limiter_master",
        "defaults",
        "asking",
    }
)
_OPENAI = "https://api.openai.com"
_COMMIT_CHARS = 40


_OTHER_WORDS = {
    "4bit": "nf4",
    "8bit": "int8",
    "bnb": "nf4",
    "bitsandbytes": "nf4",
    "": "none",
}


def _spelled_quantization(value: object) -> object:
    """Return the one spelling of what the field calls by several names."""
    if isinstance(value, str):
        word = value.strip().lower()
        return _OTHER_WORDS.get(word, word)
    return value


_OF_HF = frozenset(get_args(HfQuantization))
_OF_VLLM = frozenset(get_args(VllmQuantization))


def _known_quantization(*words: str) -> AfterValidator:
    """Return a check that a word is one of these or "auto"."""

    def check(word: str) -> str:
        if word == "auto" or word in words:
            return word
        if word in DROPPED_BY_VLLM:
            raise ValueError(f"{word} is not possible: {DROPPED_BY_VLLM[word]}.")
        if word in _OF_VLLM:
            raise ValueError(_not_of_hf(word))
        if word in _OF_HF:
            raise ValueError(_not_of_vllm(word))
        raise ValueError(
            f"there is no quantization {word!r}.{did_you_mean(word, words)} Known are: auto, "
            f"{', '.join(words)}."
        )

    return AfterValidator(check)


def _not_of_hf(word: str) -> str:
    return f"only the vllm engine has {word}; hf has auto, {', '.join(get_args(HfQuantization))}."


def _not_of_vllm(word: str) -> str:
    return f"only the hf engine has {word}; vllm has auto, {', '.join(get_args(VllmQuantization))}."


_Spelled = Annotated[str, BeforeValidator(_spelled_quantization)]
HfQuantizationChoice = Annotated[_Spelled, _known_quantization(*get_args(HfQuantization))]
VllmQuantizationChoice = Annotated[_Spelled, _known_quantization(*get_args(VllmQuantization))]
QuantizationChoice = Annotated[
    _Spelled,
    _known_quantization(*dict.fromkeys((*get_args(VllmQuantization), *get_args(HfQuantization)))),
]


class HfSettings(BaseModel):
    """What every model on the hf engine starts from; a model's own entry goes before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, cuda, cuda:N or mps",
    )
    device_map: DeviceMap | None = Field(default=None, description=DEVICE_MAP_HELP)
    max_memory: MaxMemory | None = Field(default=None, description=MAX_MEMORY_HELP)
    quantization: HfQuantizationChoice = Field(
        default="auto",
        description="none, nf4 or fp4 for 4-bit weights, int8 for 8-bit ones, or auto: nf4 if only "
        "that fits the device",
    )
    flash_attention: bool = Field(default=False, description="use the FlashAttention kernels")
    cache_folder: str | None = Field(
        default=None,
        description="where models of the hub are kept; unset: the hub library's choice",
    )
    token: SecretStr | None = Field(default=None, description="hub token, for gated models")


class VllmSettings(BaseModel):
    """What every model on the vllm engine starts from; a model's own entry goes before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share each layer")
    pipeline_parallel_size: int = Field(
        default=1, ge=1, description="groups of GPUs that share the layers"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of a GPU's memory that vLLM takes"
    )
    quantization: VllmQuantizationChoice = Field(
        default="auto",
        description="none, nf4, awq, awq_marlin, gptq, gptq_marlin, marlin, fp8, nvfp4, or auto: "
        "nf4 if only that fits the GPUs",
    )
    context_tokens: int | None = Field(
        default=None, ge=1, description="prompt and answer together; unset: the model's own"
    )
    prefix_caching: bool = Field(
        default=True, description="compute equal beginnings of prompts once"
    )
    dtype: VllmDtype = Field(default="auto", description="auto, bfloat16, float16 or float32")
    engine_args: dict[str, Any] = Field(
        default={}, description="any further argument of vLLM's engine, by its Python name"
    )


class LlamacppSettings(BaseModel):
    """What every model on the llamacpp engine starts from; a model's own entry goes before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_layers: int = Field(
        default=-1,
        ge=-1,
        description="layers on the GPU or on Metal, where llama.cpp was built for one; -1: all, "
        "0: none",
    )
    context_tokens: int | None = Field(
        default=None, ge=1, description="prompt and answer together; unset: the model's own"
    )
    threads: int | None = Field(default=None, ge=1, description="unset: one for each core")
    batch_tokens: int = Field(default=512, ge=1, description="token budget of one step")
    mmap: bool = Field(default=True, description="map the file instead of reading it")
    mlock: bool = Field(default=False, description="keep the weights from being swapped out")
    repack: bool = Field(
        default=False,
        description="rearrange quantized weights for this processor: faster, and some builds die "
        "of it (SIGILL)",
    )


class RemoteSettings(BaseModel):
    """What every model on the remote engine starts from; a model's own entry goes before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        default=None, description="base URL of an OpenAI-compatible server, with or without /v1"
    )
    api_key: SecretStr | None = Field(default=None, description="its key")
    model: str | None = Field(
        default=None, description="what that server calls the model; unset: as the lines do"
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="how long a request may go without any progress"
    )
    patience_seconds: float = Field(
        default=600.0,
        gt=0,
        description="how long that server may fail every request before its work is given back",
    )
    native_constraints: NativeConstraints = Field(
        default="openai",
        description="how schemas are sent: openai (response_format), vllm (structured_outputs as "
        "well) or none; answers are validated in every case",
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, description="limit of that server, for all workers together"
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="limit of that server, for all workers together"
    )


class EngineGroups(BaseModel):
    """The settings that the models on each engine start from."""

    model_config = ConfigDict(frozen=True)

    hf: HfSettings = HfSettings()
    vllm: VllmSettings = VllmSettings()
    llamacpp: LlamacppSettings = LlamacppSettings()
    remote: RemoteSettings = RemoteSettings()


class Limiter(BaseModel):
    """The Redis in which the workers of one remote server share its limits."""

    model_config = ConfigDict(frozen=True)

    url: SecretStr
    prefix: str
    master: str


class ModelSettings(BaseModel):
    """One model of the catalogue: what to load, on which engine, and how it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["chat", "completion"] = Field(
        default="chat", description="chat, or completion for a model without a chat template"
    )
    source: str | None = Field(default=None, description="a local folder, a .gguf file or a hub id")
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub id; a commit is reproducible"
    )
    trusted_code: str | None = Field(
        default=None,
        pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$",
        description="lets the model's own Python code run: the commit of a hub id, or the digest "
        "of a folder's code that a refusal names; unset: no code of a model runs",
    )
    engine: EngineChoice = Field(
        default="auto", description="auto, hf, vllm, llamacpp, remote or simulated"
    )
    url: str | None = Field(
        default=None, description="the server of a remote model; unset: `remote.url`"
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="its key; unset: `remote.api_key`, on the server of `remote.url`; without that "
        "on https://api.openai.com",
    )
    served_model: str | None = Field(
        default=None, description="what that server calls the model; unset: `remote.model`"
    )
    quantization: QuantizationChoice | None = Field(
        default=None,
        description="none, nf4, int8 or another that the engine has; unset or auto: what "
        "`hf.quantization` or `vllm.quantization` says",
    )
    context_tokens: int | None = Field(
        default=None, ge=1, description="prompt and answer together; unset: the model's own"
    )
    token: SecretStr | None = Field(
        default=None, description="hub token of this model; unset: what `hf.token` says"
    )
    defaults: GenerationDefaults = Field(
        default=GenerationDefaults(),
        description="sampling parameters of lines that leave them out",
    )
    asking: AskingConfig = AskingConfig()
    options: dict[str, Any] = Field(
        default={}, description="further settings of the engine, by their names"
    )

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.engine == "hf" and _needs_vllm(self.quantization):
            raise ValueError(_not_of_hf(str(self.quantization)))
        if self.engine == "vllm" and _needs_hf(self.quantization):
            raise ValueError(_not_of_vllm(str(self.quantization)))
        known = self._known_options()
        for name in self.options:
            if name in known:
                continue
            if name in DROPPED_BY_VLLM:
                why = DROPPED_BY_VLLM[name]
                raise ValueError(f"there is no option {name!r}: {why}; leave it out.")
            which = f"the {self.engine} engine has" if self.engine != "auto" else "no engine has"
            no = "no " if self.engine != "auto" else ""
            raise ValueError(f"{which} {no}option {name!r}.{did_you_mean(name, known)}")
        if self.engine == "auto" and not self.url:
            return self  # which engine's they are is known when one has been chosen
        try:
            self.to_engine_config()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"option {where}: {first['msg']}") from None
        except InvalidInput:  # no source yet: asked for when the model is used
            pass
        return self

    @model_validator(mode="after")
    def _check_trust(self) -> Self:
        if self.trusted_code is not None and self.engine not in {"auto", "hf", "vllm"}:
            raise ValueError(f"trusted_code: the {self.engine} engine runs no code of a model.")
        if self._trusted_commit is not None and self.revision not in {None, self._trusted_commit}:
            raise ValueError("trusted_code and revision name two commits; leave revision out.")
        return self

    @property
    def _trusted_commit(self) -> str | None:
        pin = self.trusted_code
        return pin if pin is not None and len(pin) == _COMMIT_CHARS else None

    def _known_options(self) -> frozenset[str]:
        if self.engine != "auto":
            return _option_names(self.engine)
        if self.source is not None and is_gguf(self.source):
            return _option_names("llamacpp")
        return _option_names("hf") | _option_names("vllm") | _option_names("remote")

    def to_engine_config(self, *, limiter: Limiter | None = None) -> EngineConfig:
        """Return what the engine process is started with; for "auto", see `concrete`.

        A quantization that is open means 16 bit: `resolve` is what looks at the machine.

        Args:
            limiter: where the workers of a remote server share its limits.

        Raises:
            InvalidInput: a model without a source or a url, as its engine needs it.
        """
        kind = concrete(self.engine, url=self.url, source=self.source)
        shared: dict[str, Any] = {**self.options, "defaults": self.defaults, "asking": self.asking}
        if self.context_tokens is not None:
            shared["context_tokens"] = self.context_tokens
        if kind == "simulated":
            return SimulatedConfig.model_validate(shared)
        if kind == "remote":
            if self.url is None:
                raise InvalidInput(
                    "A model of the remote engine needs a `url` (or set `remote.url`).", param="url"
                )
            return RemoteConfig.model_validate(
                {
                    **shared,
                    "url": self.url,
                    "api_key": self.api_key.get_secret_value() if self.api_key else None,
                    "served_model": self.served_model,
                    **_limiter_fields(limiter),
                }
            )
        if self.source is None:
            raise InvalidInput(f"A model of the {kind} engine needs a `source`.", param="source")
        if kind == "llamacpp":
            return LlamacppConfig.model_validate({**shared, "model": self.source})
        loaded = {
            **shared,
            "model": self.source,
            "revision": self.revision or self._trusted_commit,
            "trusted_code": self.trusted_code,
            "quantization": "none" if self.quantization in {None, "auto"} else self.quantization,
            "token": self.token.get_secret_value() if self.token else None,
        }
        return (
            VllmConfig.model_validate(loaded) if kind == "vllm" else HfConfig.model_validate(loaded)
        )


BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "demo": {"source": str(model_path())},
    "simulated": {"engine": "simulated"},
}
"""The models that are always there, the demo model first."""


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


def _needs_vllm(*words: str | None) -> bool:
    """Return whether the first of these words that says anything is one that hf does not have."""
    return _said(words) not in _OF_HF


def _needs_hf(*words: str | None) -> bool:
    """Return whether the first of these words that says anything is one that only hf has."""
    return _said(words) not in _OF_VLLM


def _only_engine_with(*words: str | None) -> EngineChoice:
    """Return the engine that the first of these words that says anything leaves, if only one."""
    if _needs_vllm(*words):
        return "vllm"
    return "hf" if _needs_hf(*words) else "auto"


def _said(words: Iterable[str | None]) -> str:
    return next((word for word in words if word not in {None, "auto"}), None) or "none"


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


def _limiter_fields(limiter: Limiter | None) -> dict[str, str]:
    if limiter is None:
        return {}
    return {
        "limiter_url": limiter.url.get_secret_value(),
        "limiter_prefix": limiter.prefix,
        "limiter_master": limiter.master,
    }


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
    folder = Path(entry.source).expanduser()
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
        "source": str(Path(entry.source).expanduser().resolve()),
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
    names = _option_names(kind)
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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the nearest of the known names, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def concrete(engine: EngineChoice, *, url: str | None, source: str | None = None) -> EngineKind:
    """Return the engine that is meant.

    "auto" is remote where there is a url, llamacpp where the source is a .gguf file, else hf.
    """
    if engine != "auto":
        return engine
    if url:
        return "remote"
    return "llamacpp" if source is not None and is_gguf(source) else "hf"


def _option_names(kind: EngineKind) -> frozenset[str]:
    return frozenset(_CONFIGS[kind].model_fields) - _SPELLED


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
    folder = Path(name).expanduser()
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
