import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.devices import Device, Memory, discover, keep_visible, read_memory

GIB = 2**30


class NvmlError(Exception):
    pass


class Driver:
    """Stands for the driver's library: what a machine with these GPUs would say."""

    NVMLError = NvmlError

    def __init__(self, *gpus: dict[str, Any], broken: bool = False) -> None:
        self.gpus = gpus
        self.broken = broken
        self.num_open = 0

    def nvmlInit(self) -> None:  # noqa: N802 -- its name
        if self.broken:
            raise NvmlError("Driver/library version mismatch")
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> dict[str, Any]:  # noqa: N802
        if self.gpus[number].get("lost"):
            raise NvmlError("GPU is lost")
        return self.gpus[number]

    def nvmlDeviceGetMigMode(self, gpu: dict[str, Any]) -> tuple[int, int]:  # noqa: N802
        if "slices" not in gpu:
            raise NvmlError("Not Supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: dict[str, Any]) -> int:  # noqa: N802
        del gpu
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(  # noqa: N802
        self, gpu: dict[str, Any], number: int
    ) -> dict[str, Any]:
        try:
            found: dict[str, Any] = gpu["slices"][number]
        except IndexError:
            raise NvmlError("Not Found") from None
        return found

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=handle["total"], free=handle["free"])

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:  # noqa: N802
        uuid: str = handle["uuid"]
        return uuid

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> bytes:  # noqa: N802
        del handle
        return b"NVIDIA L4"

    def nvmlDeviceGetCudaComputeCapability(  # noqa: N802
        self, gpu: dict[str, Any]
    ) -> tuple[int, int]:
        del gpu
        return 8, 9


def gpu(uuid: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"uuid": uuid, "total": 24 * GIB, "free": 23 * GIB, **more}


def device(index: int, uuid: str) -> Device:
    return Device(
        index=index,
        uuid=uuid,
        name="NVIDIA L4",
        total_bytes=24 * GIB,
        free_bytes=23 * GIB,
        compute_capability=(8, 9),
    )


def test_gpus_are_found_with_their_memory() -> None:
    driver = Driver(gpu("GPU-a"), gpu("GPU-b"))
    assert discover(driver) == [device(0, "GPU-a"), device(1, "GPU-b")]
    assert driver.num_open == 0


def test_driver_that_does_not_answer_is_no_gpu() -> None:
    assert discover(Driver(gpu("GPU-a"), broken=True)) == []


def test_lost_gpu_is_left_out_and_keeps_its_index() -> None:
    assert discover(Driver(gpu("GPU-a", lost=True), gpu("GPU-b"))) == [device(1, "GPU-b")]


def test_slices_stand_for_the_gpu_they_were_cut_from() -> None:
    cut = gpu("GPU-a", slices=[gpu("MIG-1"), gpu("MIG-2")])
    assert [one.uuid for one in discover(Driver(cut, gpu("GPU-b")))] == ["MIG-1", "MIG-2", "GPU-b"]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a driver")
def test_machine_without_a_driver_has_no_gpu_and_loads_no_library() -> None:
    program = (
        "import sys; from engine.devices import discover; assert discover() == []; "
        "assert not {'torch', 'pynvml', 'psutil'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("listed", "shown"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("GPU-bb", [1]),
        ("GPU-b,0", []),
        ("MIG-7", [2]),
        ("0,9,1", [0]),
        ("1,1", [1]),
        ("NoDevFiles", []),
    ],
)
def test_visible_devices_are_read_as_cuda_does(listed: str | None, shown: list[int]) -> None:
    there = [device(0, "GPU-ba"), device(1, "GPU-bb"), device(2, "MIG-7")]
    assert [one.index for one in keep_visible(there, listed)] == shown


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


MEMINFO = {"proc/meminfo": "MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable: 800 kB\n"}


def test_memory_is_that_of_the_machine(tmp_path: Path) -> None:
    write(tmp_path, MEMINFO)
    assert read_memory(tmp_path) == Memory(total_bytes=1000 * 1024, available_bytes=800 * 1024)


@pytest.mark.parametrize("limited", ["sys/fs/cgroup", "sys/fs/cgroup/pods/one"])
def test_limit_of_any_group_above_bounds_the_memory(tmp_path: Path, limited: str) -> None:
    write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/pods/one\n",
            "sys/fs/cgroup/pods/memory.max": "max\n",
            "sys/fs/cgroup/pods/memory.current": "900000\n",
            f"{limited}/memory.max": "500000\n",
            f"{limited}/memory.current": "400000\n",
            f"{limited}/memory.stat": "anon 300000\ninactive_file 100000\n",
        },
    )
    assert read_memory(tmp_path) == Memory(total_bytes=500_000, available_bytes=200_000)


def test_limit_of_the_older_groups_counts_too(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker"
    write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "4:memory:/docker\n3:cpuset:/\n0::/\n",
            f"{group}/memory.limit_in_bytes": "300000\n",
            f"{group}/memory.usage_in_bytes": "350000\n",
            f"{group}/memory.stat": "total_inactive_file 10\n",
        },
    )
    assert read_memory(tmp_path) == Memory(total_bytes=300_000, available_bytes=0)


def test_this_machine_has_memory() -> None:
    memory = read_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
