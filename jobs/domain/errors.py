"""Every exception raised on purpose, grouped by who must act.

BatchctlError
├── InvalidInput         the caller changes something: InvalidLine, UnsupportedByEngine,
│                        IdentityChanged
├── NotFound, Conflict   the caller looks again: IllegalTransition, AlreadyLocked
├── LeaseLost            nobody; another worker owns the unit, so stop quietly
├── EngineError          retryable: EngineUnavailable, EngineQuarantined, EngineDied,
│                        EngineTimedOut
│                        not: EngineOutOfMemory, EngineMisconfigured
├── InternalError        the developers: a fault of this program
└── StorageError         retryable: DatabaseUnavailable, BlobStoreUnavailable
                         not: BlobMissing, BlobCorrupt
"""

from typing import ClassVar


class BatchctlError(Exception):
    """What happened, to which id, and what to do; never a prompt or an answer.

    `code` is stable: it is seen in the API, the error file and the metrics.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidInput(BatchctlError):
    """The caller has to change something; `error_code` says what exactly."""

    code: ClassVar[str] = "invalid_request"

    def __init__(
        self, message: str, *, param: str | None = None, error_code: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.error_code = error_code or self.code


class InvalidLine(InvalidInput):
    """One line of an input file cannot be run; `error_code` is one of the contract's codes."""

    code: ClassVar[str] = "invalid_line"


class UnsupportedByEngine(InvalidInput):
    """The engine that would serve the request cannot do what it asks for."""

    code: ClassVar[str] = "unsupported_parameter"


class IdentityChanged(InvalidInput):
    """A run is to be resumed with other options than it was started with."""

    code: ClassVar[str] = "options_changed"


class NotFound(BatchctlError):
    """There is no such file, batch or model, or it belongs to somebody else."""

    code: ClassVar[str] = "not_found"


class Conflict(BatchctlError):
    """The state of the thing does not allow the call."""

    code: ClassVar[str] = "conflict"


class IllegalTransition(Conflict):
    """The status table has no such move."""

    code: ClassVar[str] = "illegal_transition"


class AlreadyLocked(Conflict):
    """Another process works in this data folder."""

    code: ClassVar[str] = "already_locked"


class LeaseLost(BatchctlError):
    """Another worker owns the unit now; stop quietly and write nothing."""

    code: ClassVar[str] = "lease_lost"


class EngineError(BatchctlError):
    """The engine could not do its work."""

    code: ClassVar[str] = "engine_error"


class EngineUnavailable(EngineError):
    """The engine is not there now."""

    code: ClassVar[str] = "engine_unavailable"
    retryable: ClassVar[bool] = True


class EngineQuarantined(EngineUnavailable):
    """The engine died too often without a request being to blame; its device is to rest."""

    code: ClassVar[str] = "engine_quarantined"


class EngineDied(EngineError):
    """The engine process ended; `suspects` are the request ids that were in flight.

    `cause` is the code of what the engine said of itself, if it could.
    """

    code: ClassVar[str] = "engine_crash"
    retryable: ClassVar[bool] = True

    def __init__(
        self, message: str, *, suspects: frozenset[int] = frozenset(), cause: str | None = None
    ) -> None:
        super().__init__(message)
        self.suspects = suspects
        self.cause = cause


class EngineTimedOut(EngineDied):
    """The engine made no progress for too long and was ended."""

    code: ClassVar[str] = "engine_timed_out"


class EngineOutOfMemory(EngineError):
    """The model or one sequence does not fit in the device's memory."""

    code: ClassVar[str] = "engine_out_of_memory"


class EngineMisconfigured(EngineError):
    """The model cannot be loaded as the settings say."""

    code: ClassVar[str] = "engine_misconfigured"


class InternalError(BatchctlError):
    """A fault of this program; the log has the traceback."""

    code: ClassVar[str] = "internal_error"


class StorageError(BatchctlError):
    """The database or the blob store failed."""

    code: ClassVar[str] = "storage_error"


class DatabaseUnavailable(StorageError):
    """The database does not answer, or refuses the connection."""

    code: ClassVar[str] = "database_unavailable"
    retryable: ClassVar[bool] = True


class BlobStoreUnavailable(StorageError):
    """The blob store does not answer, is full, or refuses the credentials."""

    code: ClassVar[str] = "blob_store_unavailable"
    retryable: ClassVar[bool] = True


class BlobMissing(StorageError):
    """There is no blob under this key."""

    code: ClassVar[str] = "blob_missing"


class BlobCorrupt(StorageError):
    """A blob's bytes are not those that were written."""

    code: ClassVar[str] = "blob_corrupt"
