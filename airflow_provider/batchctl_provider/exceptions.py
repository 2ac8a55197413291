"""What goes wrong with a batch or its server; tasks that raise these are retried as usual.

BatchctlError
├── ServerUnavailable   the server did not answer for too long
├── RequestRefused      the server said no; the same call again would be refused again
├── BatchTimedOut       the batch took longer than the task waits
└── BatchNotCompleted
    ├── BatchFailed         its input is wrong; the message says which lines
    ├── BatchExpired        it took longer than its completion window
    ├── BatchCancelled      somebody cancelled it
    └── TooManyLinesFailed  it completed, with more failed lines than allowed
"""

from batchctl_provider.version_compat import AirflowException


class BatchctlError(AirflowException):
    """Anything this provider raises on purpose."""


class ServerUnavailable(BatchctlError):
    """The server does not answer, or not as a batchctl server does."""


class RequestRefused(BatchctlError):
    """The server refused a call.

    Attributes:
        status: of the HTTP answer.
        code: the server's name of the error, if it has one.
        param: the parameter that is to blame, if one is.
    """

    def __init__(
        self, message: str, *, status: int, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class BatchTimedOut(BatchctlError):
    """The batch did not end while the task was willing to wait; it was asked to end."""


class BatchNotCompleted(BatchctlError):
    """The batch ended, and not well."""


class BatchFailed(BatchNotCompleted):
    """The input of the batch is wrong."""


class BatchExpired(BatchNotCompleted):
    """The batch was not done within its completion window."""


class BatchCancelled(BatchNotCompleted):
    """The batch was cancelled."""


class TooManyLinesFailed(BatchNotCompleted):
    """A larger share of lines failed than is allowed."""
