"""The engine protocol: `generate` pulls requests lazily and yields results as they finish."""

from collections.abc import Generator, Sequence
from typing import Protocol

from engine.tuning import Tuning
from jobs.domain.request import Capabilities, Request, SamplingParams
from jobs.domain.result import Result


class Source(Protocol):
    """Where an engine gets its requests from; every call returns at once."""

    def take(self, n: int) -> Sequence[Request] | None:
        """Return up to `n` requests, an empty sequence when there is none yet, or None at the end.

        After None has been returned it is always returned.
        """
        ...

    def is_aborted(self, request_id: int) -> bool:
        """Return whether nobody waits for this request any more; the engine may drop it."""
        ...


class Engine(Protocol):
    """A model on a device.

    `generate` yields exactly one result for every request it took that was not aborted, in
    completion order. A request that cannot be served yields a result with an error; an exception
    means that the engine itself is in trouble: EngineDied, EngineOutOfMemory,
    EngineMisconfigured. Closing the generator aborts what is in flight. One `generate` runs at a
    time; after it ended, another may start.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""
        ...

    @property
    def num_slots(self) -> int:
        """How many requests the engine works on at once, at most."""
        ...

    @property
    def tuning(self) -> Tuning | None:
        """What it works with now, where it chooses that; any thread may ask."""
        ...

    def count_tokens(self, request: Request) -> int:
        """Return the exact number of prompt tokens of a request."""
        ...

    def resolve_sampling(self, request: Request) -> SamplingParams:
        """Return the request's sampling parameters with every default filled in."""
        ...

    def progress(self) -> int:
        """Return a number that grows while the engine works; any thread may ask."""
        ...

    def generate(self, source: Source) -> Generator[Result]:
        """Yield a result for each request of `source`, as they finish."""
        ...

    def close(self) -> None:
        """Give the device back; may be called twice."""
        ...
