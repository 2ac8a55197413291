"""What a model's folder says of its own quantization, read without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.domain.errors import EngineMisconfigured


def stored_quantization(described: Mapping[str, Any]) -> str:
    """Return how a checkpoint is quantized, by the words of the settings; empty: not at all.

    What bitsandbytes wrote is nf4, fp4 or int8; of others it is the method's own name.

    Args:
        described: what its config.json says.
    """
    told = described.get("quantization_config")
    if not isinstance(told, Mapping):
        return ""
    method = str(told.get("quant_method") or "")
    if method != "bitsandbytes":
        return method
    # Older checkpoints have only the public names, newer ones both.
    if told.get("load_in_4bit") or told.get("_load_in_4bit"):
        return str(told.get("bnb_4bit_quant_type") or "fp4")
    return "int8"


def effective_quantization(folder: Path, described: Mapping[str, Any], asked: str) -> str:
    """Return how the weights will be kept: as they are stored, else as was asked for.

    Raises:
        EngineMisconfigured: they are stored in another way than was asked for.
    """
    stored = stored_quantization(described)
    if stored in {"nf4", "fp4", "int8"} and asked not in {"none", stored}:
        raise EngineMisconfigured(
            f"{folder} holds weights that are quantized already ({stored}), and {asked} was asked "
            f"for; leave quantization open, or quantize the original model."
        )
    return stored if asked == "none" and stored else asked
