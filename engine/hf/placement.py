"""Where the parts of a model lie that is larger than its device: `device_map` and `max_memory`.

All of it is computed on one device, where the cache is as well. What lies in main memory or on disk
is fetched for each step by accelerate's hooks, so a step costs at least reading those weights once:
the more sequences share it, the less each pays.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PreTrainedModel

from engine.config import HfConfig, is_placed
from jobs.domain.errors import EngineMisconfigured

_AWAY = ("cpu", "disk")
_WEIGHTS_SHARE = 0.75
"""Of a GPU's memory where nothing is said: the rest is for the cache and what is fetched."""
_MEMORY_SHARE = 0.8


def options_for(config: HfConfig, device: torch.device, *, sees: bool) -> dict[str, Any]:
    """Return what `from_pretrained` is told of where to put a model that is to run on `device`.

    Args:
        sees: whether it takes images.

    Raises:
        EngineMisconfigured: it cannot lie so.
    """
    if not is_placed(config):
        return {"device_map": None if device.type == "cpu" else {"": device}}
    if sees:
        raise EngineMisconfigured(
            "device_map and max_memory are for models of text alone; leave them out for a model "
            "that takes images."
        )
    placed: str | dict[str, Any] = "auto"
    if isinstance(config.device_map, Mapping):
        if config.max_memory is not None:
            raise EngineMisconfigured(
                "device_map says where each part lies, so max_memory has nothing to limit; "
                "leave one of the two out."
            )
        placed = {
            name: _own(where, device, "device_map") for name, where in config.device_map.items()
        }
        away = [name for name, where in placed.items() if _is_away(where, device)]
        if away and config.quantization != "none":
            raise EngineMisconfigured(
                f"device_map puts {away[0][:80]!r} off the device, and bitsandbytes keeps "
                "quantized weights on it; use quantization none, or leave device_map out."
            )
    return {
        "device_map": placed,
        "max_memory": _limits(config, device) if placed == "auto" else None,
        "offload_folder": tempfile.mkdtemp(prefix="batchctl-offload-"),
    }


def check(model: PreTrainedModel, config: HfConfig, device: torch.device) -> None:
    """Check that a loaded model can be computed as it lies.

    Raises:
        EngineMisconfigured: what comes first lies elsewhere.
    """
    first = model.device
    if is_placed(config) and (first.type != device.type or first.index not in {None, device.index}):
        raise EngineMisconfigured(
            f"The embeddings of this model would not lie on {device}, where it is computed; put "
            "them there in device_map, or give the device more in max_memory."
        )


def clean_up_after(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Remove what was written for a model once it is gone; at the latest with this process."""
    folder = options.get("offload_folder")
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def give_up(options: Mapping[str, Any]) -> None:
    """Remove what was written for a model that could not be loaded."""
    folder = options.get("offload_folder")
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _is_away(where: object, device: torch.device) -> bool:
    return where == "disk" or (where == "cpu" and device.type != "cpu")


def _own(where: int | str, device: torch.device, setting: str) -> int | str:
    """Return a place as accelerate calls it.

    Raises:
        EngineMisconfigured: it is another device than the one that computes.
    """
    name = str(where).strip().lower()
    if name in _AWAY:
        return name
    number = re.fullmatch(r"cuda|(?:cuda:)?(\d+)", name)
    if device.type == "cuda" and number is not None and int(number[1] or 0) == device.index:
        return int(device.index or 0)
    if name == device.type == "mps":
        return name
    raise EngineMisconfigured(
        f"{setting} names {name[:40]!r}, and this model is computed on {device}: its parts lie "
        "there, in main memory (cpu) or on disk. The vllm engine spreads a model over several GPUs "
        "(tensor_parallel_size, pipeline_parallel_size)."
    )


def _limits(config: HfConfig, device: torch.device) -> dict[int | str, int]:
    """Return how many bytes of weights each place may have, the rest being for the disk.

    Raises:
        EngineMisconfigured: a size cannot be read, or a place is none.
    """
    limits: dict[int | str, int] = {"cpu": int(psutil.virtual_memory().available * _MEMORY_SHARE)}
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        limits[int(device.index or 0)] = int(free * _WEIGHTS_SHARE)
    elif device.type == "mps":
        limits["mps"] = int(torch.mps.recommended_max_memory() * _WEIGHTS_SHARE)
    for name, size in (config.max_memory or {}).items():
        where = _own(name, device, "max_memory")
        if where == "disk":
            raise EngineMisconfigured("max_memory limits devices and cpu; the disk has the rest.")
        try:
            limits[where] = int(convert_file_size_to_int(size))
        except ValueError:
            raise EngineMisconfigured(
                f"max_memory of {name[:40]} is {str(size)[:40]!r}; give bytes, or a size such as "
                "20GiB or 800MB."
            ) from None
    return limits
