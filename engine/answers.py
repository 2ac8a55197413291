"""What results are made of in every engine that we run ourselves."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jobs.domain.request import Request
from jobs.domain.result import LineError, Result, TokenLogprob


class Told(NamedTuple):
    """A token that was chosen, its logarithm of probability, and the likeliest ones with theirs."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


def refuse(request: Request, code: str, message: str, *, param: str) -> Result:
    """Return the result of a request that cannot run."""
    return Result(
        id=request.id, error=LineError(code=code, message=message, status_code=400, param=param)
    )


def render_logprobs(
    told: Iterable[Told], bytes_of: Callable[[list[int]], bytes]
) -> tuple[TokenLogprob, ...]:
    """Return what was told of tokens, with their bytes."""
    return tuple(
        TokenLogprob(
            bytes_of([one.token]),
            one.logprob,
            tuple((bytes_of([token]), logprob) for token, logprob in one.likeliest),
        )
        for one in told
    )
