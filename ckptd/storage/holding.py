"""Holds: one process at a time has a job on a filesystem, until it lets go or ends, however it ends.

A hold is a `flock` on a file of the job. The kernel lets go of it with the process, so a killed holder leaves nothing
that anybody would have to judge, but for the file itself, which the next holder takes over. Whoever lets go removes the
file before the lock is gone; one that waited for it has locked a file without a name then, sees that, and begins again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from ckptd.errors import FencedError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What filesystems answer that have no locks, some of those behind a network."""
_POLL_S = 0.05
_MOST_BYTES = 4096


class Holds:
    """What one tier holds. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Path, tuple[int, int]] = {}
        """Which file this process, by its number, has locked through which descriptor."""

    def take(self, what: str, path: Path, deadline_s: float) -> None:
        """Lock `path`, for what errors call `what`; what is held already stays so.

        Raises `FencedError` that names the holder when somebody else has it for all of `deadline_s`, and the `OSError`
        of a filesystem that has no locks.
        """
        end_s = time.monotonic() + deadline_s
        with self._lock:
            while path not in self._held:
                descriptor = _try(path)
                if descriptor is not None:
                    self._held[path] = os.getpid(), descriptor
                elif time.monotonic() >= end_s:
                    raise FencedError(
                        f"{what} is held by {_holder(path)}, who has {path} locked",
                        hint="one agent runs a job on a store: stop that one, or give this job another name or store",
                    )
                else:
                    time.sleep(_POLL_S)

    def close(self) -> None:
        """Let go of everything, and remove the files.

        A process that was forked from the holder's shares the locks; it must not remove what the other still holds.
        It takes no lock of ours, since another thread may have had it when the process was forked.
        """
        held, self._held = self._held, {}
        for path, (owner, descriptor) in held.items():
            if owner == os.getpid() and _is_at(descriptor, path):
                with contextlib.suppress(OSError):  # the next holder takes the file over
                    path.unlink()
            os.close(descriptor)


def _try(path: Path) -> int | None:
    """Return a descriptor of the locked file, None while somebody else has it."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            _sign(descriptor)
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:  # what another user's process left can be locked all the same
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Say in the locked file who has it; only people read that."""
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z"
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()
    with contextlib.suppress(OSError):  # no room, or another user's file: it is locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _holder(path: Path) -> str:
    """Return in words who has a file locked, as far as it says so."""
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MOST_BYTES))
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
