"""What an installation says of its models: the sections of their engines, and their entries."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

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
)
from engine.demo import model_path
from engine.gguf import is_gguf
from jobs.domain.errors import InvalidInput

EngineKind = Literal["hf", "vllm", "llamacpp", "remote", "simulated"]
EngineChoice = Literal["auto", "hf", "vllm", "llamacpp", "remote", "simulated"]

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
        if self.engine == "hf" and needs_vllm(self.quantization):
            raise ValueError(_not_of_hf(str(self.quantization)))
        if self.engine == "vllm" and needs_hf(self.quantization):
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
            return option_names(self.engine)
        if self.source is not None and is_gguf(self.source):
            return option_names("llamacpp")
        return option_names("hf") | option_names("vllm") | option_names("remote")

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


def _limiter_fields(limiter: Limiter | None) -> dict[str, str]:
    if limiter is None:
        return {}
    return {
        "limiter_url": limiter.url.get_secret_value(),
        "limiter_prefix": limiter.prefix,
        "limiter_master": limiter.master,
    }


def needs_vllm(*words: str | None) -> bool:
    """Return whether the first of these words that says anything is one that hf does not have."""
    return _said(words) not in _OF_HF


def needs_hf(*words: str | None) -> bool:
    """Return whether the first of these words that says anything is one that only hf has."""
    return _said(words) not in _OF_VLLM


def _said(words: Iterable[str | None]) -> str:
    return next((word for word in words if word not in {None, "auto"}), None) or "none"


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


def option_names(kind: EngineKind) -> frozenset[str]:
    """Return what an entry's `options` may name on this engine."""
    return frozenset(_CONFIGS[kind].model_fields) - _SPELLED
