"""Opens engines, importing only the one that was asked for, and describes models without torch."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from engine.asking import Asking
from engine.base import Engine
from engine.config import (
    EngineConfig,
    HfConfig,
    LlamacppConfig,
    RemoteConfig,
    SimulatedConfig,
    VllmConfig,
)
from engine.encoders import is_encoder, is_scoring, read_pooling_settings
from engine.gguf import is_gguf
from engine.gguf import read as read_gguf
from engine.llamacpp.describe import describe_gguf
from engine.paths import expand
from engine.quantized import effective_quantization
from engine.revision import revision_of
from engine.tools import takes_tools
from engine.trust import trusts_code
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.pooling import POOLING_ENDPOINTS, RERANK, SCORE
from jobs.domain.request import (
    COMPLETIONS,
    CONSTRAINT_KINDS,
    PARAMETERS,
    TEXT_ENDPOINTS,
    TOOL_PARAMETERS,
    Capabilities,
)

if TYPE_CHECKING:
    from engine.hf.quantizing import Quantized

_DESCRIBING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
)
_WRITTEN_FILES = frozenset({"config.json", "modules.json", "1_Pooling/config.json"})
"""Those that a quantized model has its own of, or has no use for."""
_SEEING_FILES = ("preprocessor_config.json", "processor_config.json")
"""That say how images become numbers."""
SEEING_FAMILIES = frozenset({"llava"})
"""The kinds of vision models that the hf engine runs."""
_DEFAULT_CONTEXT_TOKENS = 2048


def open_engine(config: EngineConfig, *, model: str | None = None) -> Engine:
    """Return the engine that `config` describes, with its answers held to their constraints.

    Args:
        model: the name clients use; unset, what the configuration calls it.

    Raises:
        EngineMisconfigured: it cannot be opened as configured.
        EngineOutOfMemory: it does not fit on the device.
    """
    inner: Engine
    if isinstance(config, SimulatedConfig):
        from engine.simulated import SimulatedEngine  # noqa: PLC0415

        inner = SimulatedEngine(config, model=model or "simulated")
    elif isinstance(config, RemoteConfig):
        from engine.remote import RemoteEngine  # noqa: PLC0415

        inner = RemoteEngine(config, model=model or config.served_model or "remote")
    elif isinstance(config, VllmConfig):
        with _needing("vllm"):
            from engine.vllm import VllmEngine, VllmPoolingEngine  # noqa: PLC0415
        opened = VllmPoolingEngine if _is_encoder(config) else VllmEngine
        inner = opened(config, model=model)
    elif isinstance(config, LlamacppConfig):
        with _needing("llamacpp"):
            from engine.llamacpp.engine import LlamacppEngine  # noqa: PLC0415
        inner = LlamacppEngine(config, model=model)
    else:
        with _needing("hf"):
            from engine.hf.engine import HfEngine  # noqa: PLC0415
            from engine.hf.pooling import HfPoolingEngine  # noqa: PLC0415
        inner = (HfPoolingEngine if _is_encoder(config) else HfEngine)(config, model=model)
    return Asking(inner, config.asking)


def _is_encoder(config: HfConfig | VllmConfig) -> bool:
    folder = find_folder(config)
    return is_encoder(folder, _object(_read(folder / "config.json") or b"{}", folder))


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EngineMisconfigured(
            f"The {extra} engine needs packages that are missing ({error.name}); install "
            f"`batchctl[{extra}]`."
        ) from error


def quantize_model(config: HfConfig, target: Path, *, told: Callable[[str], None]) -> "Quantized":
    """Write a model's weights to a folder as `config` has them quantized.

    Args:
        told: is called with what begins.

    Raises:
        Conflict: something is in that folder.
        EngineMisconfigured: the model cannot be loaded, or not be quantized.
        EngineOutOfMemory: it does not fit on the device.
    """
    with _needing("hf"):
        from engine.hf import quantizing, weights  # noqa: PLC0415
    quantizing.check_target(target)
    source = find_folder(config)
    quantizing.check_source(source)
    told(f"loading {config.model} and quantizing it to {config.quantization}")
    loaded = weights.load(config)
    copied = [name for name in _DESCRIBING_FILES if name not in _WRITTEN_FILES]
    return quantizing.write(
        loaded.model, config, source=source, target=target, copied=copied, told=told
    )


def describe_model(config: EngineConfig, model: str) -> Capabilities:
    """Return what a model can do, read from its files; loads no weights and needs no torch.

    Args:
        model: the name clients use.

    Raises:
        EngineMisconfigured: the files are not there, or are no model's.
    """
    if isinstance(config, SimulatedConfig):
        from engine.simulated import describe  # noqa: PLC0415

        return describe(config, model)
    if isinstance(config, RemoteConfig):
        from engine.remote import describe_remote  # noqa: PLC0415

        return describe_remote(config, model)
    if isinstance(config, LlamacppConfig):
        return describe_gguf(config, read_gguf(config.model), model)
    folder = find_folder(config)
    files = {name: _read(folder / name) for name in _DESCRIBING_FILES}
    if files["config.json"] is None:
        raise EngineMisconfigured(f"{folder} holds no config.json, so it is not a model's folder.")
    if files["tokenizer.json"] is None:
        raise EngineMisconfigured(
            f"{folder} holds no tokenizer.json; save the model with a fast tokenizer."
        )
    described = _object(files["config.json"], folder / "config.json")
    has_own_code = trusts_code(config, folder, described)
    text = described.get("text_config") or described
    tokenizer_config = _object(files["tokenizer_config.json"] or b"{}", folder)
    templates = (
        files["chat_template.jinja"] or b"",
        files["chat_template.json"] or b"",
        str(tokenizer_config.get("chat_template") or "").encode(),
    )
    has_template = any(templates)
    sees = "vision_config" in described and (
        config.kind == "vllm" or described.get("model_type") in SEEING_FAMILIES
    )
    encodes = is_encoder(folder, described)
    endpoints: tuple[str, ...] = TEXT_ENDPOINTS if has_template else (COMPLETIONS,)
    context_tokens = int(text.get("max_position_embeddings") or _DEFAULT_CONTEXT_TOKENS)
    if encodes:
        endpoints = (RERANK, SCORE) if is_scoring(described) else POOLING_ENDPOINTS
        context_tokens = read_pooling_settings(folder).max_tokens or context_tokens
    return Capabilities(
        model=model,
        engine=config.kind,
        endpoints=endpoints,
        context_tokens=config.context_tokens or context_tokens,
        constraints=CONSTRAINT_KINDS,
        parameters=PARAMETERS
        if takes_tools(b"".join(templates).decode("utf-8", "replace"))
        else tuple(name for name in PARAMETERS if name not in TOOL_PARAMETERS),
        constraint_backend=config.asking.backend,
        refuses_unenforceable=config.asking.on_unsupported_schema == "refuse",
        fingerprint=f"{config.kind}-{_digest(config, folder, files, runs_code=has_own_code)}",
        num_slots=config.slots or 0,
        quantization=effective_quantization(folder, described, config.quantization),
        tokenizer_hash=xxhash.xxh3_128_hexdigest(files["tokenizer.json"]),
        is_greedy=config.defaults.temperature == 0,
        revision=revision_of(config, folder),
        takes_images=sees and b"image" in b"".join(templates),
    )


def _digest(
    config: HfConfig | VllmConfig,
    folder: Path,
    files: Mapping[str, bytes | None],
    *,
    runs_code: bool,
) -> str:
    """Return what changes with a model's describing files, and with settings that answers show."""
    digest = xxhash.xxh3_128()
    for name, content in files.items():
        digest.update(f"{name}\0{-1 if content is None else len(content)}\0".encode())
        digest.update(content or b"")
    for name in _SEEING_FILES:
        content = _read(folder / name)
        if content is not None:
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    digest.update(
        config.model_dump_json(
            include={
                "quantization",
                "compute_dtype",
                "dtype",
                "adapter",
                "context_tokens",
                "defaults",
                "asking",
            }
        ).encode()
    )
    if runs_code:
        digest.update(str(config.trusted_code).encode())
    return digest.hexdigest()


