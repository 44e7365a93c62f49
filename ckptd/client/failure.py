"""How a rank's exception travels to the agent: as bounded text."""

from __future__ import annotations

import traceback
from typing import Any

from ckptd.errors import CkptdError

_TRACEBACK_CHARACTERS = 64 * 1024


def describe(error: BaseException) -> dict[str, Any]:
    """Return the `RaisedException.to_json()` form of an exception; of a long traceback, the end is kept."""
    text = "".join(traceback.format_exception(error))
    return {
        "type": type(error).__name__,
        "message": str(error)[:4096],
        "traceback": text[-_TRACEBACK_CHARACTERS:],
        "error": error.to_json() if isinstance(error, CkptdError) else None,
    }
