"""Loads a model and its tokenizer, quantized where asked, and says what to do when it cannot."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from engine.checkpoint import WEIGHTS_FILE, read_config, read_tensors
from engine.choice import gigabytes
from engine.config import HfConfig, is_placed
from engine.devices import read_memory
from engine.encoders import is_scoring
from engine.hf import heap, placement, quantizing
from engine.hf.pictures import Vision, take_apart
from engine.hf.quantizing import DTYPES
from engine.memory import WeightKind, read_size, weight_bytes
from engine.paths import expand
from engine.quantized import effective_quantization
from engine.registry import SEEING_FAMILIES, find_folder, looks_local
from engine.trust import trusts_code
from jobs.domain.errors import EngineMisconfigured, EngineOutOfMemory


class Loaded(msgspec.Struct, frozen=True):
    """A model on its device, with everything that describes it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    generation_config: dict[str, Any]
    eos_tokens: tuple[int, ...]
    context_tokens: int
    vocab_size: int
    vision: Vision | None = None


class LoadedEncoder(msgspec.Struct, frozen=True):
    """A model that makes vectors or scores, on its device.

    `scores` says that it has a head which gives a pair of texts one number.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    scores: bool
    vocab_size: int


def load(config: HfConfig) -> Loaded:
    """Return the model of `config`, ready to generate text.

    Local folders are never looked up on the hub. No code of a model is ever run, and weights
    come from safetensors only.

    Raises:
        EngineMisconfigured: something is missing or does not fit together; the message says what
            to do.
        EngineOutOfMemory: the model does not fit on the device.
    """
    sees = read_config(find_folder(config)).get("model_type") in SEEING_FAMILIES
    model, tokenizer, device = _open(
        config, AutoModelForImageTextToText if sees else AutoModelForCausalLM
    )
    generation_config = _generation_config(model.generation_config)
    vision: Vision | None = None
    if sees:
        vision = _open_vision(config, model)
        model = take_apart(model)
    text_config = model.config.get_text_config()
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        device=device,
        generation_config=generation_config,
        eos_tokens=_eos_tokens(generation_config, tokenizer),
        context_tokens=config.context_tokens
        or int(getattr(text_config, "max_position_embeddings", 0) or 2048),
        vocab_size=int(text_config.vocab_size),
        vision=vision,
    )


def _open_vision(config: HfConfig, model: PreTrainedModel) -> Vision:
    """Return what turns images into rows of a prompt.

    Raises:
        EngineMisconfigured: its files are missing, or the attention cannot serve it.
    """
    if config.flash_attention:
        raise EngineMisconfigured(
            "A model that takes images runs without flash_attention here; turn it off."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(
            str(find_folder(config)), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise _explain(error, config) from error
    described: Any = model.config
    return Vision(model, processor, int(described.image_token_id))


def load_encoder(config: HfConfig) -> LoadedEncoder:
    """Return the model of `config`, ready to embed or to score.

    Raises:
        EngineMisconfigured, EngineOutOfMemory: see `load`.
    """
    described = read_config(find_folder(config))
    scores = is_scoring(described)
    model, tokenizer, device = _open(
        config, AutoModelForSequenceClassification if scores else AutoModel
    )
    return LoadedEncoder(
        model=model,
        tokenizer=tokenizer,
        device=device,
        scores=scores,
        vocab_size=int(model.config.get_text_config().vocab_size),
    )


def _open(
    config: HfConfig,
    kind: Any,  # noqa: ANN401 -- one of transformers' automatic classes
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, torch.device]:
    _silence()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    if device.type == "cpu":
        heap.keep_freed()
    is_local = looks_local(config.model)
    if is_local and not expand(config.model).is_dir():
        raise EngineMisconfigured(
            f"There is no folder {config.model}; give the folder that holds config.json, or a "
            "hub id such as owner/name."
        )
    source = str(expand(config.model)) if is_local else config.model
    folder = Path(source) if is_local else find_folder(config)
    common = _common_options(config, folder, is_local=is_local)
    if is_local:
        writes = kind in {AutoModelForCausalLM, AutoModelForImageTextToText}
        _check_folder(folder, config, device, generates=writes)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        model = _load_model(config, source, device, common, kind)
    except EngineMisconfigured:
        raise
    except torch.OutOfMemoryError:
        raise EngineOutOfMemory(
            f"The weights of {config.model} do not fit on {device}; try quantization nf4."
        ) from None
    except Exception as error:
        raise _explain(error, config) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise EngineMisconfigured(
            f"{config.model} has no tokenizer.json; save it with a fast tokenizer."
        )
    model.requires_grad_(requires_grad=False)
    # accelerate knows tied weights by their addresses: these must stay, since another tensor that
    # comes to lie there would be taken for them.
    if device.type == "cpu" and not is_placed(config):
        _leave_file(model)
    return model, tokenizer, device


def _common_options(config: HfConfig, folder: Path, *, is_local: bool) -> dict[str, Any]:
    """Return what both the tokenizer and the weights are found by."""
    common: dict[str, Any] = {
        "trust_remote_code": trusts_code(config, folder, read_config(folder)),
        "local_files_only": is_local,
        "revision": config.revision or "main",
        "token": config.token,
        "cache_dir": config.cache_folder,
    }
    if config.trusted_code is not None and not is_local:
        common["code_revision"] = config.revision
    return common


def _load_model(
    config: HfConfig,
    source: str,
    device: torch.device,
    common: dict[str, Any],
    kind: Any,  # noqa: ANN401 -- one of transformers' automatic classes
) -> PreTrainedModel:
    where = placement.options_for(config, device, sees=kind is AutoModelForImageTextToText)
    try:
        model = _read_model(config, source, device, common, kind, where=where)
        placement.check(model, config, device)
    except BaseException:
        placement.give_up(where)
        raise
    placement.clean_up_after(model, where)
    return model


def _read_model(
    config: HfConfig,
    source: str,
    device: torch.device,
    common: dict[str, Any],
    kind: Any,  # noqa: ANN401 -- one of transformers' automatic classes
    *,
    where: dict[str, Any],
) -> PreTrainedModel:
    options: dict[str, Any] = {
        **common,
        **where,
        "dtype": DTYPES[config.compute_dtype],
        "use_safetensors": True,
        "output_loading_info": True,
        "quantization_config": quantizing.settings_for(
            config, sees=kind is AutoModelForImageTextToText
        ),
    }
    stored = quantizing.read_stored(config, source, common, read_config(find_folder(config)))
    if stored is not None:
        options |= {"config": stored, "quantization_config": None}
    attention = _attention(config, device)
    read: Any = kind.from_pretrained
    try:
        model, found = read(source, attn_implementation=attention, **options)
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        # Attention sinks, for example, exist in the plain implementation only.
        model, found = read(source, attn_implementation="eager", **options)
    # Some encoders have a layer for pairs of sentences, which nothing here asks for.
    missing = sorted(key for key in map(str, found["missing_keys"]) if "pooler." not in key)
    if missing:
        # transformers would go on with random numbers in their place.
        raise EngineMisconfigured(
            f"The weights of {config.model} are incomplete: {missing[0]}"
            f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''} cannot be "
            "found; download the model again."
        )
    loaded: PreTrainedModel = model
    return loaded


def _leave_file(model: PreTrainedModel) -> None:
    """Copy the weights out of the file they are mapped from.

    Whoever writes that file anew would end this process with SIGBUS, and the requests in flight
    would be suspected of it.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def pick_device(asked: str) -> torch.device:
    """Return the device to run on; "auto" takes the best one there is.

    Raises:
        EngineMisconfigured: it is not there.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise EngineMisconfigured(
            f"There is no device {asked}; use auto, cpu, cuda, cuda:N or mps."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineMisconfigured(
            "The device is cuda, but torch sees no GPU; check the driver and CUDA_VISIBLE_DEVICES, "
            "or use device auto."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise EngineMisconfigured("The device is mps, but torch has none here; use device auto.")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", 0)
    return device


def _silence() -> None:
    """Keep the libraries' chatter out of our logs; what matters comes back as exceptions."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("transformers", "bitsandbytes", "bitsandbytes.autograd._functions", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _check_folder(folder: Path, config: HfConfig, device: torch.device, *, generates: bool) -> None:
    """Refuse what cannot be loaded, before the libraries try and say it in many lines.

    Raises:
        EngineMisconfigured: its files are damaged or incomplete, or of no model that is known.
        EngineOutOfMemory: the device is smaller than the weights.
    """
    described = read_config(folder)
    effective_quantization(folder, described, config.quantization)
    if config.trusted_code is None:
        _check_family(folder, described, generates=generates)
    if not read_tensors(folder):
        raise EngineMisconfigured(
            f"{folder} holds neither {WEIGHTS_FILE} nor an index of several; save the model's "
            "weights there as safetensors."
        )
    size = read_size(folder)
    if size is None:
        return
    kind: WeightKind = "32 bit" if config.compute_dtype == "float32" else "16 bit"
    if size.stored_quantization:
        kind = "as stored"
    elif config.quantization != "none":
        kind = config.quantization
    needed, there = weight_bytes(size, kind), _device_bytes(device)
    if there is not None and needed > there and not is_placed(config):
        smaller = weight_bytes(size, "nf4")
        hint = (
            f"quantization nf4 needs {gigabytes(smaller)}"
            if kind in {"16 bit", "32 bit"} and smaller < there
            else "use a smaller model or a larger device"
        )
        raise EngineOutOfMemory(
            f"The weights of {folder} do not fit on {device}: they take {gigabytes(needed)}, and "
            f"it has {gigabytes(there)}; {hint}."
        )


