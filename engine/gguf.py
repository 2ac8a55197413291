"""What a GGUF file says of itself: metadata and tensors, read without llama.cpp and within bounds.

A file is a magic number, its version, two counts, the metadata (name, type, value), one entry for
each tensor, and the tensors. Whatever it claims is held against the bytes that are there before
anything is taken from it, so a damaged file costs a message and no memory.

Source: docs/gguf.md of ggml-org/ggml.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import xxhash

from engine.paths import expand
from jobs.domain.errors import EngineMisconfigured

Value = int | float | bool | str

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEAD_BYTES = 24
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_TEXT_BYTES = 1 << 20
_MAX_NAME_BYTES = 1 << 10
_MAX_DIMENSIONS = 4
_MAX_BLOCKS = 512
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
# The types of values by their numbers: how `struct` reads them.
_SCALARS = {
    **dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))),
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_TOKENS = "tokenizer.ggml.tokens"
_MAX_COMPARED = 1 << 22
"""Tokens of a vocabulary that are held against each other: no model has so many."""

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""By ggml's numbers: the name, and how many values lie in a block of how many bytes."""

FILE_TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
}
"""How `general.file_type` calls the mixture of types in a file, as people name files by it."""

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """A file's description; values that are arrays are told by their length alone."""

    path: Path
    values: Mapping[str, Value]
    lengths: Mapping[str, int]
    """Of the arrays."""
    num_parameters: int
    num_bytes: int
    """Of all its parts, where a model is split over several files."""
    digest: str
    """Of everything before the tensors."""
    tokenizer_digest: str

    @property
    def architecture(self) -> str:
        """The family of models, such as "llama"."""
        return self.text("general.architecture")

    @property
    def quantization(self) -> str:
        """The mixture of types of its weights, such as "Q4_K_M"; empty: not said."""
        return FILE_TYPES.get(self.number("general.file_type", -1), "")

    @property
    def context_tokens(self) -> int:
        """The context that it was trained for; 0: not said."""
        return self.number(f"{self.architecture}.context_length")

    @property
    def cache_values_per_token(self) -> int:
        """Numbers kept in the cache for each token: key and value of all layers; 0: not known.

        An upper bound where heads differ from layer to layer, or layers look back less far.
        """
        arch = self.architecture
        heads = self.number(f"{arch}.attention.head_count")
        kv_heads = self.number(f"{arch}.attention.head_count_kv", heads)
        hidden = self.number(f"{arch}.embedding_length")
        width = hidden // heads if heads > 0 else 0
        key = self.number(f"{arch}.attention.key_length", width)
        value = self.number(f"{arch}.attention.value_length", width)
        return max(0, self.number(f"{arch}.block_count") * kv_heads * (key + value))

    def number(self, key: str, default: int = 0) -> int:
        """Return a whole number of the metadata."""
        found = self.values.get(key)
        return found if isinstance(found, int) else default

    def text(self, key: str) -> str:
        """Return a text of the metadata; empty where there is none."""
        found = self.values.get(key)
        return found if isinstance(found, str) else ""


def is_gguf(source: str) -> bool:
    """Return whether this names a GGUF file, whether or not there is one."""
    return source.lower().endswith(SUFFIX)


