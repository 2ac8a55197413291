import pytest

from engine.config import GenerationDefaults
from engine.sampling import is_greedy, resolve_sampling
from jobs.domain.request import Request, SamplingParams


def resolve(temperature: float) -> SamplingParams:
    request = Request(id=1, prompt="x", sampling=SamplingParams(temperature=temperature))
    return resolve_sampling(request, GenerationDefaults(), None)


def test_temperature_that_float32_cannot_divide_by_is_greedy() -> None:
    assert resolve(1e-50).temperature == 0
    assert is_greedy(resolve(1e-50))
    assert resolve(0.01).temperature == 0.01
    assert not is_greedy(resolve(0.01))


@pytest.mark.parametrize(
    ("asked", "default", "cap", "longest"),
    [
        (None, None, None, None),
        (None, None, 100, 100),
        (None, 50, 100, 50),
        (None, 500, 100, 100),
        (70, 50, 100, 70),
        (700, 50, 100, 100),
        (700, 50, None, 700),
    ],
)
def test_cap_holds_whatever_a_line_asks_for(
    asked: int | None, default: int | None, cap: int | None, longest: int | None
) -> None:
    request = Request(id=1, prompt="x", sampling=SamplingParams(max_tokens=asked))
    defaults = GenerationDefaults(max_tokens=default, max_tokens_cap=cap)
    assert resolve_sampling(request, defaults, None).max_tokens == longest
