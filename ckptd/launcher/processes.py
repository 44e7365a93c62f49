"""What Linux lets a parent know and do about its descendants; the only file here that calls libc."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none can escape by forking twice."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent_pid: int) -> None:
    """Make this process end when `parent_pid` does: a rank without its launcher would hold its GPU unseen."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the line above, in which case no signal will ever come.
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def fork() -> int:
    """Fork as `os.fork` does, without Python's warning about threads, which an option may turn into an exception.

    Whoever forks here has looked at the threads there are; see `preload.why_unfit`.
    """
    with warnings.catch_warnings():  # left again at once, in the child too
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def flush_c_streams() -> None:
    """Write out what C libraries have printed and libc still holds: each forked child would print it again."""
    _libc.fflush(None)


def current_folder() -> str:
    """Return this process's folder, whether it still exists or not."""
    return str(Path("/proc/self/cwd").readlink())


def open_descriptors() -> dict[int, str]:
    """Return this process's open descriptors above the standard three, and what each refers to."""
    found: dict[int, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        # The descriptor that listed the folder is in the list and closed by now.
        with suppress(FileNotFoundError):
            found[int(entry.name)] = str(entry.readlink())
    return {number: target for number, target in found.items() if number > 2}


def close_descriptors(*, but: int = -1) -> None:
    """Close every descriptor above the standard three, except one."""
    for number in open_descriptors():
        if number != but:
            os.close(number)


def kill_group(leader_pid: int, number: int) -> None:
    """Send a signal to the process group of a rank; a group that has ended needs none."""
    with suppress(ProcessLookupError):
        os.killpg(leader_pid, number)


def end_descendants(deadline_s: float) -> bool:
    """Kill and reap everything that descends from this process; return whether that succeeded in time."""
    end_s = time.monotonic() + deadline_s
    # Again and again: one that was just being forked is found on the next round, and orphans arrive one by one.
    while _reap_children():
        _kill_descendants()
        if time.monotonic() > end_s:
            return False
        time.sleep(0.001)
    return True


def has_children() -> bool:
    """Whether this process has a child, living or ended."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _reap_children() -> bool:
    """Reap every child that has ended; return whether there are others."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def _kill_descendants() -> None:
    """SIGKILL everything that descends from this process.

    A process number may be given anew between looking and killing, so each is pinned by a pidfd and looked at once
    more: killing a stranger is the one fault that nobody would forgive.
    """
    family = {os.getpid()}
    parents = _parents()
    grown = True
    while grown:
        members = {pid for pid, parent in parents.items() if parent in family} - family
        family |= members
        grown = bool(members)
    for pid in family - {os.getpid()}:
        with suppress(ProcessLookupError):
            _kill_if_in(family, pid)


def _kill_if_in(family: set[int], pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        if _parent(pid) in family:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    finally:
        os.close(descriptor)


def _parents() -> dict[int, int | None]:
    return {int(entry.name): _parent(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}


def _parent(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # Ended meanwhile; or somebody else's, on a machine that hides those.
        return None
    # The second field is the program's name in brackets and may itself hold blanks and brackets.
    return int(fields[fields.rindex(b")") + 2 :].split()[1])


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
