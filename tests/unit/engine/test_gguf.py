"""GGUF files read by their headers: what they say, and what a damaged one costs."""

import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import GenerationDefaults, LlamacppConfig
from engine.gguf import is_gguf, read
from engine.registry import describe_model
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.request import COMPLETIONS, TEXT_ENDPOINTS

UINT32, FLOAT, STRING, ARRAY = 4, 6, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value: object) -> bytes:
    if isinstance(value, list):
        held = b"".join(map(text, value))
        return text(key) + struct.pack("<IIQ", ARRAY, STRING, len(value)) + held
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", FLOAT, value)
    return text(key) + struct.pack("<II", UINT32, value)


ENTRIES: dict[str, object] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "b", "<end>"],
    "tokenizer.chat_template": "{{ messages }}",
}


def make_content(changes: Mapping[str, object] | None = None) -> bytes:
    """Return a file with one tensor of 2 x 64 values in F16; an entry that is None is left out."""
    entries = {k: v for k, v in {**ENTRIES, **(changes or {})}.items() if v is not None}
    content = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(entries))
    content += b"".join(entry(key, value) for key, value in entries.items())
    content += text("token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 2, 1, 0)
    return content + bytes(-len(content) % 32) + bytes(256)


def make(path: Path, changes: Mapping[str, object] | None = None) -> Path:
    """Write such a file."""
    path.write_bytes(make_content(changes))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(EngineMisconfigured) as caught:
        read(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_file_says_what_it_holds(tmp_path: Path) -> None:
    found = read(make(tmp_path / "a.gguf"))
    assert (found.architecture, found.quantization, found.context_tokens) == (
        *("llama", "Q4_K_M"),
        4096,
    )
    assert found.num_parameters == 128
    assert found.lengths == {"tokenizer.ggml.tokens": 3}
    # One layer, two heads for keys and values, 16 wide.
    assert found.cache_values_per_token == 2 * (16 + 16)


def test_model_is_described_without_llama_cpp_and_torch(tmp_path: Path) -> None:
    path = make(tmp_path / "a.gguf")
    found = describe_model(LlamacppConfig(model=str(path), slots=3), "mine")
    assert (found.model, found.engine, found.num_slots) == ("mine", "llamacpp", 3)
    assert (found.context_tokens, found.quantization) == (4096, "Q4_K_M")
    assert found.endpoints == TEXT_ENDPOINTS
    plain = make(tmp_path / "b.gguf", {"tokenizer.chat_template": None})
    assert describe_model(LlamacppConfig(model=str(plain)), "x").endpoints == (COMPLETIONS,)
    program = (
        "import sys; from engine.config import LlamacppConfig; from engine.registry import "
        "describe_model; describe_model(LlamacppConfig(model=sys.argv[1]), 'x'); "
        "assert not {'torch', 'transformers', 'llama_cpp'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, env={**os.environ})


def test_fingerprint_changes_with_what_could_change_answers(tmp_path: Path) -> None:
    path = make(tmp_path / "a.gguf")

    def fingerprint(file: Path = path, **changes: object) -> str:
        config = LlamacppConfig.model_validate({"model": str(file), **changes})
        return describe_model(config, "x").fingerprint

    first = fingerprint()
    assert fingerprint(slots=2, threads=1, mlock=True) == first
    assert fingerprint(make(tmp_path / "moved.gguf")) == first
    others = {
        fingerprint(cache_dtype="float32"),
        fingerprint(repack=True),
        fingerprint(defaults=GenerationDefaults(temperature=0.5)),
        fingerprint(make(tmp_path / "b.gguf", {"general.file_type": 7})),
        fingerprint(make(tmp_path / "c.gguf", {"tokenizer.ggml.tokens": ["a", "c", "<end>"]})),
    }
    assert len({first, *others}) == 6


def test_every_cut_is_told_and_costs_nothing(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for num_bytes in range(len(whole)):
        cut.write_bytes(whole[:num_bytes])
        message = refusal(cut)
        assert "damaged" in message or "no GGUF file" in message


def test_every_flipped_byte_is_read_or_told(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    tracemalloc.start()
    try:
        for at in range(len(whole) - 256):
            for flip in (0x01, 0x80, 0xFF):
                content = bytearray(whole)
                content[at] ^= flip
                broken.write_bytes(content)
                try:
                    describe_model(LlamacppConfig(model=str(broken)), "x")
                except EngineMisconfigured:
                    continue
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_huge_claims_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for counts in ((2**63, 1), (1, 2**63), (2**20, 0), (0, 60_000)):
        path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, *counts) + bytes(64))
        assert "damaged" in refusal(path)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text("k")
    for kind in (UINT32, STRING):
        path.write_bytes(head + struct.pack("<IIQ", ARRAY, kind, 2**61) + bytes(64))
        assert "damaged" in refusal(path)
    path.write_bytes(head + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(64))
    assert "unknown type" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.block_count": 0}, "0 layers"),
        ({"llama.block_count": 3}, "3 layers and has 1 tensors"),
        ({"llama.block_count": 2**32 - 1}, "layers"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "epsilon is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
        ({"llama.rope.freq_base": math.inf}, "freq_base is inf"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "its vocabulary has a token twice"),
    ],
    ids=str,
)
def test_values_that_would_end_llama_cpps_process_are_refused_before_it_sees_them(
    tmp_path: Path, changes: Mapping[str, object], said: str
) -> None:
    message = refusal(make(tmp_path / "a.gguf", changes))
    assert "a.gguf is damaged" in message
    assert said in message
    assert "copy it again" in message


def test_vocabulary_may_have_gaps(tmp_path: Path) -> None:
    path = make(tmp_path / "a.gguf", {"tokenizer.ggml.tokens": ["a", "", "b", ""]})
    assert read(path).lengths == {"tokenizer.ggml.tokens": 4}


HEADER_END = len(make_content()) - 256


@settings(max_examples=300)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, HEADER_END - 1), st.binary(min_size=1, max_size=12)), max_size=6
    ),
    length=st.one_of(st.none(), st.integers(0, HEADER_END + 256)),
)
def test_any_damage_to_the_header_is_read_or_told_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], length: int | None
) -> None:
    content = bytearray(make_content())
    for at, piece in edits:
        content[at : at + len(piece)] = piece
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(content[:length])
    tracemalloc.start()
    try:
        describe_model(LlamacppConfig(model=str(path)), "x")
    except EngineMisconfigured as error:
        assert "\n" not in error.message  # noqa: PT017 -- most damage is refused, some is not seen
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 20_000_000


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    assert "There is no file" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "no GGUF file" in refusal(path)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 1, 0, 0))
    assert "version 1" in refusal(path)
    path.write_bytes(struct.pack(">4sIQQ", b"GGUF", 3, 0, 0))
    assert "big-endian" in refusal(path)
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    assert "cannot be read" in refusal(folder)
    assert [is_gguf(name) for name in ("a.gguf", "b.GGUF", "gguf", "a.bin")] == [
        *(True, True),
        *(False, False),
    ]


def test_parts_of_a_model_have_to_be_complete(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-{n:05}-of-00002.gguf" for n in (1, 2))
    make(first, {"split.count": 2})
    assert second.name in refusal(first)
    make(second, {"split.count": 2})
    assert read(first).num_bytes == first.stat().st_size + second.stat().st_size
    assert f"give the first, {first.name}" in refusal(second)
    other = make(tmp_path / "other.gguf", {"split.count": 2})
    assert "not named like" in refusal(other)


def test_file_without_a_model_or_vocabulary_is_refused(tmp_path: Path) -> None:
    for key, told in (
        ("general.architecture", "architecture"),
        ("tokenizer.ggml.tokens", "vocabulary"),
    ):
        path = make(tmp_path / "a.gguf", {key: None})
        with pytest.raises(EngineMisconfigured, match=told):
            describe_model(LlamacppConfig(model=str(path)), "x")
