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
