"""Which sampling parameters a request really runs with: the line's, the settings', the model's."""

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.config import GenerationDefaults
from jobs.domain.request import Request, SamplingParams

OPENAI_DEFAULTS = SamplingParams(temperature=1.0, top_p=1.0, top_k=0)
"""What OpenAI's API does with a body that says nothing."""


def read_model_defaults(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Return what a model's own `generation_config.json` asks for.

    A file that says `do_sample: false` means greedy; one that does not mention it says nothing.
    """
    if generation_config.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    if not generation_config.get("do_sample"):
        # Older files list the library's defaults beside an absent do_sample: nobody's choice.
        return SamplingParams()
    repetition = generation_config.get("repetition_penalty")
    temperature = generation_config.get("temperature")
    top_p = generation_config.get("top_p")
    top_k = generation_config.get("top_k")
    return SamplingParams(
        temperature=None if temperature is None else float(temperature),
        top_p=None if top_p is None else float(top_p),
        top_k=None if top_k is None else int(top_k),
        repetition_penalty=None if repetition is None else float(repetition),
    )


def resolve_sampling(
    request: Request, defaults: GenerationDefaults, model: SamplingParams | None
) -> SamplingParams:
    """Return a request's sampling parameters with every hole filled.

    The line's own come first, then the settings' `defaults`, then the model's own, then OpenAI's.
    `max_tokens` and `seed` stay None where nobody set them: the rest of the context, any seed.
    """
    asked = request.sampling
    model = model or OPENAI_DEFAULTS
    temperature = float(_first(asked.temperature, defaults.temperature, model.temperature, 1.0))
    return msgspec.structs.replace(
        asked,
        max_tokens=longest_answer(asked, defaults),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=float(_first(asked.top_p, defaults.top_p, model.top_p, 1.0)),
        top_k=max(0, int(_first(asked.top_k, defaults.top_k, model.top_k, 0))),
        seed=asked.seed if asked.seed is not None else defaults.seed,
        stop=asked.stop or defaults.stop,
        repetition_penalty=float(_first(asked.repetition_penalty, model.repetition_penalty, 1.0)),
        min_p=float(_first(asked.min_p, model.min_p, 0.0)),
    )


def longest_answer(asked: SamplingParams, defaults: GenerationDefaults) -> int | None:
    """Return how many tokens an answer may have; None: as many as the context has room for."""
    wanted = asked.max_tokens if asked.max_tokens is not None else defaults.max_tokens
    cap = defaults.max_tokens_cap
    return wanted if cap is None else min(wanted or cap, cap)


def is_greedy(resolved: SamplingParams) -> bool:
    """Return whether the same question always gets the same answer."""
    return resolved.temperature == 0 or resolved.top_k == 1


GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: logits divided by it leave the range of float32."""


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
