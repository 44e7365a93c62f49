"""Who a process is beyond its number: numbers are given anew, within a boot of the node and all the more after it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STARTED = 19
"""The place of the start time in /proc/PID/stat, counted from behind the name, which may have blanks in it."""
_ENDED = ("Z", "X")


def boot_id() -> str:
    """Return what names this boot of the node (of a container, where it has one of its own); "" where nothing does."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def started(pid: int) -> int:
    """Return when a process began, in the kernel's ticks since the boot; 0 when there is none, or it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if words[0] in _ENDED else int(words[_STARTED])


def is_alive(pid: int, began: int, of_boot: str) -> bool:
    """Return whether the process that had this number, began then, and in that boot, still runs."""
    return bool(pid) and bool(began) and of_boot == boot_id() and started(pid) == began


def signal_to(pid: int, began: int, of_boot: str, number: int) -> None:
    """Send a signal to the process that had this number, began then, and in that boot; do nothing when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        if is_alive(pid, began, of_boot):
            descriptor = os.pidfd_open(pid)
            try:
                if started(pid) == began:  # the number was not given anew before it was opened
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
