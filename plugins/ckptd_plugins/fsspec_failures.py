"""What filesystems of fsspec raise, as errors of ours: which of them a retry may cure, and nothing secret in them."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Mapping
from typing import Any

from ckptd.errors import CkptdError, FencedError, FullError, NotFoundError, RefusedError, StoreError

_LIBRARIES = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "paramiko.ssh_exception": "SSHException",
}
"""Whose errors are none of Python's own kinds, where the library has been loaded."""
_SECRET_NAME = re.compile(r"key|secret|token|passw|credential|connection_string|sas", re.IGNORECASE)
_QUERY = re.compile(r"\?[^\s'\"<>]*")
_USER = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")


class Secrets:
    """The values of options that must not be shown."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._values = [
            str(value)
            for name, value in options.items()
            if _SECRET_NAME.search(name) and isinstance(value, str) and value
        ]

    def hidden(self, text: str) -> str:
        """Return a text without secrets, and without what signed URLs carry."""
        for value in self._values:
            text = text.replace(value, "…")
        return _USER.sub("…@", _QUERY.sub("?…", text))


def foreign_errors() -> tuple[type[BaseException], ...]:
    """Return what calls of a filesystem may raise, the kinds of those libraries that are loaded among them."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _LIBRARIES.items())
    return (OSError, ValueError, RuntimeError, LookupError, *(kind for kind in found if isinstance(kind, type)))


def translated(error: BaseException, verb: str, place: str, secrets: Secrets) -> CkptdError:
    """Return the error of ours; `verb` is what failed: put, read, list or delete."""
    said = secrets.hidden(f"{type(error).__name__}: {error}".rstrip(": "))
    failed = f"can't {verb} {place}: {said}"
    root = _root_of(error)
    status = _status(root)
    if isinstance(root, FileNotFoundError) or status == 404:
        if verb == "put":
            return RefusedError(failed, hint="is there such a bucket, container or host?")
        return NotFoundError(f"no object {place}")
    if verb == "put" and (isinstance(error, FileExistsError) or status in (409, 412)):
        return FencedError(f"{place} exists already")
    if isinstance(root, PermissionError) or status in (401, 403) or "Forbidden" in said:
        return RefusedError(failed, hint="check the credentials, and what they may do there")
    if isinstance(root, NotImplementedError):
        return RefusedError(failed, hint="its filesystem can't do that")
    if isinstance(root, OSError) and root.errno in (errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        return RefusedError(failed)
    if isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT):
        return FullError(failed, hint="make room there, or keep fewer checkpoints")
    return StoreError(failed)


def _root_of(error: BaseException) -> BaseException:
    """Return what to judge an error by.

    Some filesystems say "not found" for everything that went wrong, a server that is down too: then the cause tells.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    return cause if isinstance(cause, OSError) or _status(cause) not in (None, 404) else error


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error knows of."""
    for holder in (error, error.__cause__):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
                return int(value)
        response = getattr(holder, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    return None
