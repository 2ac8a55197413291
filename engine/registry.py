"""Opens engines, importing only the one that was asked for, and describes models without torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from engine.gguf import read as read_gguf
from engine.llamacpp.describe import describe_gguf
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
            from engine.vllm import VllmEngine  # noqa: PLC0415
        inner = VllmEngine(config, model=model)
    elif isinstance(config, LlamacppConfig):
        with _needing("llamacpp"):
            from engine.llamacpp.engine import LlamacppEngine  # noqa: PLC0415
        inner = LlamacppEngine(config, model=model)
    else:
        with _needing("hf"):
            from engine.hf.engine import HfEngine  # noqa: PLC0415
            from engine.hf.pooling import HfPoolingEngine  # noqa: PLC0415
        folder = find_folder(config)
        if is_encoder(folder, _object(_read(folder / "config.json") or b"{}", folder)):
            inner = HfPoolingEngine(config, model=model)
        else:
            inner = HfEngine(config, model=model)
    return Asking(inner, config.asking)


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EngineMisconfigured(
            f"The {extra} engine needs packages that are missing ({error.name}); install "
            f"`batchctl[{extra}]`."
        ) from error


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
    encodes = is_encoder(folder, described)
    digest = xxhash.xxh3_128()
    for name, content in files.items():
        digest.update(f"{name}\0{-1 if content is None else len(content)}\0".encode())
        digest.update(content or b"")
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
    if has_own_code:
        digest.update(str(config.trusted_code).encode())
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
        fingerprint=f"{config.kind}-{digest.hexdigest()}",
        num_slots=config.slots or 0,
        quantization=config.quantization,
        tokenizer_hash=xxhash.xxh3_128_hexdigest(files["tokenizer.json"]),
        is_greedy=config.defaults.temperature == 0,
        revision=revision_of(config, folder),
    )


def find_folder(config: HfConfig | VllmConfig) -> Path:
    """Return the folder with a model's describing files, fetching them from the hub if need be.

    Raises:
        EngineMisconfigured: there is no such folder or hub model, or the hub cannot be reached.
    """
    path = Path(config.model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or config.model.startswith(".") or config.model.count("/") != 1:
        raise EngineMisconfigured(
            f"There is no folder {config.model}; give the folder that holds config.json, or a "
            "hub id such as owner/name."
        )
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import (  # noqa: PLC0415
            HfHubHTTPError,
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
                allow_patterns=list(_DESCRIBING_FILES),
            )
        )
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
