"""An exception as it travels to the agent: as text of bounded size, since objects of a dead process are of no use.

`SystemExit` travels too, when it says that the process fails: peers notice that such a rank is gone, and say so, while
it is still clearing up, and then it may be ended before its exit code was seen.
"""

from __future__ import annotations

import traceback

from ckptd.errors import RESUMABLE, CkptdError
from ckptd.types import RaisedException

_TRACEBACK_BYTES = 64 * 1024
_MESSAGE_BYTES = 8 * 1024


def is_failure(error: BaseException | None) -> bool:
    """Return whether a process that ends with this exception has failed; one that can be resumed has not."""
    return isinstance(error, Exception) or (isinstance(error, SystemExit) and _code(error) not in (0, RESUMABLE))


def _code(error: SystemExit) -> int:
    """Return the exit code of a process that ends with it, as Python chooses it."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def describe(error: BaseException) -> RaisedException:
    """Return an exception as text, keeping the end of a long traceback, where the cause is."""
    kind = type(error)
    place = "" if kind.__module__ in {"builtins", "__main__"} else f"{kind.__module__}."
    picture = traceback.TracebackException(kind, error, error.__traceback__)
    ours = error if isinstance(error, CkptdError) else None
    return RaisedException(
        type=place + kind.__qualname__,
        message=_head(str(picture) if ours is None else ours.message),
        traceback=_tail("".join(picture.format())),
        error=None if ours is None else ours.to_json(),
    )


def describe_end(error: BaseException) -> RaisedException:
    """Return as text what a process ends with; of a `SystemExit` the exit code is the message, and all there is."""
    if isinstance(error, SystemExit):
        return RaisedException("SystemExit", str(_code(error)), "")
    return describe(error)


def _head(text: str) -> str:
    return text.encode("utf-8", "backslashreplace")[:_MESSAGE_BYTES].decode("utf-8", "ignore")


def _tail(text: str) -> str:
    return text.encode("utf-8", "backslashreplace")[-_TRACEBACK_BYTES:].decode("utf-8", "ignore")
