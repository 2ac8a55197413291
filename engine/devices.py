"""What this machine can run a model on: GPUs by NVML, without any GPU library, and its memory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# Without one of these there is no NVIDIA driver, and importing its library is time lost: the
# second is how a GPU reaches Linux under Windows.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")
_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU, or the slice of one that MIG made; `index` counts both as `discover` found them."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The main memory that this process may use."""

    total_bytes: int
    available_bytes: int


def discover(nvml: Any = None) -> list[Device]:  # noqa: ANN401  a module without types
    """Return the NVIDIA GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says.

    Empty where there is no driver, or no library to ask it with (`nvidia-ml-py`). A GPU that
    does not answer is left out, and keeps its index.

    Args:
        nvml: what to ask; unset, the driver's own library.
    """
    if nvml is None:
        if not any(Path(path).exists() for path in _DRIVER_FILES):
            return []
        try:
            nvml = import_module("pynvml")
        except ImportError:
            return []
    with _opened(nvml) as is_open:
        return list(_read_devices(nvml)) if is_open else []


@contextmanager
def _opened(nvml: Any) -> Iterator[bool]:  # noqa: ANN401
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _read_devices(nvml: Any) -> Iterator[Device]:  # noqa: ANN401
    index = 0
    for number in range(nvml.nvmlDeviceGetCount()):
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(number)
        except nvml.NVMLError:
            index += 1
            continue
        for handle in _slices(nvml, gpu) or [gpu]:
            with suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                yield Device(
                    index=index,
                    uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                    name=_text(nvml.nvmlDeviceGetName(handle)),
                    total_bytes=int(memory.total),
                    free_bytes=int(memory.free),
                    compute_capability=_capability(nvml, gpu),
                )
            index += 1


def _slices(nvml: Any, gpu: Any) -> list[Any]:  # noqa: ANN401
    """Return the MIG slices of a GPU; programs can use those only, where there are any."""
    found = []
    with suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(gpu)[0]:
            for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
                with suppress(nvml.NVMLError):
                    found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number))
    return found


def _capability(nvml: Any, gpu: Any) -> tuple[int, int] | None:  # noqa: ANN401
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
    except nvml.NVMLError:
        return None
    return int(major), int(minor)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def keep_visible(devices: Sequence[Device], listed: str | None) -> list[Device]:
    """Return the devices that a process sees whose CUDA_VISIBLE_DEVICES is `listed`.

    As CUDA reads it: indices or beginnings of UUIDs, in the order given, up to the first that
    is none; None shows all of them.
    """
    if listed is None:
        return list(devices)
    shown: list[Device] = []
    for word in (part.strip() for part in listed.split(",")):
        matching = [
            one
            for one in devices
            if (word.isdecimal() and one.index == int(word))
            or (word.startswith(("GPU-", "MIG-")) and one.uuid.startswith(word))
        ]
        if len(matching) != 1 or matching[0] in shown:
            break
        shown += matching
    return shown


def discover_visible() -> list[Device]:
    """Return the GPUs that an engine started by this process would see, its first one first."""
    return keep_visible(discover(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_memory(root: Path = Path("/")) -> Memory:
    """Return the main memory there is: the machine's, or less where a container has a limit.

    Args:
        root: where `proc` and `sys` are.
    """
    total, available = _machine_memory(root)
    for limit, used in _limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Memory(total_bytes=total, available_bytes=available)


def _machine_memory(root: Path) -> tuple[int, int]:
    with suppress(OSError, KeyError, ValueError):
        told = _fields(root / "proc" / "meminfo")
        return told["MemTotal:"] * _KIB, told["MemAvailable:"] * _KIB
    try:
        import psutil  # noqa: PLC0415
    except ImportError:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each control group this process is in, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            top, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            group = top.joinpath(*parts[:depth])
            with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
                limit = int((group / names[0]).read_text())
                used = int((group / names[1]).read_text())
                # Pages of files that nobody looked at lately give way to whoever needs memory.
                used -= _fields(group / "memory.stat").get(names[2], 0)
                yield limit, max(0, used)


def _fields(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
