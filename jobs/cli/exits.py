"""Exit codes: the same for every command, and part of the interface.

| code | meaning |
| --- | --- |
| 0 | done; for a batch: every request has an answer |
| 1 | an error of ours that was not foreseen |
| 2 | the command line or a setting is wrong |
| 3 | the input was refused; nothing ran |
| 4 | finished, and some requests ended in the error file |
| 5 | there is no such file, batch or model |
| 6 | the server, the database or the blob store cannot be reached, or refuses us |
| 7 | the batch was cancelled or expired |
| 8 | the state of the thing does not allow it: it has ended, or another process is at it |
| 9 | the engine cannot be started, or cannot load the model |
| 10 | an audit found that a batch is not what it should be |
| 130 | interrupted (Ctrl-C); what was finished is kept |
| 141 | whoever read our output went away (`batchctl ... | head`) |
"""

from jobs.client import AccessDenied, ServerUnavailable
from jobs.domain.batch import BatchStatus
from jobs.domain.errors import (
    BatchctlError,
    Conflict,
    EngineError,
    InvalidInput,
    NotFound,
    StorageError,
)
from jobs.settings import PREFIX

OK = 0
INTERNAL = 1
USAGE = 2
REFUSED = 3
PARTIAL = 4
NOT_FOUND = 5
UNREACHABLE = 6
STOPPED = 7
CONFLICT = 8
ENGINE = 9
VIOLATED = 10
INTERRUPTED = 130
BROKEN_PIPE = 141

# The first class that matches wins.
_CODES: tuple[tuple[type[BatchctlError], int], ...] = (
    (NotFound, NOT_FOUND),
    (Conflict, CONFLICT),
    (InvalidInput, REFUSED),
    (AccessDenied, UNREACHABLE),
    (ServerUnavailable, UNREACHABLE),
    (StorageError, UNREACHABLE),
    (EngineError, ENGINE),
)
_SETTINGS_PARAMS = frozenset(
    {
        "settings",
        "config",
        "host",
        "port",
        "base_url",
        "api_key",
        "broker.url",
        "database.url",
        "worker.metrics_port",
    }
)


def for_error(error: BatchctlError) -> int:
    """Return the code of a command that ends with `error`."""
    if isinstance(error, InvalidInput) and (
        error.param in _SETTINGS_PARAMS or (error.param or "").startswith(PREFIX)
    ):
        return USAGE
    return next((code for kind, code in _CODES if isinstance(error, kind)), INTERNAL)


def for_batch(status: str, *, failed: int) -> int:
    """Return the code of a command that saw a batch end in `status` with `failed` requests."""
    match status:
        case BatchStatus.FAILED:
            return REFUSED
        case BatchStatus.CANCELLED | BatchStatus.EXPIRED:
            return STOPPED
        case _:
            return PARTIAL if failed else OK
