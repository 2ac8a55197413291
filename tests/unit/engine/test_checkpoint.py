import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from engine.checkpoint import INDEX_FILE, WEIGHTS_FILE, read_config, read_tensors
from jobs.domain.errors import EngineMisconfigured


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


def test_tensors_are_those_that_safetensors_finds(tiny_model: Path) -> None:
    with safe_open(tiny_model / WEIGHTS_FILE, framework="np") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    found = read_tensors(tiny_model)
    assert {tensor.name: tensor.shape for tensor in found} == expected
    total = sum(tensor.num_bytes for tensor in found)
    assert total < (tiny_model / WEIGHTS_FILE).stat().st_size < total + 10_000


def _cut_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _rename_dtype(content: bytes) -> bytes:
    return content.replace(b'"F32"', b'"F3?"', 1)


def _swap_digits(content: bytes) -> bytes:
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    name = next(name for name in header if name != "__metadata__")
    start, end = header[name]["data_offsets"]
    return content.replace(f"[{start},{end}]".encode(), f"[{end},{start}]".encode(), 1)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_cut_half, "cut off after"),
        (lambda content: content[:-1], "cut off after"),
        (lambda _: b"", "empty"),
        (lambda content: content[:5], "cut off"),
        (lambda content: content[:20], "within its header"),
        (lambda content: bytes(len(content)), "not one of safetensors"),
        (lambda content: b"\xff" + content[1:], "damaged"),
        (lambda content: b"\xff" * 8 + content[8:], "not one of safetensors"),
        (lambda content: content[:8] + b"\xff" + content[9:], "not one of safetensors"),
        (lambda content: content[:8] + b"[" + content[9:], "not one of safetensors"),
        (_rename_dtype, "not one of safetensors"),
        (_swap_digits, "not one of safetensors"),
        (lambda _: struct.pack("<Q", 2) + b"[]", "not one of safetensors"),
        (lambda _: struct.pack("<Q", 7) + b'{"a":1}', "not one of safetensors"),
    ],
    ids=[
        *("half", "a byte short", "empty", "no length", "no header", "zeros", "length flipped"),
        *("huge length", "header flipped", "list", "dtype", "offsets", "no object", "no tensor"),
    ],
)
def test_damaged_file_is_named_with_what_is_wrong(
    copy: Path, damage: Callable[[bytes], bytes], told: str
) -> None:
    path = copy / WEIGHTS_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EngineMisconfigured, match=told) as refused:
        read_tensors(copy)
    assert str(path) in refused.value.message
    assert "\n" not in refused.value.message


def test_shards_that_the_index_names_are_read_together(copy: Path) -> None:
    whole = read_tensors(copy)
    (copy / WEIGHTS_FILE).rename(copy / "model-00001-of-00001.safetensors")
    names = {tensor.name: "model-00001-of-00001.safetensors" for tensor in whole}
    (copy / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    assert read_tensors(copy) == whole


def test_missing_shard_is_named(copy: Path) -> None:
    (copy / WEIGHTS_FILE).rename(copy / "model-00001-of-00003.safetensors")
    places = {str(n): f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    (copy / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(EngineMisconfigured, match="incomplete") as refused:
        read_tensors(copy)
    assert "model-00002-of-00003.safetensors and 1 more of 3" in refused.value.message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_index_that_is_none_is_said(copy: Path, content: str) -> None:
    (copy / WEIGHTS_FILE).unlink()
    (copy / INDEX_FILE).write_text(content)
    with pytest.raises(EngineMisconfigured, match=r"index\.json is damaged"):
        read_tensors(copy)


def test_folder_without_weights_has_no_tensors(tmp_path: Path) -> None:
    assert read_tensors(tmp_path) == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_no_object_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(EngineMisconfigured, match=r"config\.json.* JSON"):
        read_config(tmp_path)
