"""What every node needs for a job: a disk that can be written, memory for its slots, and a port on loopback."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from pathlib import Path

from ckptd.plugin import NodeCheck, NodePlan, hookimpl
from ckptd.units import show_size

_PROBE_BYTES = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskCheck:
    """Whether the first tier can be written.

    Of several disks it is the first, which has the job's records; the others are passed over when they fail. A full
    disk stops a first start only: later the job makes room itself, by letting go of what it may.
    """

    name = "disk"

    def check(self, plan: NodePlan) -> str | None:
        """Write a file without a name, which no crash can leave behind, where the tier will write."""
        for folder in plan.folders[:1]:
            place = _nearest(Path(folder))
            try:
                with contextlib.closing(_Probe(place)) as probe:
                    probe.write(bytes(_PROBE_BYTES))
            except OSError as error:
                if error.errno not in _FULL or not plan.restarts:
                    return f"{place} can't be written: {error.strerror}"
        return None


class _Probe:
    """A file that is gone when it is closed; without a name where the file system can do that."""

    def __init__(self, folder: Path) -> None:
        self._path: str | None = None
        try:
            self._descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
            self._descriptor, self._path = tempfile.mkstemp(prefix=".ckptd-check-", dir=folder)

    def write(self, data: bytes) -> None:
        """Write to it."""
        os.write(self._descriptor, data)

    def close(self) -> None:
        """Remove it."""
        os.close(self._descriptor)
        if self._path is not None:
            os.unlink(self._path)  # noqa: PTH108 - mkstemp returns text


def _nearest(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists: the tier makes the rest."""
    return next((place for place in (folder, *folder.parents) if place.is_dir()), folder)


class MemoryCheck:
    """Whether there is memory for the slots that the job had the last time."""

    name = "memory"

    def check(self, plan: NodePlan) -> str | None:
        """Compare what must be reserved with what can be."""
        left_bytes = max(0, plan.memory_left_bytes)  # less than nothing stops nobody who needs nothing
        if plan.memory_bytes <= left_bytes:
            return None
        return f"the job's slots need {show_size(plan.memory_bytes)} more, {show_size(left_bytes)} can be reserved"


class PortCheck:
    """Whether ranks can meet: there must be a free port on loopback."""

    name = "port"

    def check(self, plan: NodePlan) -> str | None:
        """Bind a port of the kernel's choice and let it go."""
        del plan
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.bind(("127.0.0.1", 0))
        except OSError as error:
            return f"no port on 127.0.0.1 can be bound: {error.strerror}"
        return None


@hookimpl
def ckptd_check_node() -> list[NodeCheck]:
    """Register the checks that every node can make."""
    return [DiskCheck(), MemoryCheck(), PortCheck()]
