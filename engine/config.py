"""One frozen settings model per engine, told apart by `kind`; they cross to its process."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

HfQuantization = Literal["none", "nf4", "fp4", "int8"]
VllmQuantization = Literal[
    "none", "nf4", "awq", "awq_marlin", "gptq", "gptq_marlin", "marlin", "fp8", "nvfp4"
]
VllmDtype = Literal["auto", "bfloat16", "float16", "float32"]
NativeConstraints = Literal["openai", "vllm", "none"]
Streaming = Literal["auto", "always", "never"]
ComputeDtype = Literal["bfloat16", "float16", "float32"]
CacheDtype = Literal["float16", "bfloat16", "float32"]
ConstraintBackend = Literal["llguidance", "outlines_core"]
OnUnsupportedSchema = Literal["validate", "refuse"]

DROPPED_BY_VLLM: Mapping[str, str] = {
    "swap_space": "vLLM recomputes what it preempts since its first engine was removed",
    "squeezellm": "vLLM has no squeezellm since 0.7",
    "guided_decoding_backend": "vLLM took guided_* away; `asking.backend` chooses the library",
    "num_scheduler_steps": "multi-step scheduling went with vLLM's first engine",
    "use_v2_block_manager": "it went with vLLM's first engine",
    "disable_log_requests": "requests are not logged unless enable_log_requests asks for it",
}
"""Arguments and quantizations that vLLM once had, and why they are gone."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GenerationDefaults(_Config):
    """Sampling parameters for lines that leave them out; unset ones fall through to the model's.

    `max_tokens_cap` holds for all lines.
    """

    max_tokens: int | None = Field(default=None, ge=1, description="longest answer")
    max_tokens_cap: int | None = Field(
        default=None,
        ge=1,
        description="longest answer, whatever a line asks for; unset: the context",
    )
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
    close_early: bool = Field(
        default=True,
        description="end a constrained answer where its constraint allows before max_tokens cuts "
        'it off; its finish_reason is "length" (engines hf and llamacpp, backend llguidance)',
    )


