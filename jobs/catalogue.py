"""The models an installation knows, and how the name that a caller gives becomes one of them."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from engine.config import (
    AskingConfig,
    EngineConfig,
    GenerationDefaults,
    HfConfig,
    Quantization,
    SimulatedConfig,
)
from engine.demo import model_path
from jobs.domain.errors import EngineMisconfigured, InvalidInput, NotFound

EngineChoice = Literal["auto", "hf", "simulated"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NEEDED = {"hf": ("torch", "transformers")}
# Fields of an engine's own settings that a model entry spells itself.
_SPELLED = frozenset(
    {
        "kind",
        "model",
        "revision",
        "quantization",
        "context_tokens",
        "token",
        "defaults",
        "asking",
    }
)


def _spelled_quantization(value: object) -> object:
    """Return the one spelling of what the field calls by several names."""
    if isinstance(value, str):
        word = value.strip().lower()
        return {"4bit": "nf4", "bnb": "nf4", "bitsandbytes": "nf4", "": "none"}.get(word, word)
    return value


QuantizationChoice = Annotated[Quantization, BeforeValidator(_spelled_quantization)]


class HfSettings(BaseModel):
    """What every model on the hf engine starts from; a model's own entry goes before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, cuda, cuda:N or mps",
    )
    quantization: QuantizationChoice = Field(
        default="none", description="none, or nf4 for 4-bit weights"
    )
    flash_attention: bool = Field(default=False, description="use the FlashAttention kernels")
    cache_folder: str | None = Field(
        default=None,
        description="where models of the hub are kept; unset: the hub library's choice",
    )
    token: SecretStr | None = Field(default=None, description="hub token, for gated models")


class ModelSettings(BaseModel):
    """One model of the catalogue: what to load, on which engine, and how it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["chat", "completion"] = Field(
        default="chat", description="chat, or completion for a model without a chat template"
    )
    source: str | None = Field(default=None, description="a local folder or a hub id")
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub id; a commit is reproducible"
    )
    engine: EngineChoice = Field(default="auto", description="auto, hf or simulated")
    quantization: QuantizationChoice | None = Field(
        default=None, description="none or nf4; unset: what `hf.quantization` says"
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
    options: dict[str, bool | int | float | str] = Field(
        default={}, description="further settings of the engine, by their names"
    )

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        kind = _concrete(self.engine)
        known = _option_names(kind)
        for name in self.options:
            if name not in known:
                raise ValueError(
                    f"the {kind} engine has no option {name!r}.{did_you_mean(name, known)}"
                )
        try:
            self.to_engine_config()
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except InvalidInput:  # no source yet: asked for when the model is used
            pass
        return self

    def to_engine_config(self) -> EngineConfig:
        """Return what the engine process is started with; "auto" means hf.

        Raises:
            InvalidInput: an hf model without a source.
        """
        shared: dict[str, Any] = {"defaults": self.defaults, "asking": self.asking}
        if self.context_tokens is not None:
            shared["context_tokens"] = self.context_tokens
        if _concrete(self.engine) == "simulated":
            return SimulatedConfig.model_validate({**self.options, **shared})
        if self.source is None:
            raise InvalidInput("A model of the hf engine needs a `source`.", param="source")
        return HfConfig.model_validate(
            {
                **self.options,
                **shared,
                "model": self.source,
                "revision": self.revision,
                "quantization": self.quantization or "none",
                "token": self.token.get_secret_value() if self.token else None,
            }
        )


BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "demo": {"source": str(model_path())},
    "simulated": {"engine": "simulated"},
}
"""The models that are always there, the demo model first."""


def resolve(
    models: Mapping[str, ModelSettings],
    name: str,
    *,
    hf: HfSettings,
    engine: EngineChoice,
    quantization: str | None = None,
    check_installed: bool = True,
) -> tuple[str, ModelSettings]:
    """Return the name and the completed settings of a model: nothing in them says "auto".

    `name` is a name of the catalogue, a local folder or a hub id, tried in this order.

    Args:
        engine: goes before the entry's own, unless it is "auto".
        quantization: likewise, unless it is None.
        check_installed: whether the engine will run here, so that it has to be installed.

    Raises:
        NotFound: there is no such model.
        InvalidInput: the folder holds no model, or the quantization is none that is known.
        EngineMisconfigured: what the engine needs is not installed.
    """
    entry = models.get(name) or _from_source(models, name, simulated=engine == "simulated")
    kind = _concrete(entry.engine if engine == "auto" else engine)
    if check_installed:
        _require_installed(kind, name)
    changes: dict[str, Any] = {"engine": kind}
    if kind == "hf":
        if entry.source is None:
            raise InvalidInput(f"The model {name} has no `source`.", param="model")
        folder = Path(entry.source).expanduser()
        changes |= {
            "source": str(folder.resolve()) if folder.is_dir() else entry.source,
            "quantization": quantization or entry.quantization or hf.quantization,
            "token": entry.token or hf.token,
            "options": {
                **hf.model_dump(
                    include={"device", "flash_attention", "cache_folder"}, exclude_none=True
                ),
                **entry.options,
            },
        }
    else:
        names = _option_names(kind)
        changes["options"] = {key: value for key, value in entry.options.items() if key in names}
    unset = {key: getattr(entry, key) for key in type(entry).model_fields}
    try:
        return name, ModelSettings.model_validate(unset | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            f"The model {name} cannot run so: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            param="model",
        ) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the nearest of the known names, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _concrete(engine: EngineChoice) -> Literal["hf", "simulated"]:
    return "hf" if engine == "auto" else engine


def _option_names(kind: Literal["hf", "simulated"]) -> frozenset[str]:
    config = HfConfig if kind == "hf" else SimulatedConfig
    return frozenset(config.model_fields) - _SPELLED


def _from_source(
    models: Mapping[str, ModelSettings], name: str, *, simulated: bool
) -> ModelSettings:
    if simulated:
        return ModelSettings(engine="simulated")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidInput(
                f"The folder {name} holds no model: it has no config.json.", param="model"
            )
        return ModelSettings(source=str(folder.resolve()))
    if _HUB_ID.fullmatch(name):
        return ModelSettings(source=name)
    raise NotFound(
        f"There is no model {name!r}.{did_you_mean(name, models)} Known are: "
        f"{', '.join(models)}; a local folder or a hub id (owner/name) also does.",
        param="model",
    )


def _require_installed(kind: str, name: str) -> None:
    missing = [one for one in _NEEDED.get(kind, ()) if importlib.util.find_spec(one) is None]
    if missing:
        raise EngineMisconfigured(
            f"The model {name} runs on the {kind} engine, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'batchctl[{kind}]'. Without a model: --engine simulated."
        )
