"""Weights that are quantized once, kept, and loaded again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bitsandbytes import functional

from engine.config import HfConfig
from engine.hf.engine import HfEngine
from engine.quantized import stored_quantization
from engine.registry import describe_model, quantize_model
from jobs.domain.errors import Conflict, EngineMisconfigured
from jobs.domain.request import Request, SamplingParams
from jobs.domain.result import Result
from tests.sources import ListSource

KINDS = ("nf4", "fp4", "int8")
REQUESTS = [
    Request(
        id=i,
        prompt=tuple(10 + (7 * i + 13 * n) % 600 for n in range(length)),
        sampling=SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    )
    for i, length in enumerate((3, 40, 100))
]


def config_of(folder: Path, quantization: str = "none", dtype: str = "bfloat16") -> HfConfig:
    return HfConfig.model_validate(
        {
            "model": str(folder),
            "device": "cpu",
            "quantization": quantization,
            "compute_dtype": dtype,
            "num_blocks": 64,
            "slots": 4,
        }
    )


def answers(config: HfConfig) -> dict[int, Result]:
    engine = HfEngine(config)
    try:
        return {one.id: one for one in engine.generate(ListSource(REQUESTS))}
    finally:
        engine.close()


def weigh(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def kept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def keep(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("kept") / kind
            quantize_model(config_of(tiny_model, kind), made[kind], told=lambda _: None)
        return made[kind]

    return keep


@pytest.mark.parametrize("kind", KINDS)
def test_kept_weights_answer_as_those_quantized_while_loading(
    tiny_model: Path, kept: Callable[[str], Path], kind: str
) -> None:
    folder = kept(kind)
    assert stored_quantization(json.loads((folder / "config.json").read_text())) == kind
    assert weigh(folder) < weigh(tiny_model) / 2
    expected = answers(config_of(tiny_model, kind))
    found = answers(config_of(folder))
    assert {i: one.text for i, one in found.items()} == {i: one.text for i, one in expected.items()}
    assert expected != answers(config_of(tiny_model))  # the kinds do differ from plain weights


@pytest.fixture
def num_quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every matrix that the library quantizes."""
    done: list[str] = []
    real = functional.quantize_4bit

    def note(*given: object, **options: object) -> object:
        done.append("4 bit")
        return real(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "quantize_4bit", note)
    return done


def test_kept_weights_are_not_quantized_again(
    tiny_model: Path, kept: Callable[[str], Path], num_quantized: list[str]
) -> None:
    folder = kept("nf4")
    num_quantized.clear()
    HfEngine(config_of(tiny_model, "nf4")).close()
    assert len(num_quantized) == 14  # seven matrices in each of two layers
    num_quantized.clear()
    HfEngine(config_of(folder)).close()
    assert num_quantized == []


def test_description_tells_what_is_stored_and_differs_by_it(
    tiny_model: Path, kept: Callable[[str], Path]
) -> None:
    found = [describe_model(config_of(kept(kind)), "m") for kind in KINDS]
    assert tuple(one.quantization for one in found) == KINDS
    found += [describe_model(config_of(tiny_model, kind), "m") for kind in ("none", *KINDS)]
    assert len({one.fingerprint for one in found}) == 7
    assert len({one.tokenizer_hash for one in found}) == 1


def test_kept_weights_may_be_asked_for_by_their_own_name_and_no_other(
    kept: Callable[[str], Path],
) -> None:
    folder = kept("nf4")
    assert describe_model(config_of(folder, "nf4"), "m").quantization == "nf4"
    HfEngine(config_of(folder, "nf4")).close()
    for load in (lambda c: describe_model(c, "m"), HfEngine):
        with pytest.raises(EngineMisconfigured, match=r"quantized already \(nf4\), and int8"):
            load(config_of(folder, "int8"))


def test_kept_weights_compute_in_the_dtype_of_the_settings(kept: Callable[[str], Path]) -> None:
    engine = HfEngine(config_of(kept("nf4"), dtype="float32"))
    settings = engine._loaded.model.config.quantization_config  # noqa: SLF001
    assert "float32" in str(settings.bnb_4bit_compute_dtype)


def test_folder_with_something_in_it_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(Conflict, match="not empty"):
        quantize_model(config_of(tiny_model, "nf4"), target, told=lambda _: None)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_folder_is_there_whole_or_not_at_all(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    seen: list[bool] = []

    def look(stage: str) -> None:
        seen.append(target.exists())
        if stage.startswith("writing"):  # somebody else is quicker
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")

    with pytest.raises(Conflict, match="not empty"):
        quantize_model(config_of(tiny_model, "nf4"), target, told=look)
    assert seen == [False, False]
    assert [path.name for path in target.iterdir()] == ["theirs.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_quantized_model_is_not_quantized_once_more(
    kept: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(EngineMisconfigured, match="quantized already"):
        quantize_model(config_of(kept("nf4"), "nf4"), tmp_path / "b", told=lambda _: None)
    assert not list(tmp_path.iterdir())
