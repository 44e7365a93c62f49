"""What a service tells systemd: one datagram each to `$NOTIFY_SOCKET`, nothing when there is none (see sd_notify(3)).

The watchdog is fed by a timer of the event loop itself: a loop that hangs can't feed it, and an agent whose loop hangs
protects nobody. What a job's disk or bucket does is no part of that: it blocks a thread, never the loop.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Mapping, Sequence

_SEND_DEADLINE_S = 2.0
"""systemd's queue is ten datagrams long. One that doesn't empty it for so long has other troubles than us."""


def notify(state: str, descriptors: Sequence[int] = ()) -> None:
    """Tell systemd; a service manager that doesn't listen is no reason to fail."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as stream:
        stream.settimeout(_SEND_DEADLINE_S)
        try:
            stream.sendmsg([state.encode()], rights, 0, name)
        except OSError:
            return


def watchdog_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Return how often systemd wants to hear of this process, with room for a late one; None when it does not."""
    limit = environ.get("WATCHDOG_USEC", "")
    meant = environ.get("WATCHDOG_PID", str(pid))
    return int(limit) / 1e6 / 3 if limit.isdecimal() and int(limit) and meant == str(pid) else None


class Watchdog:
    """Feeds systemd's watchdog from the running loop, every `every_s`; does nothing when that is None."""

    def __init__(self, every_s: float | None) -> None:
        self._every_s = every_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Feed it now, and again and again for as long as the loop goes round."""
        if self._every_s is not None:
            notify("WATCHDOG=1")
            self._timer = asyncio.get_running_loop().call_later(self._every_s, self.start)

    def stop(self) -> None:
        """Feed it no more."""
        if self._timer is not None:
            self._timer.cancel()