def _check_family(folder: Path, described: Mapping[str, Any], *, generates: bool) -> None:
    """Refuse an architecture that is not known here, or cannot generate the text it has to."""
    family = described.get("model_type")
    if not family:
        raise EngineMisconfigured(
            f"{folder}/config.json names no model_type, so nobody can tell what model it is."
        )
    if family not in CONFIG_MAPPING:
        raise EngineMisconfigured(
            f"{folder} is of the architecture {str(family)[:80]!r}, which transformers "
            f"{transformers_version} does not know; use another model or engine."
        )
    writes = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or family in SEEING_FAMILIES
    if generates and not writes:
        raise EngineMisconfigured(
            f"{folder} is of the architecture {family!r}, which does not generate text; use a "
            "model for text generation."
        )


def _device_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return read_memory().total_bytes


def _attention(config: HfConfig, device: torch.device) -> str:
    if not config.flash_attention:
        return "sdpa"
    if device.type != "cuda" or not is_flash_attn_2_available():
        raise EngineMisconfigured(
            "flash_attention is on, but there is no GPU or no flash-attn package; install "
            "flash-attn for this torch, or turn flash_attention off."
        )
    return "flash_attention_2"


def _explain(error: Exception, config: HfConfig) -> EngineMisconfigured | EngineOutOfMemory:
    """Return what a library's complaint means to whoever wrote the settings."""
    name = config.model
    told: dict[type[Exception], str] = {
        GatedRepoError: f"{name} asks for consent on the hub; accept its terms there and set a "
        "token.",
        RepositoryNotFoundError: f"The hub has no model {name}, or the token may not see it.",
        RevisionNotFoundError: f"The hub has no revision {config.revision or 'main'} of {name}.",
        LocalEntryNotFoundError: _unreachable(name),
        HfHubHTTPError: _unreachable(name),
        SafetensorError: f"The safetensors of {name} are damaged; download them again.",
        ImportError: f"Loading {name} needs a package that is missing: {_first_line(error)}",
    }
    if isinstance(error, MemoryError):
        return EngineOutOfMemory(f"The weights of {name} do not fit in memory.")
    for kind, message in told.items():
        if any(isinstance(e, kind) for e in (error, error.__cause__, error.__context__)):
            return EngineMisconfigured(message)
    if not looks_local(name) and "connect" in str(error):
        return EngineMisconfigured(_unreachable(name))
    if isinstance(error, ValueError) and "Expecting" in str(error):  # json's own words
        return EngineMisconfigured(
            f"{name} cannot be loaded: one of its JSON files, such as tokenizer.json, is damaged "
            f"({_first_line(error)}); download it again."
        )
    if "ignore_mismatched_sizes" in str(error):
        return EngineMisconfigured(
            f"{name} cannot be loaded: its weights have other shapes than its config.json says; "
            "download both again."
        )
    return EngineMisconfigured(f"{name} cannot be loaded: {_first_line(error)}")


def _unreachable(name: str) -> str:
    return (
        f"{name} is not in the local cache and the hub cannot be reached; download it on a "
        f"machine with a network (`hf download {name}`) and give its folder."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _generation_config(read: GenerationConfig | None) -> dict[str, Any]:
    return {} if read is None else dict(read.to_dict())


def _eos_tokens(
    generation_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    found = generation_config.get("eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