def read(source: str | Path) -> Gguf:
    """Return what a GGUF file says of itself; reads no weights.

    Raises:
        EngineMisconfigured: it is not there, is none, is damaged, or is one part of several that
            are not all there.
    """
    path = expand(source)
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise _damaged(path, "it is empty")
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as content,
            ):
                found = _read(path, content)
    except FileNotFoundError:
        raise EngineMisconfigured(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:
        raise EngineMisconfigured(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no file'}."
        ) from error
    return _with_other_parts(found)


def _read(path: Path, content: memoryview) -> Gguf:
    reader = _Reader(path, content)
    reader.check_head()
    num_tensors, num_entries = reader.number("<Q"), reader.number("<Q")
    if num_entries > _MAX_ENTRIES or num_tensors > _MAX_TENSORS:
        raise _damaged(path, "its header claims more entries than any model has")
    values: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    tokenizer = xxhash.xxh3_128()
    for _ in range(num_entries):
        start = reader.at
        key = reader.string(_MAX_NAME_BYTES)
        kind = reader.number("<I")
        if kind == _ARRAY:
            lengths[key] = reader.skip_array(is_distinct=key == _TOKENS)
        else:
            values[key] = reader.value(kind)
        if key.startswith("tokenizer."):
            tokenizer.update(content[start : reader.at])
    num_parameters = reader.read_tensors(num_tensors, values.get("general.alignment"))
    found = Gguf(
        path=path,
        values=values,
        lengths=lengths,
        num_parameters=num_parameters,
        num_bytes=len(content),
        digest=xxhash.xxh3_128_hexdigest(content[: reader.at]),
        tokenizer_digest=tokenizer.hexdigest(),
    )
    _check_values(found, num_tensors)
    return found


def _check_values(file: Gguf, num_tensors: int) -> None:
    """Check what llama.cpp takes for granted: where it is not so, it ends its whole process."""
    arch = file.architecture
    num_blocks = file.number(f"{arch}.block_count", 1)
    most = num_tensors if file.number("split.count", 1) <= 1 else _MAX_BLOCKS
    if not 0 < num_blocks <= min(most, _MAX_BLOCKS):
        raise _damaged(
            file.path, f"it is said to have {num_blocks:,} layers and has {num_tensors:,} tensors"
        )
    for key, value in file.values.items():
        if not (key.startswith(f"{arch}.") and isinstance(value, float)):
            continue
        if not isfinite(value) or (value < 0 and key.endswith("epsilon")):
            raise _damaged(file.path, f"its {key} is {value}")


class _Reader:
    """Walks over a file's description, and never past its end."""

    def __init__(self, path: Path, content: memoryview) -> None:
        self._path = path
        self._content = content
        self.at = 0

    def check_head(self) -> None:
        """Check the magic number and the version."""
        magic = bytes(self._content[: len(_MAGIC)])
        if magic != _MAGIC:
            what = "it is cut off" if _MAGIC.startswith(magic) else "it does not begin as one does"
            raise EngineMisconfigured(f"{self._path} is no GGUF file: {what}.")
        if len(self._content) < _HEAD_BYTES:
            raise _damaged(self._path, "it is cut off within its header")
        self.at = len(_MAGIC)
        version = self.number("<I")
        if version in _VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise EngineMisconfigured(
                f"{self._path} was written for big-endian machines; convert it again on this one."
            )
        raise EngineMisconfigured(
            f"{self._path} is a GGUF file of version {version}, and 2 and 3 can be read; convert "
            "the model again."
        )

    def _take(self, num_bytes: int) -> int:
        """Step over so many bytes and return where they begin."""
        start = self.at
        if num_bytes > len(self._content) - start:
            raise _damaged(self._path, "it is cut off within its header")
        self.at = start + num_bytes
        return start

    def number(self, form: str) -> int:
        """Return the whole number that comes next."""
        found: int = struct.unpack_from(form, self._content, self._take(struct.calcsize(form)))[0]
        return found

    def string(self, max_bytes: int) -> str:
        """Return the string that comes next."""
        num_bytes = self.number("<Q")
        if num_bytes > max_bytes:
            raise _damaged(self._path, f"its header holds a text of {num_bytes:,} bytes")
        start = self._take(num_bytes)
        try:
            return str(self._content[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise _damaged(self._path, "a text in its header is no UTF-8") from None

    def value(self, kind: int) -> Value:
        """Return the value that comes next."""
        if kind == _STRING:
            return self.string(_MAX_TEXT_BYTES)
        form = self._form(kind)
        found: Value = struct.unpack_from(form, self._content, self._take(struct.calcsize(form)))[0]
        return found

    def _form(self, kind: int) -> str:
        form = _SCALARS.get(kind)
        if form is None:
            raise _damaged(self._path, f"its header holds a value of the unknown type {kind}")
        return form

    def skip_array(self, *, is_distinct: bool) -> int:
        """Step over the array that comes next, and return its length.

        Args:
            is_distinct: whether texts in it must differ; llama.cpp ends its process otherwise.
        """
        kind, length = self.number("<I"), self.number("<Q")
        if kind != _STRING:
            self._take(length * struct.calcsize(self._form(kind)))
            return length
        # Every string has its length at least: a claim that the file cannot hold ends here.
        if length * 8 > len(self._content) - self.at:
            raise _damaged(self._path, "it is cut off within its header")
        content, at, end = self._content, self.at, len(self._content)
        unpack = struct.Struct("<Q").unpack_from
        is_compared = is_distinct and length <= _MAX_COMPARED
        known: set[bytes] = set()
        for place in range(length):
            if at + 8 > end:
                break
            start, at = at + 8, at + 8 + unpack(content, at)[0]
            if is_compared:
                # It gives the empty ones names of their own.
                known.add(bytes(content[start:at]) or b"[EMPTY_%d]" % place)
        self._take(at - self.at)
        if is_compared and len(known) < length:
            raise _damaged(self._path, "its vocabulary has a token twice")
        return length

    def read_tensors(self, num_tensors: int, alignment: Value | None) -> int:
        """Step over the tensors' entries; return how many parameters there are."""
        if alignment is None:
            alignment = _DEFAULT_ALIGNMENT
        if (
            not isinstance(alignment, int)
            or not 0 < alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise _damaged(self._path, "its alignment is no power of two")
        num_parameters = 0
        end = 0
        for _ in range(num_tensors):
            self.string(_MAX_NAME_BYTES)
            num_dimensions = self.number("<I")
            if num_dimensions > _MAX_DIMENSIONS:
                raise _damaged(self._path, f"a tensor has {num_dimensions} dimensions")
            num_values = prod(self.number("<Q") for _ in range(num_dimensions))
            kind, offset = self.number("<I"), self.number("<Q")
            # One of a type that is newer than this table: llama.cpp will say more.
            _, block_values, block_bytes = TENSOR_TYPES.get(kind, ("", 1, 0))
            if num_values % block_values or offset % alignment:
                raise _damaged(self._path, "a tensor's size or place is not as its type has it")
            end = max(end, offset + num_values // block_values * block_bytes)
            num_parameters += num_values
        start = -(-self.at // alignment) * alignment
        if num_tensors and start + end > len(self._content):
            raise _damaged(
                self._path,
                f"it is cut off after {len(self._content):,} of {start + end:,} bytes",
            )
        return num_parameters


def _with_other_parts(first: Gguf) -> Gguf:
    """Return the description of a model that may be split, which its first part gives."""
    num_parts = first.number("split.count", 1)
    if num_parts <= 1:
        return first
    named = _PART.search(first.path.name)
    if named is None or int(named[2]) != num_parts:
        raise EngineMisconfigured(
            f"{first.path} is one of {num_parts} parts of a model, and is not named like "
            f"model-00001-of-{num_parts:05}.gguf; give the parts their names back."
        )
    paths = [
        first.path.with_name(f"{first.path.name[: named.start()]}-{n:05}-of-{named[2]}.gguf")
        for n in range(1, num_parts + 1)
    ]
    if first.path != paths[0]:
        raise EngineMisconfigured(
            f"{first.path} is part {int(named[1])} of {num_parts}; give the first, {paths[0].name}."
        )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise EngineMisconfigured(
            f"{first.path} is incomplete: {missing[0]} is not beside it; download all "
            f"{num_parts} parts."
        )
    return Gguf(
        path=first.path,
        values=first.values,
        lengths=first.lengths,
        num_parameters=first.num_parameters,
        num_bytes=sum(path.stat().st_size for path in paths),
        digest=first.digest,
        tokenizer_digest=first.tokenizer_digest,
    )


def _damaged(path: Path, why: str) -> EngineMisconfigured:
    return EngineMisconfigured(f"{path} is damaged: {why}; download or copy it again.")