DeviceMap = Literal["auto"] | dict[str, int | str]
MaxMemory = dict[str, int | str]
DEVICE_MAP_HELP = (
    "where the parts of a model lie that is larger than its device: auto, or a table of modules "
    "with the device, cpu or disk; unset: all on the device"
)
MAX_MEMORY_HELP = (
    'most bytes of weights for the device and cpu, such as {0 = "20GiB", cpu = "60GiB"}; the rest '
    "lies on disk; with it device_map is auto"
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
    trusted_code: str | None = Field(
        default=None, description="digest or commit of the model's own code that may run"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps")
    device_map: DeviceMap | None = Field(default=None, description=DEVICE_MAP_HELP)
    max_memory: MaxMemory | None = Field(default=None, description=MAX_MEMORY_HELP)
    quantization: HfQuantization = "none"
    compute_dtype: ComputeDtype = "bfloat16"
    flash_attention: bool = False
    context_tokens: int | None = Field(default=None, ge=1, description="unset: the model's own")
    slots: int | None = Field(
        default=None, ge=1, description="sequences generated at once; unset: as many as pay"
    )
    page_tokens: int = Field(default=16, ge=1, description="tokens in one block of the cache")
    num_blocks: int | None = Field(default=None, ge=1, description="unset: from the free memory")
    batch_tokens: int | None = Field(
        default=None, ge=1, description="token budget of one step; unset: by device and work"
    )
    tune: bool = Field(
        default=True, description="whether steps change slots and batch_tokens that are unset"
    )
    forced_tokens: bool = Field(
        default=True,
        description="take tokens that a constraint leaves no choice about without a step for each",
    )
    threads: int | None = Field(default=None, ge=1, description="torch threads; unset: its choice")
    cache_folder: str | None = Field(default=None, description="where hub models are kept")
    token: str | None = Field(default=None, repr=False, description="hub token")
    defaults: GenerationDefaults = GenerationDefaults()
    asking: AskingConfig = AskingConfig()


def is_placed(config: HfConfig) -> bool:
    """Return whether the settings say where parts of a model lie, and how much where."""
    return config.device_map is not None or config.max_memory is not None


class VllmConfig(_Config):
    """vLLM in the engine process; what it does not name itself goes in `engine_args`."""

    kind: Literal["vllm"] = "vllm"
    model: str = Field(description="a local folder or a hub id")
    revision: str | None = None
    trusted_code: str | None = Field(
        default=None, description="digest or commit of the model's own code that may run"
    )
    quantization: VllmQuantization = "none"
    dtype: VllmDtype = "auto"
    context_tokens: int | None = Field(default=None, ge=1, description="unset: the model's own")
    slots: int | None = Field(
        default=None, ge=1, description="sequences generated at once; unset: by the GPU's memory"
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="token budget of one step; unset: by the GPU; on a CPU vLLM's choice",
    )
    tune: bool = Field(
        default=True, description="whether preemptions lower the number in vLLM, slots being unset"
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share each layer")
    pipeline_parallel_size: int = Field(default=1, ge=1, description="groups that share layers")
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of the GPU's memory that is taken"
    )
    prefix_caching: bool = Field(default=True, description="reuse the cache of equal beginnings")
    enforce_eager: bool = Field(
        default=False, description="no compilation and no CUDA graphs: quicker start, slower steps"
    )
    adapter: str | None = Field(
        default=None, description="folder of a LoRA adapter; this model's name then means it"
    )
    cache_folder: str | None = Field(default=None, description="where hub models are kept")
    token: str | None = Field(default=None, repr=False, description="hub token")
    engine_args: dict[str, Any] = Field(
        default={}, description="any further vLLM engine argument, by its Python name"
    )
    defaults: GenerationDefaults = GenerationDefaults()
    asking: AskingConfig = AskingConfig()


class LlamacppConfig(_Config):
    """llama.cpp on a GGUF file, quantized or not, with continuous batching of our own."""

    kind: Literal["llamacpp"] = "llamacpp"
    model: str = Field(description="a .gguf file, or the first of its parts")
    gpu_layers: int = Field(
        default=-1, ge=-1, description="layers on the GPU or on Metal; -1: all, 0: none"
    )
    context_tokens: int | None = Field(default=None, ge=1, description="unset: the model's own")
    slots: int = Field(default=16, ge=1, le=256, description="sequences generated at once")
    cache_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens that the cache of all sequences holds; unset: from the free memory",
    )
    cache_dtype: CacheDtype = "float16"
    batch_tokens: int = Field(default=512, ge=1, description="token budget of one step")
    threads: int | None = Field(default=None, ge=1, description="unset: one for each core")
    mmap: bool = Field(default=True, description="map the file instead of reading it")
    mlock: bool = Field(default=False, description="keep the weights from being swapped out")
    repack: bool = Field(
        default=False,
        description="rearrange quantized weights for this processor: faster, and some builds die "
        "of it (SIGILL)",
    )
    defaults: GenerationDefaults = GenerationDefaults()
    asking: AskingConfig = AskingConfig()


class RemoteConfig(_Config):
    """A vLLM server or any other with OpenAI's API, here or far away."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    kind: Literal["remote"] = "remote"
    url: str = Field(description="base URL of the API, with or without /v1")
    api_key: str | None = Field(default=None, repr=False, description="sent as bearer token")
    served_model: str | None = Field(
        default=None, description="what the server calls the model; unset: as clients do"
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="how long a request may go without any progress"
    )
    patience_seconds: float = Field(
        default=600.0, gt=0, description="how long the server may fail every request"
    )
    max_tries: int = Field(
        default=10, ge=1, description="tries of a request that fails while others succeed"
    )
    slots: int = Field(default=64, ge=1, description="most requests at once")
    context_tokens: int | None = Field(
        default=None, ge=1, description="prompt and answer together; unset: the server judges"
    )
    streaming: Streaming = Field(
        default="auto",
        description="whether answers are sent token by token, which shows that long ones grow: "
        "auto does it for those that may be long",
    )
    native_constraints: NativeConstraints = Field(
        default="openai",
        description="how constraints are sent: response_format only, vLLM's structured_outputs "
        "as well, or none",
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, description="limit of the server, shared by all workers"
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="limit of the server, shared by all workers"
    )
    limiter_url: str | None = Field(
        default=None, repr=False, description="Redis that workers share the limits in"
    )
    limiter_prefix: str = Field(default="batchctl", description="what its keys begin with")
    limiter_master: str = Field(
        default="mymaster", description="name of the master, where limiter_url is sentinel://"
    )
    defaults: GenerationDefaults = GenerationDefaults()
    asking: AskingConfig = AskingConfig()

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        url = url.strip()
        try:
            parts = urlsplit(url)
            is_good = parts.scheme in {"http", "https"} and bool(parts.hostname)
            _ = parts.port
        except ValueError:
            is_good = False
        if not is_good:
            raise ValueError("should be the URL of a server, such as http://127.0.0.1:8000/v1")
        return url

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: str | None) -> str | None:
        key = key.strip() if key else None
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("should be one word of plain letters, digits and signs")
        return key or None


EngineConfig = Annotated[
    SimulatedConfig | HfConfig | VllmConfig | LlamacppConfig | RemoteConfig,
    Field(discriminator="kind"),
]