def looks_local(source: str) -> bool:
    """Return whether a model's source can only be a file or folder here, not a hub id."""
    path = expand(source)
    is_path = path.is_absolute() or source.startswith(".") or source.count("/") != 1
    return is_path or is_gguf(source) or path.is_dir()


def find_folder(config: HfConfig | VllmConfig) -> Path:
    """Return the folder with a model's describing files, fetching them from the hub if need be.

    Raises:
        EngineMisconfigured: there is no such folder or hub model, or the hub cannot be reached.
    """
    path = expand(config.model)
    if path.is_dir():
        return path
    if looks_local(config.model):
        raise EngineMisconfigured(
            f"There is no folder {config.model}; give the folder that holds config.json, or a "
            "hub id such as owner/name."
        )
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import (  # noqa: PLC0415
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise EngineMisconfigured(
            f"{config.model} is a hub id, which needs huggingface_hub; install `batchctl[hf]` or "
            "give a local folder."
        ) from error
    try:
        return Path(
            snapshot_download(
                config.model,
                revision=config.revision,
                cache_dir=config.cache_folder,
                token=config.token,
                allow_patterns=[*_DESCRIBING_FILES, *_SEEING_FILES],
            )
        )
    except HFValidationError:
        raise EngineMisconfigured(
            f"There is no folder {config.model}, and it is no hub id such as owner/name."
        ) from None
    except RepositoryNotFoundError:
        raise EngineMisconfigured(
            f"The hub has no model {config.model}, or the token may not see it."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EngineMisconfigured(
            f"{config.model} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}); download it where there is a network "
            f"(`hf download {config.model}`) and give its folder."
        ) from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineMisconfigured(f"{path} cannot be read: {error.strerror}.") from error


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise EngineMisconfigured(f"{path} does not hold a JSON object.")
    return value
