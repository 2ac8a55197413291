"""The GPUs of this machine, found without touching them, and how a process is pinned to some.

NVML reads what the driver knows; no CUDA context is made. A process is pinned by the environment
it is started with, which is in force before any GPU library can be imported in it.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from jobs.domain.errors import EngineMisconfigured, InvalidInput
from jobs.telemetry import log

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICE = "_BATCHCTL_DEVICE"
"""Tells a worker what to call its device; it sees no more of it than the pinning leaves."""

_SHORT_UUID = 12


class Nvml(Protocol):
    """What is used of the module `pynvml`, as nvidia-ml-py installs it."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: D102, N802  its names
    def nvmlShutdown(self) -> None: ...  # noqa: D102, N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: ANN401, D102, N802
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...  # noqa: ANN401, D102, N802
    def nvmlDeviceGetName(self, handle: Any) -> str: ...  # noqa: ANN401, D102, N802
    def nvmlDeviceGetMigMode(self, device: Any) -> Sequence[int]: ...  # noqa: ANN401, D102, N802
    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int: ...  # noqa: ANN401, D102, N802
    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> Any: ...  # noqa: ANN401, D102, N802


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or a slice of one (MIG).

    Attributes:
        index: what NVML counts it as; slices share their GPU's.
        uuid: "GPU-..." or "MIG-...", the same after a restart.
    """

    index: int
    uuid: str
    name: str

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice, which CUDA never joins with another device."""
        return self.uuid.startswith("MIG-")


def load_nvml() -> Nvml | None:
    """Return the NVML binding, or None where it is not installed."""
    try:
        return cast("Nvml", importlib.import_module("pynvml"))
    except ImportError:
        return None


def find_gpus(nvml: Nvml | None, *, visible: str | None = None) -> list[Gpu]:
    """Return the GPUs of this machine in NVML's order; none where there is no driver.

    Args:
        nvml: the binding, or None where it is not installed.
        visible: the CUDA_VISIBLE_DEVICES that this process was started with: what a scheduler or
            container has allotted is all there is.
    """
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if not _says_there_is_none(error):
            log.warning("gpus_not_found", error=f"NVML fails: {error}.")
        return []
    try:
        found = [gpu for index in range(nvml.nvmlDeviceGetCount()) for gpu in _devices(nvml, index)]
    except nvml.NVMLError as error:
        log.warning("gpus_not_found", error=f"NVML fails: {error}.")
        return []
    finally:
        nvml.nvmlShutdown()
    return found if visible is None else _only_visible(found, visible)


def _says_there_is_none(error: Exception) -> bool:
    # nvidia-ml-py makes a class for each code and derives its name from the constant's.
    return type(error).__name__ in {
        "NVMLError_LibraryNotFound",
        "NVMLError_DriverNotLoaded",
        "NVMLError_FunctionNotFound",
    }


def _devices(nvml: Nvml, index: int) -> list[Gpu]:
    """Return a GPU, or its slices when it is cut into some."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    try:
        is_cut = nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except nvml.NVMLError:  # most models cannot be cut
        is_cut = False
    if not is_cut:
        return [Gpu(index=index, uuid=nvml.nvmlDeviceGetUUID(handle), name=name)]
    slices = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            one = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError:  # the numbers have gaps
            continue
        slices.append(
            Gpu(index=index, uuid=nvml.nvmlDeviceGetUUID(one), name=nvml.nvmlDeviceGetName(one))
        )
    return slices


def _only_visible(found: Sequence[Gpu], visible: str) -> list[Gpu]:
    """Return the GPUs that CUDA would show, in its order; it stops at the first unknown word."""
    shown: list[Gpu] = []
    for word in (part.strip() for part in visible.split(",")):
        matching = [
            gpu
            for gpu in found
            if (gpu.index == int(word) if word.isdecimal() else word and gpu.uuid.startswith(word))
        ]
        if not matching:
            break
        shown += [gpu for gpu in matching if gpu not in shown]
    return shown


def choose_gpus(found: Sequence[Gpu], wanted: str) -> list[Gpu]:
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


def group_gpus(gpus: Sequence[Gpu], size: int) -> list[tuple[Gpu, ...]]:
    """Return as many groups of `size` neighbours as there are; GPUs that make none are left over.

    Raises:
        EngineMisconfigured: there is not one such group.
    """
    if size > 1:
        gpus = [gpu for gpu in gpus if not gpu.is_slice]
    if len(gpus) < size:
        raise EngineMisconfigured(
            f"A group of {size} GPUs is asked for, and {len(gpus)} can be joined here."
        )
    return [tuple(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]


def pin(group: Sequence[Gpu]) -> Mapping[str, str]:
    """Return the environment of a process that sees these GPUs and no other; none for the CPU."""
    return {VISIBLE: ",".join(gpu.uuid for gpu in group), DEVICE: describe_group(group)}


def describe_group(group: Sequence[Gpu]) -> str:
    """Return what to call the GPUs: "cuda:0 NVIDIA H100 (GPU-1a2b3c4d)"; "cpu" for none."""
    if not group:
        return "cpu"
    indices = ",".join(str(gpu.index) for gpu in group)
    names = ", ".join(dict.fromkeys(gpu.name for gpu in group))
    times = f" x{len(group)}" if len(group) > 1 else ""
    uuids = ", ".join(gpu.uuid[:_SHORT_UUID] for gpu in group)
    return f"cuda:{indices} {names}{times} ({uuids})"
