"""What tells apart models whose describing files and settings are the same.

The weights as they are on this machine, cheaply: a folder's by names, sizes, times and what their
first and last bytes are; those of the hub by their commit. And what runs them. Another copy of the
same files may have other times, so workers are not told apart by this, only kept answers.
"""

import importlib.metadata
from functools import lru_cache
from pathlib import Path

import xxhash

from engine.config import HfConfig, VllmConfig
from engine.paths import expand
from jobs.domain.errors import EngineMisconfigured

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_SAMPLE_BYTES = 1 << 16
_LIBRARIES = {"hf": ("transformers", "torch"), "vllm": ("vllm", "torch")}


def revision_of(config: HfConfig | VllmConfig, folder: Path) -> str:
    """Return what changes when the weights in `folder`, or what runs them, do.

    Raises:
        EngineMisconfigured: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    if folder.parent.name == "snapshots":
        digest.update(folder.name.encode())
    else:
        _add_folder(digest, folder)
    if isinstance(config, VllmConfig) and config.adapter is not None:
        _add_folder(digest, expand(config.adapter))
    for name in _LIBRARIES[config.kind]:
        digest.update(f"{name} {_version_of(name)}\0".encode())
    told = config.model_dump_json(include={"engine_args", "flash_attention", "device"})
    digest.update(told.encode())
    return digest.hexdigest()


def revision_of_file(path: Path, library: str) -> str:
    """Return what changes when the weights in a file, or the library that runs them, do.

    Raises:
        EngineMisconfigured: it cannot be read.
    """
    digest = xxhash.xxh3_128(f"{library} {_version_of(library)}\0".encode())
    try:
        _add_file(digest, path)
    except OSError as error:
        raise EngineMisconfigured(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _add_folder(digest: "xxhash.xxh3_128", folder: Path) -> None:
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix not in _WEIGHTS and not path.name.startswith("adapter_"):
                continue
            _add_file(digest, path)
    except FileNotFoundError:
        digest.update(b"gone")
    except OSError as error:
        raise EngineMisconfigured(f"{folder} cannot be read: {error.strerror}.") from error


def _add_file(digest: "xxhash.xxh3_128", path: Path) -> None:
    found = path.stat()
    digest.update(f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, found.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))


@lru_cache
def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
