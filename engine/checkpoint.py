"""What the weight files of a model's folder hold, by their headers: which are damaged or missing.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name to
dtype, shape and place), and the tensors. Reading headers costs milliseconds, whatever the size.

Source: the format as huggingface/safetensors describes it.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from jobs.domain.errors import EngineMisconfigured

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of a checkpoint; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.num_values * _BITS[self.dtype] // 8


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json says.

    Raises:
        EngineMisconfigured: it is not there, or is no JSON object.
    """
    try:
        described = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise EngineMisconfigured(
            f"{folder} holds no config.json, so it is not a model's folder."
        ) from None
    except OSError as error:
        raise EngineMisconfigured(
            f"{folder}/config.json cannot be read: {error.strerror}."
        ) from error
    except (ValueError, RecursionError):
        raise EngineMisconfigured(f"{folder}/config.json is no JSON.") from None
    if not isinstance(described, dict):
        raise EngineMisconfigured(f"{folder}/config.json does not hold a JSON object.")
    return described


def read_tensors(folder: Path) -> tuple[Tensor, ...]:
    """Return every tensor of the folder's safetensors; none where there are no such files.

    Raises:
        EngineMisconfigured: a file is damaged or cut off, or one that the index names is missing.
    """
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        found |= {tensor.name: tensor for tensor in read_header(path)}
    return tuple(found.values())


def _weight_files(folder: Path) -> list[Path]:
    single = folder / WEIGHTS_FILE
    if single.exists():  # as transformers does, before the index
        return [single]
    index = folder / INDEX_FILE
    try:
        content = index.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EngineMisconfigured(f"{index} cannot be read: {error.strerror}.") from error
    try:
        names = sorted(set(json.loads(content)["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EngineMisconfigured(
            f"{index} is damaged: it does not say which file holds which weights; download it "
            "again."
        ) from None
    missing = [path.name for path in files if not path.exists()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EngineMisconfigured(
            f"The weights in {folder} are incomplete: {missing[0]}{others} of {len(files)} files "
            f"that {INDEX_FILE} names cannot be found; download the model again."
        )
    return files


def read_header(path: Path) -> list[Tensor]:
    """Return the tensors that one safetensors file describes.

    Raises:
        EngineMisconfigured: it is damaged, cut off or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            file_bytes = path.stat().st_size
            if len(start) < _LENGTH_BYTES:
                raise _damaged(path, "it is empty" if not start else "it is cut off")
            header_bytes = struct.unpack("<Q", start)[0]
            if header_bytes > _MAX_HEADER_BYTES:
                raise _damaged(path, "its header is not one of safetensors")
            if _LENGTH_BYTES + header_bytes > file_bytes:
                raise _damaged(path, "it is cut off within its header")
            header = file.read(header_bytes)
    except OSError as error:
        raise EngineMisconfigured(f"{path} cannot be read: {error.strerror}.") from error
    try:
        described = json.loads(header)
        places = {k: v for k, v in described.items() if k != "__metadata__"}
        tensors = [_tensor(name, told) for name, told in places.items()]
        end = max((int(told["data_offsets"][1]) for told in places.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise _damaged(path, "its header is not one of safetensors") from None
    expected = _LENGTH_BYTES + header_bytes + end
    if file_bytes < expected:
        raise _damaged(path, f"it is cut off after {file_bytes:,} of {expected:,} bytes")
    return tensors


def _tensor(name: str, told: Mapping[str, Any]) -> Tensor:
    tensor = Tensor(name=name, dtype=told["dtype"], shape=tuple(map(int, told["shape"])))
    start, end = told["data_offsets"]
    if start < 0 or any(n < 0 for n in tensor.shape) or end - start != tensor.num_bytes:
        raise ValueError(name)
    return tensor


def _damaged(path: Path, why: str) -> EngineMisconfigured:
    return EngineMisconfigured(f"{path} is damaged: {why}; download or copy it again.")
