"""Which GPUs a worker gets, and how a process is pinned to them.

A process is pinned by the environment it is started with, which is in force before any GPU
library can be imported in it. Nothing here touches a GPU: `engine.devices` asks the driver.
"""

from collections.abc import Mapping, Sequence

from engine.devices import Device
from jobs.domain.errors import EngineMisconfigured, InvalidInput

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICE = "_BATCHCTL_DEVICE"
"""Tells a worker what to call its device; it sees no more of it than the pinning leaves."""

_SHORT_UUID = 12


def choose_gpus(found: Sequence[Device], wanted: str) -> list[Device]:
    """Return the GPUs that `wanted` names: "all", "none", or indices such as "0,1".

    Raises:
        InvalidInput: it is none of these, or there is no GPU of that index.
    """
    word = wanted.strip().lower()
    if word == "all":
        return list(found)
    if word == "none":
        return []
    parts = [part.strip() for part in word.split(",")]
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise InvalidInput(
            f"worker.gpus is {wanted!r}; it should be all, none, or indices such as 0,1.",
            param="settings",
        )
    indices = dict.fromkeys(map(int, parts))
    for index in indices:
        if all(gpu.index != index for gpu in found):
            here = ", ".join(str(one) for one in dict.fromkeys(gpu.index for gpu in found))
            raise InvalidInput(
                f"There is no GPU {index} on this machine: "
                + (f"it has {here}." if found else "NVML finds none. Use --gpus none for the CPU."),
                param="settings",
            )
    return [gpu for index in indices for gpu in found if gpu.index == index]


def group_gpus(gpus: Sequence[Device], size: int) -> list[tuple[Device, ...]]:
    """Return as many groups of `size` neighbours as there are; GPUs that make none are left over.

    Raises:
        EngineMisconfigured: there is not one such group.
    """
    if size > 1:
        gpus = [gpu for gpu in gpus if not _is_slice(gpu)]
    if len(gpus) < size:
        raise EngineMisconfigured(
            f"A group of {size} GPUs is asked for, and {len(gpus)} can be joined here."
        )
    return [tuple(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]


def _is_slice(gpu: Device) -> bool:
    """Return whether it is a slice (MIG), which CUDA never joins with another device."""
    return gpu.uuid.startswith("MIG-")


def pin(group: Sequence[Device]) -> Mapping[str, str]:
    """Return the environment of a process that sees these GPUs and no other; none for the CPU."""
    return {VISIBLE: ",".join(gpu.uuid for gpu in group), DEVICE: describe_group(group)}


def describe_group(group: Sequence[Device]) -> str:
    """Return what to call the GPUs: "cuda:0 NVIDIA H100 (GPU-1a2b3c4d)"; "cpu" for none."""
    if not group:
        return "cpu"
    indices = ",".join(str(gpu.index) for gpu in group)
    names = ", ".join(dict.fromkeys(gpu.name for gpu in group))
    times = f" x{len(group)}" if len(group) > 1 else ""
    uuids = ", ".join(gpu.uuid[:_SHORT_UUID] for gpu in group)
    return f"cuda:{indices} {names}{times} ({uuids})"
