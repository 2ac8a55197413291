"""One frozen settings model per engine, told apart by `kind`; they cross to its process."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Quantization = Literal["none", "nf4"]
ComputeDtype = Literal["bfloat16", "float16", "float32"]
ConstraintBackend = Literal["llguidance", "outlines_core"]
OnUnsupportedSchema = Literal["validate", "refuse"]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GenerationDefaults(_Config):
    """Sampling parameters for lines that leave them out; unset ones fall through to the model's."""

    max_tokens: int | None = Field(default=None, ge=1, description="longest answer")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1, description="nucleus sampling")
    top_k: int | None = Field(default=None, ge=-1, description="0 or -1 is off")
    seed: int | None = Field(default=None, description="unset: any")
    stop: tuple[str, ...] = Field(default=(), description="strings that end an answer")


class AskingConfig(_Config):
    """How answers are held to their constraint, whatever the engine."""

    max_asks: int = Field(
        default=3, ge=1, description="how often the model is asked in all for a valid answer"
    )
    on_unsupported_schema: OnUnsupportedSchema = Field(
        default="validate",
        description="what to do with a schema that cannot be enforced while generating: "
        "validate the answer and ask again, or refuse the line at planning",
    )
    backend: ConstraintBackend = Field(
        default="llguidance", description="which library keeps constraints while generating"
    )


class SimulatedConfig(_Config):
    """An engine without a model; requests per second are slots / (reply_tokens x step_seconds)."""

    kind: Literal["simulated"] = "simulated"
    step_seconds: float = Field(default=0.02, ge=0, description="length of one step")
    slots: int = Field(default=64, ge=1, description="requests worked on at once")
    reply_tokens: int = Field(default=16, ge=1, description="tokens of a reply without max_tokens")
    reply: str | None = Field(default=None, description="the reply; unset: made from the request")
    load_seconds: float = Field(default=0.0, ge=0, description="pretended time to load the model")
    context_tokens: int = Field(default=8192, ge=1)
    ledger: str | None = Field(
        default=None, description="file to which each step appends its number of tokens"
    )
    defaults: GenerationDefaults = GenerationDefaults()
    asking: AskingConfig = AskingConfig()


class HfConfig(_Config):
    """Hugging Face transformers with continuous batching."""

    kind: Literal["hf"] = "hf"
    model: str = Field(description="a local folder or a hub id")
    revision: str | None = None
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps")
    quantization: Quantization = "none"
    compute_dtype: ComputeDtype = "bfloat16"
    flash_attention: bool = False
    context_tokens: int | None = Field(default=None, ge=1, description="unset: the model's own")
    slots: int = Field(default=32, ge=1, description="sequences generated at once")
    page_tokens: int = Field(default=32, ge=1, description="tokens in one block of the cache")
    num_blocks: int | None = Field(default=None, ge=1, description="unset: from the free memory")
    batch_tokens: int = Field(default=512, ge=1, description="token budget of one step")
    threads: int | None = Field(default=None, ge=1, description="torch threads; unset: its choice")
    cache_folder: str | None = Field(default=None, description="where hub models are kept")
    token: str | None = Field(default=None, repr=False, description="hub token")
    defaults: GenerationDefaults = GenerationDefaults()
    asking: AskingConfig = AskingConfig()


EngineConfig = Annotated[SimulatedConfig | HfConfig, Field(discriminator="kind")]
