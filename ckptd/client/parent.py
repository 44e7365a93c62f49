"""The launcher as its rank sees it: by default the kernel ends a rank with its launcher.

A rank that an agent watches needs no such end: the agent learns of it, has the state captured once more, and ends the
rank itself. While there is no agent the kernel sees to it again.
"""

from __future__ import annotations

import os
import signal
import threading

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2
_TERM_GRACE_S = 5.0


class Parent:
    """The parent process. The methods are for the thread that the process began with: the kernel's note is its own."""

    def __init__(self) -> None:
        """Take the present parent, which matters only if this process was to end with it."""
        import ctypes  # noqa: PLC0415 - a rank without supervisor needs none of it

        self._libc = ctypes.CDLL(None)
        self._pid = os.getppid()
        number = ctypes.c_int(0)
        self._libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(number), 0, 0, 0)
        self._matters = bool(number.value)

    def outlive(self) -> None:
        """Go on when the parent ends."""
        if self._matters:
            self._libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)

    def die_with(self) -> None:
        """End when the parent does; what is over already is for `end_if_gone`."""
        if self._matters:
            self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

    def end_if_gone(self) -> None:
        """End this process, which can be resumed, if its parent has ended: nobody is left who would."""
        if self._matters and os.getppid() != self._pid:
            killer = threading.Timer(_TERM_GRACE_S, os.kill, (os.getpid(), signal.SIGKILL))
            killer.daemon = True
            killer.start()
            os.kill(os.getpid(), signal.SIGTERM)
