"""An exception as it travels to the agent: as text of bounded size, since objects of a dead process are of no use."""

from __future__ import annotations

import traceback

from ckptd.errors import CkptdError
from ckptd.types import RaisedException

_TRACEBACK_BYTES = 64 * 1024
_MESSAGE_BYTES = 8 * 1024


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


def _head(text: str) -> str:
    return text.encode("utf-8", "backslashreplace")[:_MESSAGE_BYTES].decode("utf-8", "ignore")


def _tail(text: str) -> str:
    return text.encode("utf-8", "backslashreplace")[-_TRACEBACK_BYTES:].decode("utf-8", "ignore")
