from collections.abc import Mapping

import pytest

from engine.devices import Device
from jobs.domain.errors import EngineMisconfigured, InvalidInput
from jobs.worker.gpu import choose_gpus, describe_group, group_gpus, pin


def gpus(*uuids: str) -> list[Device]:
    return [
        Device(index=index, uuid=uuid, name="NVIDIA H100", total_bytes=80, free_bytes=80)
        for index, uuid in enumerate(uuids)
    ]


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
