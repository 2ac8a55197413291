"""The kinds of weights that llama.cpp makes itself, and how they are loaded."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from jobs.domain.request import Message, Request, SamplingParams
from tests.llamacpp.conftest import Ask, open_llamacpp
from tests.unit.engine.conftest import make_tiny_model


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model's file in F16, wide enough for blocks of 256 weights."""
    from tests.llamacpp.gguf_files import write_gguf  # noqa: PLC0415 -- only where gguf is

    folder = tmp_path_factory.mktemp("wide")
    make_tiny_model(folder / "model", hidden_size=256)
    write_gguf(folder / "model", folder / "wide.gguf", "f16")
    return folder / "wide.gguf"


def test_file_that_llama_cpp_quantized_answers(wide_file: Path, tmp_path: Path, ask: Ask) -> None:
    import llama_cpp  # noqa: PLC0415 -- only where it is

    small = tmp_path / "small.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    assert not llama_cpp.llama_model_quantize(os.fsencode(wide_file), os.fsencode(small), params)
    asked = [
        Request(
            id=n,
            messages=(Message("user", f"Question {n}"),),
            sampling=SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        )
        for n in range(6)
    ]
    with closing(open_llamacpp(small)) as engine:
        assert engine.capabilities.quantization == "Q4_K_M"
        found = ask(engine, asked)
    assert all(found[n].usage.completion_tokens == 8 for n in range(6))
    assert small.stat().st_size < wide_file.stat().st_size


@pytest.mark.parametrize(("mmap", "mlock"), [(True, False), (False, False), (False, True)])
def test_weights_may_be_mapped_read_or_locked(
    tiny_file: Path,
    ask: Ask,
    mmap: bool,  # noqa: FBT001 -- a parameter of the test
    mlock: bool,  # noqa: FBT001
) -> None:
    asked = Request(id=1, prompt="Once", sampling=SamplingParams(temperature=0, max_tokens=8))
    with closing(open_llamacpp(tiny_file)) as usual:
        expected = ask(usual, [asked])[1].text
    with closing(open_llamacpp(tiny_file, mmap=mmap, mlock=mlock)) as engine:
        assert ask(engine, [asked])[1].text == expected


def test_weights_are_not_rearranged_unless_that_is_asked_for(tiny_file: Path) -> None:
    """A build for one processor has died of SIGILL at its first step on rearranged weights."""
    import llama_cpp  # noqa: PLC0415 -- only where it is

    seen: list[bool] = []
    load = llama_cpp.llama_model_load_from_file

    def note(path: bytes, params: llama_cpp.llama_model_params) -> object:
        seen.append(bool(params.use_extra_bufts))
        return load(path, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_model_load_from_file", note)
        open_llamacpp(tiny_file).close()
        open_llamacpp(tiny_file, repack=True).close()
    assert seen == [False, True]
