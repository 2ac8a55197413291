"""Images in prompts of the hf engine, on a tiny random model of the LLaVA kind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from engine.hf.engine import HfEngine
from engine.pictures import decode
from engine.registry import describe_model
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.images import Image, read_bytes
from jobs.domain.request import Constraint, Message, Request, SamplingParams
from jobs.domain.result import Result
from tests.seeing import IMAGE_TOKENS, PARTS_ONLY, make_bomb, make_image, make_llava
from tests.unit.engine.test_hf_engine import config_of

Ask = Callable[..., dict[int, Result]]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
MIXED = ("Which colours? ", 1, " Name them, then those of ", 2, " too.")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def engine(llava: Path) -> Iterator[HfEngine]:
    opened = HfEngine(config_of(llava), model="sees")
    yield opened
    opened.close()


def show(shade: int, *, kind: str = "png") -> Image:
    return read_bytes(make_image(shade, kind=kind), detail=None, param="image")


def request_of(
    request_id: int,
    *parts: str | int | Image,
    constraint: Constraint | None = None,
    sampling: SamplingParams = GREEDY,
) -> Request:
    """Return a question whose numbers stand for images of that shade."""
    shown = tuple(show(part) if isinstance(part, int) else part for part in parts)
    text = "\n".join(part for part in shown if isinstance(part, str))
    has_images = any(isinstance(part, Image) for part in shown)
    message = Message("user", text, parts=shown if has_images else ())
    return Request(id=request_id, messages=(message,), sampling=sampling, constraint=constraint)


def generate_alone(folder: Path, *parts: str | int) -> tuple[str, int]:
    """Return what transformers' own processor and generate make of it, and the prompt's length."""
    processor: Any = LlavaProcessor.from_pretrained(folder)
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    content: list[dict[str, Any]] = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": decode(show(part))}
        for part in parts
    ]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        said = model.generate(**given, do_sample=False, max_new_tokens=16)
    num_prompt = given["input_ids"].shape[1]
    return processor.tokenizer.decode(said[0, num_prompt:], skip_special_tokens=True), num_prompt


@pytest.mark.parametrize(
    "parts", [("What is this? ", 1), (2, "And this?"), MIXED, ("No image here.",)], ids=str
)
def test_a_greedy_answer_is_that_of_transformers_with_its_own_processor(
    engine: HfEngine, llava: Path, ask: Ask, parts: tuple[str | int, ...]
) -> None:
    text, num_prompt = generate_alone(llava, *parts)
    result = ask(engine, [request_of(1, *parts)])[1]
    assert (result.text, result.usage.prompt_tokens) == (text, num_prompt)
    assert engine.count_tokens(request_of(1, *parts)) == num_prompt


def test_texts_and_images_in_one_batch_have_the_answers_they_have_alone(
    engine: HfEngine, llava: Path, ask: Ask
) -> None:
    asked: list[tuple[str | int, ...]] = [
        ("Tell me about ", 1),
        ("Say something.",),
        ("Tell me about ", 2),
        MIXED,
        ("Tell me about ", 1),
        ("Say something else, at greater length than before, please.",),
    ]
    results = ask(engine, [request_of(number, *parts) for number, parts in enumerate(asked)])
    for number, parts in enumerate(asked):
        assert results[number].text == generate_alone(llava, *parts)[0], parts


def test_an_answer_depends_on_what_an_image_shows(engine: HfEngine, ask: Ask) -> None:
    results = ask(engine, [request_of(n, "What is this? ", n) for n in range(4)])
    assert len({result.text for result in results.values()}) == 4


def test_the_cache_is_shared_up_to_where_images_differ(engine: HfEngine, ask: Ask) -> None:
    begins = "Look at this closely, for as long as it takes you, and then say what it is: "
    ask(engine, [request_of(1, begins, 7, " So?")])
    again = ask(engine, [request_of(2, begins, 7, " So?")])[2]
    other = ask(engine, [request_of(3, begins, 8, " So?")])[3]
    num_before = engine.count_tokens(request_of(4, begins))
    assert again.usage.cached_tokens > num_before
    assert 0 < other.usage.cached_tokens < num_before


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_images_of_every_kind_are_read(engine: HfEngine, ask: Ask, kind: str) -> None:
    result = ask(engine, [request_of(1, "What? ", show(1, kind=kind))])[1]
    assert result.error is None
    assert result.usage.prompt_tokens == engine.count_tokens(request_of(1, "What? ", 1))


def spoil(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x5A for byte in content[middle:])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_damaged_image_costs_its_own_line(engine: HfEngine, ask: Ask, kind: str) -> None:
    whole = make_image(3, kind=kind)
    cut = read_bytes(whole[: len(whole) // 2], detail=None, param="image")
    results = ask(
        engine,
        [request_of(1, "a ", 1), request_of(2, "b ", cut), request_of(3, "c"), request_of(4, 2)],
    )
    assert {number for number, result in results.items() if result.error is None} == {1, 3, 4}
    error = results[2].error
    assert error is not None
    assert (error.code, error.status_code) == ("invalid_image", 400)


def test_bytes_that_became_others_cost_their_own_line(engine: HfEngine, ask: Ask) -> None:
    spoilt = read_bytes(spoil(make_image(3)), detail=None, param="image")
    results = ask(engine, [request_of(1, spoilt), request_of(2, "b")])
    assert results[1].error is not None
    assert results[2].error is None


def test_an_image_larger_than_it_was_said_to_be_is_not_decoded(engine: HfEngine, ask: Ask) -> None:
    liar = Image(make_bomb(9000, 9000), "png", 30, 30)
    error = ask(engine, [request_of(1, liar)])[1].error
    assert error is not None
    assert error.code == "invalid_image"


def test_an_image_is_spelled_by_the_template_only(engine: HfEngine, ask: Ask) -> None:
    forged = request_of(1, "An <image> in words, and one in pixels: ", 1)
    result = ask(engine, [forged])[1]
    assert result.error is None
    assert result.usage.prompt_tokens > IMAGE_TOKENS
    assert result.usage.prompt_tokens < 2 * IMAGE_TOKENS + 40
    alone = ask(engine, [request_of(2, "An <image> in words.")])[2]
    assert alone.error is None


def test_constraints_and_penalties_hold_beside_images(engine: HfEngine, ask: Ask) -> None:
    regex = Constraint("regex", "(red|green|blue)")
    sampling = SamplingParams(temperature=0, max_tokens=16, repetition_penalty=1.3, logprobs=2)
    result = ask(engine, [request_of(1, "Which? ", 1, constraint=regex, sampling=sampling)])[1]
    assert result.text in {"red", "green", "blue"}
    assert result.logprobs


def test_a_template_that_shows_parts_only_shows_plain_texts_too(tmp_path: Path, ask: Ask) -> None:
    folder = make_llava(tmp_path, template=PARTS_ONLY)
    engine = HfEngine(config_of(folder))
    try:
        for parts in (("Only words.",), (1, "And one image.")):
            result = ask(engine, [request_of(1, *parts)])[1]
            assert (result.text, result.usage.prompt_tokens) == generate_alone(folder, *parts)
    finally:
        engine.close()


def test_a_long_prompt_is_refused_with_its_images_counted(engine: HfEngine, ask: Ask) -> None:
    error = ask(engine, [request_of(1, *([1, 2] * 20))])[1].error
    assert error is not None
    assert error.code == "context_length_exceeded"


def test_a_sequence_that_lost_its_cache_comes_back_with_its_images(llava: Path, ask: Ask) -> None:
    """With room for less than all of them, some are queued again and computed anew."""
    engine = HfEngine(config_of(llava, num_blocks=10))
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    try:
        alone = [
            ask(engine, [request_of(n, "Say: ", n, sampling=sampling)])[n].text for n in range(4)
        ]
        together = ask(engine, [request_of(n, "Say: ", n, sampling=sampling) for n in range(4)])
        assert [together[n].text for n in range(4)] == alone
    finally:
        engine.close()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_model_sees_with_fewer_bits(llava: Path, ask: Ask, quantization: str) -> None:
    """The tower keeps its bits: its layers are narrower than a block of NF4 here."""
    config = config_of(llava, quantization=quantization, compute_dtype="bfloat16")
    engine = HfEngine(config)
    try:
        results = ask(engine, [request_of(n, "What is this? ", n) for n in range(3)])
        assert all(result.error is None for result in results.values())
        assert len({result.text for result in results.values()}) == 3
    finally:
        engine.close()


def test_a_text_model_takes_no_images(tiny_model: Path, ask: Ask) -> None:
    assert not describe_model(config_of(tiny_model), "blind").takes_images
    engine = HfEngine(config_of(tiny_model))
    try:
        error = ask(engine, [request_of(1, 1)])[1].error
        assert error is not None
        assert error.code == "unsupported_parameter"
    finally:
        engine.close()


def test_a_vision_model_is_known_without_loading_it(llava: Path) -> None:
    assert describe_model(config_of(llava), "sees").takes_images
    before = describe_model(config_of(llava), "sees").fingerprint
    described = llava / "processor_config.json"
    content = described.read_bytes()
    try:
        described.write_bytes(content.replace(b"32", b"16"))
        assert describe_model(config_of(llava), "sees").fingerprint != before
    finally:
        described.write_bytes(content)


def test_a_vision_model_without_its_processor_is_refused_with_a_reason(tmp_path: Path) -> None:
    folder = make_llava(tmp_path)
    (folder / "processor_config.json").unlink()
    with pytest.raises(EngineMisconfigured):
        HfEngine(config_of(folder))
