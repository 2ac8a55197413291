"""What the REST API says of its things, as the client gives it; instants are unix seconds."""

import msgspec

from jobs.domain.batch import TERMINAL_STATUSES


class RequestCounts(msgspec.Struct, frozen=True):
    """How many requests a batch has, and how many ended which way."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens over all finished requests."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


class Problem(msgspec.Struct, frozen=True):
    """One fault of an input file."""

    code: str = ""
    message: str = ""
    param: str | None = None
    line: int | None = None


class Problems(msgspec.Struct, frozen=True):
    """The faults of an input file that are listed; there may be more."""

    data: list[Problem] = []
    num_errors: int = 0


class Batch(msgspec.Struct, frozen=True):
    """A batch as the server describes it; instants are unix seconds."""

    id: str
    status: str
    input_file_id: str = ""
    endpoint: str = ""
    completion_window: str = ""
    created_at: int = 0
    model: str | None = None
    models: tuple[str, ...] = ()
    errors: Problems | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: Usage | None = None
    metadata: dict[str, str] | None = None
    reuse: bool = False
    num_reused: int = 0

    @property
    def is_terminal(self) -> bool:
        """Whether it never changes again."""
        return self.status in TERMINAL_STATUSES

    @property
    def ended_at(self) -> int | None:
        """When it ended, or None."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at


class File(msgspec.Struct, frozen=True):
    """A file as the server describes it; instants are unix seconds."""

    id: str
    filename: str = ""
    bytes: int = 0
    purpose: str = ""
    created_at: int = 0
    expires_at: int | None = None
    status: str | None = None


class Model(msgspec.Struct, frozen=True):
    """A model that the server can run."""

    id: str
    owned_by: str = ""
    created: int = 0


class Worker(msgspec.Struct, frozen=True):
    """A process that works for the server, as of its last heartbeat."""

    id: str
    host: str = ""
    role: str = ""
    device: str | None = None
    models: tuple[str, ...] = ()
    model: str | None = None
    state: str = ""
    num_shards: int = 0
    tokens_per_second: float = 0.0
    heartbeat_age_seconds: float = 0.0
    reason: str | None = None
