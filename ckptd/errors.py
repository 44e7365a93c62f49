"""Errors for people: what, where and a hint, with a stable code and an exit code.

Every operating error that ckptd raises is a `CkptdError`. Programmer errors go through `invariant()`
and crash the process that has the bug, because running on with a broken assumption can lose a checkpoint.
"""

from __future__ import annotations

from typing import Any, ClassVar, Never

RESUMABLE = 75
"""The exit code of a job that was stopped on purpose, and of its ranks: run the same command again and it goes on.

It is EX_TEMPFAIL of sysexits.h, and no error has it.
"""


class CkptdError(Exception):
    """An operating error: one line that says what and where, and a hint that says what to do.

    `code` is stable and machine-readable, `exit_code` is what `ckptctl` ends with, `retryable` says whether
    the same call may succeed later without anybody changing anything.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket and `--json` prints."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "retryable": self.retryable}


class ConfigError(CkptdError):
    """Raised when a flag, a variable or a line of a file can't be used as it is."""

    code = "config"
    exit_code = 2


class NotFoundError(CkptdError):
    """Raised when a job, a checkpoint or an incident of that name does not exist."""

    code = "not_found"
    exit_code = 3


class StoreError(CkptdError):
    """Raised when a tier refuses to read, write or list."""

    code = "store"
    exit_code = 4
    retryable = True


class FullError(StoreError):
    """Raised when a tier has no room left; it may have after a prune, or when somebody makes some."""

    code = "full"
    exit_code = 13


class RefusedError(StoreError):
    """Raised when a tier refuses what no retry would change: credentials, permissions, a bucket that isn't there."""

    code = "refused"
    exit_code = 14
    retryable = False


class DamagedError(CkptdError):
    """Raised when stored bytes are not what their manifest says, or the manifest itself can't be read."""

    code = "damaged"
    exit_code = 5


class MemoryBudgetError(CkptdError):
    """Raised when the slots of a job, or a file to import, don't fit into the memory that may be used."""

    code = "memory"
    exit_code = 6


class StateError(CkptdError):
    """Raised when training state can't be captured, or doesn't fit the objects it should be restored into."""

    code = "state"
    exit_code = 7


class AgentError(CkptdError):
    """Raised when the agent can't be reached, answers too late or refuses the request."""

    code = "agent"
    exit_code = 8
    retryable = True


class ProtocolError(CkptdError):
    """Raised when a peer sends bytes that are no message of this protocol version."""

    code = "protocol"
    exit_code = 9


class JobFailedError(CkptdError):
    """Raised when the restart policy has given a job up; the message is its verdict."""

    code = "job_failed"
    exit_code = 10


class FencedError(CkptdError):
    """Raised when a newer generation, or another agent, owns what this one wanted to write."""

    code = "fenced"
    exit_code = 11


class PluginError(CkptdError):
    """Raised when a plugin can't be loaded, or is asked for and not installed."""

    code = "plugin"
    exit_code = 12


class InvariantError(AssertionError):
    """Raised by `invariant()`: a bug in ckptd, never an operating condition."""


_FAMILY: tuple[type[CkptdError], ...] = (
    CkptdError,
    ConfigError,
    NotFoundError,
    StoreError,
    FullError,
    RefusedError,
    DamagedError,
    MemoryBudgetError,
    StateError,
    AgentError,
    ProtocolError,
    JobFailedError,
    FencedError,
    PluginError,
)
ERROR_BY_CODE: dict[str, type[CkptdError]] = {kind.code: kind for kind in _FAMILY}


def from_json(data: dict[str, Any]) -> CkptdError:
    """Rebuild the error that `to_json` described; an unknown code becomes a plain `CkptdError`."""
    kind = ERROR_BY_CODE.get(str(data.get("code")), CkptdError)
    hint = data.get("hint")
    return kind(str(data.get("message", "unknown error")), hint=None if hint is None else str(hint))


def invariant(holds: bool, message: str) -> None:
    """Crash when an assumption of ours is false; unlike `assert` it stays under `python -O`."""
    if not holds:
        raise InvariantError(message)


def unreachable(message: str) -> Never:
    """Crash where no input can lead; for the type checker as much as for people."""
    raise InvariantError(message)
