"""Images on vLLM: the same answers as the hf engine's, which are transformers' own."""

import importlib.util
from contextlib import closing
from pathlib import Path

import pytest

from engine.config import HfConfig
from engine.registry import open_engine
from jobs.domain.images import Image, read_bytes
from jobs.domain.request import Message, Request, SamplingParams
from tests.seeing import make_image, make_llava
from tests.vllm.conftest import Ask, open_vllm


def request_of(request_id: int, *parts: str | Image) -> Request:
    text = "\n".join(part for part in parts if isinstance(part, str))
    return Request(
        id=request_id,
        messages=(Message("user", text, parts=parts if len(parts) > 1 else ()),),
        sampling=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    )


def show(shade: int) -> Image:
    return read_bytes(make_image(shade), detail=None, param="image")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="vLLM's LLaVA needs a torchvision that fits torch, which has no build for CPUs here",
)
def test_answers_about_images_are_those_of_the_hf_engine(llava: Path, ask: Ask) -> None:
    whole = make_image(5)
    cut = read_bytes(whole[: len(whole) // 2], detail=None, param="image")
    requests = [
        request_of(1, "What is this? ", show(1)),
        request_of(2, "Only words."),
        request_of(3, show(2), "And this? "),
        request_of(4, "One ", show(1), " and two ", show(2)),
        request_of(5, "Damaged: ", cut),
    ]
    hf = open_engine(
        HfConfig(model=str(llava), device="cpu", compute_dtype="float32", slots=4), model="sees"
    )
    with closing(hf), closing(open_vllm(llava, name="sees")) as engine:
        theirs, ours = ask(hf, requests), ask(engine, requests)
        assert engine.capabilities.takes_images
        for request in requests[:4]:
            found, expected = ours[request.id], theirs[request.id]
            assert found.error is None, found.error
            assert found.text == expected.text
            assert found.usage.prompt_tokens == expected.usage.prompt_tokens
            assert engine.count_tokens(request) == found.usage.prompt_tokens
        error = ours[5].error
        assert error is not None
        assert error.code == "invalid_image"
