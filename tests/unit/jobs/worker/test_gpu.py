# ruff: noqa: N802  NVML's names

from collections.abc import Mapping, Sequence

import pytest
from structlog.testing import capture_logs

from jobs.domain.errors import EngineMisconfigured, InvalidInput
from jobs.worker.gpu import (
    Gpu,
    Nvml,
    choose_gpus,
    describe_group,
    find_gpus,
    group_gpus,
    load_nvml,
    pin,
)


class NvmlFault(Exception):
    pass


class NVMLError_LibraryNotFound(NvmlFault):  # noqa: N801
    pass


class Machine:
    """A binding whose machine has these GPUs; a list stands for one that is cut into slices."""

    NVMLError: type[Exception] = NvmlFault

    def __init__(
        self,
        gpus: Sequence[str | Sequence[str | None]] = (),
        *,
        fault: NvmlFault | None = None,
    ) -> None:
        self._gpus = gpus
        self._fault = fault
        self.num_open = 0

    def nvmlInit(self) -> None:
        if self._fault is not None:
            raise self._fault
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return self._gpus[index]

    def nvmlDeviceGetUUID(self, handle: object) -> str:
        assert isinstance(handle, str)
        return handle

    def nvmlDeviceGetName(self, _handle: object) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetMigMode(self, device: object) -> Sequence[int]:
        if device == "GPU-old":
            raise NvmlFault("not supported")
        return (0, 0) if isinstance(device, str) else (1, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, device: object) -> int:
        assert isinstance(device, Sequence)
        return len(device)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: object, index: int) -> object:
        assert isinstance(device, Sequence)
        if device[index] is None:
            raise NvmlFault("not found")
        return device[index]


def gpus(*uuids: str) -> list[Gpu]:
    return [Gpu(index=index, uuid=uuid, name="NVIDIA H100") for index, uuid in enumerate(uuids)]


def test_gpus_are_found_in_the_order_of_the_driver() -> None:
    machine = Machine(["GPU-a", "GPU-old"])
    assert find_gpus(machine) == gpus("GPU-a", "GPU-old")
    assert machine.num_open == 0


def test_slices_stand_for_the_gpu_that_is_cut() -> None:
    found = find_gpus(Machine(["GPU-a", ["MIG-x", None, "MIG-y"]]))
    assert [(gpu.index, gpu.uuid) for gpu in found] == [(0, "GPU-a"), (1, "MIG-x"), (1, "MIG-y")]


@pytest.mark.parametrize("nvml", [None, Machine(fault=NVMLError_LibraryNotFound())])
def test_a_machine_without_a_driver_has_no_gpus_and_says_nothing(nvml: Nvml | None) -> None:
    with capture_logs() as logs:
        assert find_gpus(nvml) == []
    assert logs == []


def test_a_driver_that_fails_is_named() -> None:
    with capture_logs() as logs:
        assert find_gpus(Machine(fault=NvmlFault("Driver/library version mismatch"))) == []
    assert "version mismatch" in logs[0]["error"]


def test_the_binding_that_is_installed_has_what_is_used_of_it() -> None:
    nvml = load_nvml()
    assert nvml is not None
    names = [name for name in vars(Nvml) if name.startswith("nvml")]
    assert len(names) > 5
    for name in names:
        assert callable(getattr(nvml, name))
    assert {"NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"} <= set(dir(nvml))
    find_gpus(nvml)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1,0", ["GPU-b", "GPU-a"]),
        ("GPU-b", ["GPU-b"]),
        ("0, GPU-b", ["GPU-a", "GPU-b"]),
        ("0,7,1", ["GPU-a"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_what_a_scheduler_allotted_is_all_there_is(visible: str, uuids: list[str]) -> None:
    found = find_gpus(Machine(["GPU-a", "GPU-b"]), visible=visible)
    assert [gpu.uuid for gpu in found] == uuids


@pytest.mark.parametrize(
    ("wanted", "indices"), [("all", [0, 1, 2]), ("none", []), ("0", [0]), (" 2, 0,2", [2, 0])]
)
def test_gpus_are_chosen_by_index(wanted: str, indices: list[int]) -> None:
    chosen = choose_gpus(gpus("GPU-a", "GPU-b", "GPU-c"), wanted)
    assert [gpu.index for gpu in chosen] == indices


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("3", "no GPU 3 on this machine: it has 0, 1"),
        ("0,3", "no GPU 3"),
        ("cuda:0", "should be all, none, or indices"),
        ("", "should be all, none, or indices"),
        ("-1", "should be all, none, or indices"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(wanted: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        choose_gpus(gpus("GPU-a", "GPU-b"), wanted)


def test_an_index_on_a_machine_without_gpus_says_so() -> None:
    with pytest.raises(InvalidInput, match="NVML finds none"):
        choose_gpus([], "0")


def test_neighbours_make_groups_and_the_rest_is_left_over() -> None:
    found = gpus("GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e")
    assert [[gpu.index for gpu in group] for group in group_gpus(found, 2)] == [[0, 1], [2, 3]]
    assert [len(group) for group in group_gpus(found, 1)] == [1] * 5


def test_a_group_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(EngineMisconfigured, match="A group of 4 GPUs is asked for, and 2"):
        group_gpus(gpus("GPU-a", "GPU-b"), 4)


def test_slices_are_never_joined() -> None:
    with pytest.raises(EngineMisconfigured, match="0 can be joined"):
        group_gpus(gpus("MIG-a", "MIG-b"), 2)
    assert len(group_gpus(gpus("MIG-a", "MIG-b"), 1)) == 2


@pytest.mark.parametrize(
    ("uuids", "environment"),
    [
        ((), {"CUDA_VISIBLE_DEVICES": "", "_BATCHCTL_DEVICE": "cpu"}),
        (
            ("GPU-12345678-9abc", "GPU-aaaaaaaa-bbbb"),
            {
                "CUDA_VISIBLE_DEVICES": "GPU-12345678-9abc,GPU-aaaaaaaa-bbbb",
                "_BATCHCTL_DEVICE": "cuda:0,1 NVIDIA H100 x2 (GPU-12345678, GPU-aaaaaaaa)",
            },
        ),
    ],
)
def test_a_process_is_pinned_by_uuid(
    uuids: tuple[str, ...], environment: Mapping[str, str]
) -> None:
    assert pin(gpus(*uuids)) == environment


def test_a_single_gpu_is_called_by_number_name_and_uuid() -> None:
    assert describe_group(gpus("MIG-12345678-9")) == "cuda:0 NVIDIA H100 (MIG-12345678)"
