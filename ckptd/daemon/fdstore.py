"""Descriptors that systemd keeps for the next agent: slots and control pages outlive agent and rank together.

Kept are open files under names. systemd hands them to each new main process of the service (`FileDescriptorStoreMax=`)
and lets go of them when the service is stopped. What no job has taken by the time that all of them are back is let go
of, since the memory behind it counts for as long as anybody holds it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, MutableMapping

from ckptd.daemon.notify import notify

_FIRST = 3
"""Where systemd puts the first descriptor that it passes on."""


def slot_name(job: str, rank: int, number: int) -> str:
    """Return the name under which a slot is kept."""
    return f"{job}/{rank}/slot{number}"


def page_name(job: str, rank: int) -> str:
    """Return the name under which the control page of a rank is kept."""
    return f"{job}/{rank}/page"


class FdStore:
    """The store of one service; without systemd nothing is ever in it."""

    def __init__(self, environ: MutableMapping[str, str], pid: int) -> None:
        """Take over what systemd has passed on to this process, so that no child inherits any of it."""
        self.wanted = bool(environ.get("NOTIFY_SOCKET"))
        """Whether somebody keeps what is put here."""
        self._inherited: dict[str, int] = {}
        for name, descriptor in _passed_on(environ, pid):
            os.set_inheritable(descriptor, False)
            if name in self._inherited:
                os.close(descriptor)
            else:
                self._inherited[name] = descriptor
        for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
            environ.pop(variable, None)

    @property
    def inherited(self) -> tuple[str, ...]:
        """The names of what an agent before has left and nobody has taken yet."""
        return tuple(self._inherited)

    def take(self, name: str) -> int | None:
        """Return what was left under a name, as the caller's own; it stays kept until it is removed."""
        return self._inherited.pop(name, None)

    def put(self, name: str, descriptor: int) -> None:
        """Have a descriptor kept, instead of what an agent before has left under its name; the caller's stays open."""
        left = self.take(name)
        if left is not None:
            os.close(left)
            self.remove(name)
        if self.wanted:
            notify(f"FDSTORE=1\nFDNAME={name}", (descriptor,))

    def remove(self, name: str) -> None:
        """Have it kept no more."""
        if self.wanted:
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def remove_rest(self, but: Collection[str] = ()) -> None:
        """Let go of everything that was left and not taken, `but` for what is of jobs that are still to come back."""
        for name in self.inherited:
            if name.partition("/")[0] not in but:
                os.close(self._inherited.pop(name))
                self.remove(name)


def _passed_on(environ: MutableMapping[str, str], pid: int) -> Iterable[tuple[str, int]]:
    if environ.get("LISTEN_PID") != str(pid):
        return  # meant for another process, whose environment came down to this one
    with contextlib.suppress(ValueError):
        count = int(environ.get("LISTEN_FDS", ""))
        names = environ.get("LISTEN_FDNAMES", "").split(":")
        for number in range(count):
            yield (names[number] if number < len(names) else ""), _FIRST + number
