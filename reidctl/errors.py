"""The errors a user can cause, each with the exit code that the command line returns for it."""


class ReidctlError(Exception):
    """A problem that the user can read and act on.

    Args:
        message: what is wrong and where, one sentence.
        hint: the next step, one sentence; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(ReidctlError):
    """A flag, a recipe key or a combination of them that makes no sense."""

    exit_code = 2


class DataError(ReidctlError):
    """A file, table or image that is missing, damaged or contradicts another."""

    exit_code = 3


class RemoteError(ReidctlError):
    """A remote service that refused, failed or could not be reached."""

    exit_code = 4


class GateError(ReidctlError):
    """A metric below the floor that `--min` asked for."""

    exit_code = 5
