"""Weights of fewer bits: how bitsandbytes is told, and how they are kept for the next load.

All three kinds run on a CPU as well as on a GPU. Embeddings, norms and the output layer stay as
they are.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig

from engine.checkpoint import read_config
from engine.config import HfConfig
from engine.encoders import is_encoder
from engine.quantized import stored_quantization
from jobs.domain.errors import Conflict, EngineMisconfigured

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class Quantized(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and what it was made from."""

    folder: str
    quantization: str
    compute_dtype: str
    source_bytes: int
    stored_bytes: int


def settings_for(config: HfConfig, *, sees: bool = False) -> BitsAndBytesConfig | None:
    """Return what quantizes weights while they are loaded; None where nothing does.

    Args:
        sees: whether the model takes images.
    """
    if config.quantization == "none":
        return None
    # What sees is small, and worth its bits; naming it drops the library's own exception.
    kept = ["lm_head", "model.vision_tower", "model.multi_modal_projector"] if sees else None
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.compute_dtype],
        llm_int8_skip_modules=kept,
    )


def read_stored(
    config: HfConfig, source: str, common: dict[str, Any], described: dict[str, Any]
) -> PreTrainedConfig | None:
    """Return the configuration of a checkpoint that bitsandbytes wrote; None for any other.

    It computes in the dtype of these settings, whichever it was written with.
    """
    if stored_quantization(described) not in {"nf4", "fp4", "int8"}:
        return None
    found: PreTrainedConfig = AutoConfig.from_pretrained(source, **common)
    stored: Any = found.quantization_config
    stored["bnb_4bit_compute_dtype"] = config.compute_dtype
    return found


def check_target(target: Path) -> None:
    """Check that a quantized model may be written to a folder.

    Raises:
        Conflict: something is there.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise Conflict(f"{target} is there already, and no folder; name a new one.")
    if target.is_dir() and any(target.iterdir()):
        raise Conflict(f"The folder {target} is not empty, and nothing is overwritten.")


def check_source(folder: Path) -> None:
    """Check that a model can be quantized.

    Raises:
        EngineMisconfigured: it is quantized already, or writes no text.
    """
    described = read_config(folder)
    if stored := stored_quantization(described):
        raise EngineMisconfigured(
            f"{folder} is quantized already ({stored}); give the original model."
        )
    if is_encoder(folder, described):
        raise EngineMisconfigured(
            f"{folder} embeds or scores; only models that write text are quantized."
        )
    if "vision_config" in described:
        raise EngineMisconfigured(
            f"{folder} takes images; such a model is only quantized while it is loaded."
        )


def write(
    model: Any,  # noqa: ANN401 -- transformers' own classes differ by model
    config: HfConfig,
    *,
    source: Path,
    target: Path,
    copied: Sequence[str],
    told: Callable[[str], None],
) -> Quantized:
    """Write a quantized model to a folder, which is there whole or not at all.

    Args:
        source: folder of the model that was loaded.
        copied: files of it that are taken as they are, where they exist.
        told: is called with what begins.

    Raises:
        Conflict: something came to be there meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", suffix=".part", dir=target.parent, ignore_cleanup_errors=True
    ) as name:
        part = Path(name) / "model"
        told(f"writing {target}")
        model.save_pretrained(part)
        # The library makes its files readable to their owner alone.
        mode = (part / "config.json").stat().st_mode
        for path in part.glob("*.safetensors"):
            path.chmod(mode)
        for file in copied:
            if (source / file).is_file():
                shutil.copyfile(source / file, part / file)
        check_target(target)
        try:
            part.rename(target)
        except OSError:
            check_target(target)
            raise
    return Quantized(
        folder=str(target),
        quantization=config.quantization,
        compute_dtype=config.compute_dtype,
        source_bytes=_weight_bytes(source),
        stored_bytes=_weight_bytes(target),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
