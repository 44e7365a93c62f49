"""What the kernel knows of a process's end beyond its return code: who was killed for want of memory, who dumped core.

Everything here is a file of the kernel, read at once: a death is judged in the loop, and a restart waits for that.
Nothing is known where the kernel does not tell; then a SIGKILL is just a SIGKILL.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptd.types import Evidence, OomKill, RankExit

_LOOK_EVERY_S = 1.0
"""A rank may be moved into another cgroup after its start, and an older kill there must not explain its death."""
_KILL_COUNTS_S = 30.0
"""How long a kill that was counted may explain a death: what has much memory takes its time to end."""
_RECORD_BYTES = 8192
_KILLED = re.compile(r"\bKill(?:ed)? process (\d+)\b|^oom-kill:.*\bpid=(\d+)\b")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_ESCAPED = re.compile(r"\\([0-7]{3})")
_UNLIMITED_BYTES = 2**62
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO_BYTES = 64
_EXIT_CODE_AT = 60
_STAT_FLAGS = 6
_STAT_EXIT_CODE = 49
"""Where /proc/PID/stat has the kernel's flags and the wait status, counted from the field behind the program's name."""
_EXITING = 0x4
"""The flag of a process that ends: to give back much memory takes its time."""


class Exits:
    """Gathers the facts of a rank's end and has them judged, by `judge`: the plugins' detectors."""

    def __init__(self, judge: Callable[[RankExit], Evidence | None], root: Path = Path("/")) -> None:
        self._judge = judge
        self._root = root
        self._oom = OomWatch(root)

    def begin(self, pid: int, now_s: float) -> None:
        """Note a rank's process that has just begun."""
        self._oom.begin(pid, now_s)

    def look(self, now_s: float) -> None:
        """Look at what must be known before an end, if that is due; to be called often."""
        self._oom.look(now_s)

    def evidence(self, end: RankExit, now_s: float) -> Evidence | None:
        """Return what the detectors make of an end, with all that the kernel says of it."""
        by_sigkill = end.returncode == -signal.SIGKILL
        claim = self._judge(replace(end, oom=self._oom.ended(end.pid, now_s, by_sigkill=by_sigkill)))
        if claim is None or not end.core_dumped:
            return claim
        return replace(claim, facts=(*claim.facts, core_place(self._root)))

    def close(self) -> None:
        """Let go of the kernel's log."""
        self._oom.close()


# --- who was killed for want of memory ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """The cgroup whose memory controller counts a process. `top` is where the hierarchy is mounted."""

    name: str
    path: Path
    top: Path
    unified: bool

    def kills(self) -> int | None:
        """Return how many of its processes the kernel has killed for want of memory; None where it does not count."""
        text = _read(self.path / ("memory.events" if self.unified else "memory.oom_control"))
        for line in (text or "").splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return None

    def limit_bytes(self) -> int | None:
        """Return the tightest limit of this cgroup and those above it; None when there is none."""
        name = "memory.max" if self.unified else "memory.limit_in_bytes"
        found = [text.strip() for folder in _up(self.path, self.top) if (text := _read(folder / name)) is not None]
        limits = [int(text) for text in found if text.isdecimal() and int(text) < _UNLIMITED_BYTES]
        return min(limits, default=None)


def memory_group(pid: int, root: Path = Path("/")) -> MemoryGroup | None:
    """Return the cgroup that counts a process's memory: v1, v2, or v1 beside v2 ("hybrid"), as `root` has them.

    In v2 a cgroup without the memory controller is counted in the nearest one above that has it. None when the
    process is gone, or nothing counts it.
    """
    names: dict[str, str] = {}
    for line in (_read(root / f"proc/{pid}/cgroup") or "").splitlines():
        _, controllers, name = line.split(":", 2)
        names |= dict.fromkeys(controllers.split(","), name)
    for unified, controller in ((False, "memory"), (True, "")):
        mount = next(_mounts(root, unified=unified), None) if controller in names else None
        if mount is None:
            continue
        name = names[controller]
        top, shown = root / mount[0].lstrip("/"), mount[1].rstrip("/")
        inside = name.removeprefix(shown) if name == shown or name.startswith(f"{shown}/") else "/"
        for folder in _up(top / inside.strip("/"), top):
            group = MemoryGroup(name, folder, top, unified)
            if group.kills() is not None:
                return group
    return None


def _mounts(root: Path, *, unified: bool) -> Iterator[tuple[str, str]]:
    """Yield where hierarchies that may count memory are mounted, and which folder of theirs is seen there."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        shown, place = (_ESCAPED.sub(lambda found: chr(int(found[1], 8)), part) for part in before.split(" ")[3:5])
        kind, _, options = after.split(" ", 2)
        if (kind == "cgroup2") if unified else (kind == "cgroup" and "memory" in options.split(",")):
            yield place, shown


def _up(path: Path, top: Path) -> Iterator[Path]:
    """Yield a folder and those above it, up to and with `top`."""
    yield path
    while path != top and top in path.parents:
        path = path.parent
        yield path


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


@dataclass(slots=True)
class Tally:
    """The kills that were counted in one cgroup, each of which explains one death at most."""

    seen: int | None = None
    unexplained_s: list[float] = field(default_factory=list)
    """When each of those was noticed, in monotonic seconds, that no death was explained by yet."""

    def note(self, count: int | None, now_s: float) -> None:
        """Take in what the counter says now."""
        if count is None:
            return
        if self.seen is not None:
            self.unexplained_s += [now_s] * (count - self.seen)
        self.seen = count

    def claim(self, now_s: float) -> bool:
        """Explain a death by a kill, if one is left that is not too old."""
        self.unexplained_s = [at_s for at_s in self.unexplained_s if now_s - at_s <= _KILL_COUNTS_S]
        if not self.unexplained_s:
            return False
        del self.unexplained_s[0]
        return True


class KernelLog:
    """The kernel's log from now on, as far as this process may read it and its process numbers are ours."""

    def __init__(self, path: Path = Path("/dev/kmsg")) -> None:
        self.complete = False
        """Whether every record since the beginning was read: then who is not named in it was not killed."""
        self._named: dict[int, str] = {}
        self._descriptor: int | None = None
        try:
            if str(Path("/proc/self/ns/pid").readlink()) != _FIRST_PID_NAMESPACE:
                return  # the log has the numbers of the first namespace
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)
            self.complete = True
        except OSError:
            self.close()

    def killed(self, pid: int) -> str | None:
        """Return the line that says that `pid` was killed for want of memory, if there is one."""
        while self._descriptor is not None:
            try:
                record = os.read(self._descriptor, _RECORD_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                self.complete = False
                if error.errno != errno.EPIPE:  # which says that records were lost before they were read
                    self.close()
                continue
            if not record:
                break
            self._named |= killed_in(record.decode(errors="replace"))
        return self._named.pop(pid, None)

    def close(self) -> None:
        """Let go of the log."""
        self.complete = False
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def killed_in(record: str) -> dict[int, str]:
    """Return whom a record of the kernel's log calls killed for want of memory, with its text."""
    text = record.partition(";")[2].splitlines()[:1]
    found = _KILLED.search(text[0]) if text else None
    return {} if found is None else {int(found[1] or found[2]): text[0]}


class OomWatch:
    """Tells which of a job's ranks the kernel has killed for want of memory.

    Counters are read before and after: their last value while the rank lived, and the one at its death.
    """

    def __init__(self, root: Path = Path("/"), log: KernelLog | None = None) -> None:
        self._root = root
        self._log = KernelLog() if log is None else log
        self._groups: dict[int, MemoryGroup] = {}
        self._tallies: dict[Path, Tally] = {}
        self._looked_s = 0.0
        self._seen_s: dict[int, float] = {}
        """When each process was last seen to live: not every end is told, and their numbers are given anew."""

    def begin(self, pid: int, now_s: float) -> None:
        """Note a process that has just begun."""
        group, known = memory_group(pid, self._root), self._groups.get(pid)
        if known is not None and _is_ending(pid, self._root):
            group = known
        if group is not None:
            self._groups[pid], self._seen_s[pid] = group, now_s
            self._tallies.setdefault(group.path, Tally()).note(group.kills(), now_s)

    def look(self, now_s: float) -> None:
        """Look at counters and cgroups again, if that is due."""
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            for pid in list(self._groups):
                self.begin(pid, now_s)
                if now_s - self._seen_s[pid] > _KILL_COUNTS_S:
                    del self._groups[pid], self._seen_s[pid]
            used = {group.path for group in self._groups.values()}
            self._tallies = {path: tally for path, tally in self._tallies.items() if path in used}

    def ended(self, pid: int, now_s: float, *, by_sigkill: bool) -> OomKill | None:
        """Return what killed a process, if that was a lack of memory; it is not watched any more."""
        group = self._groups.pop(pid, None)
        self._seen_s.pop(pid, None)
        said = self._log.killed(pid)
        tally = None if group is None else self._tallies[group.path]
        if group is not None and tally is not None:
            tally.note(group.kills(), now_s)
        if not by_sigkill:
            return None
        counted = tally is not None and (said is not None or not self._log.complete) and tally.claim(now_s)
        name, limit = (None, None) if group is None else (group.name, group.limit_bytes())
        if said is not None:
            return OomKill(said, certain=True, cgroup=name, limit_bytes=limit)
        if counted:
            words = f"cgroup {name} has counted one more process that was killed for want of memory"
            return OomKill(words, certain=False, cgroup=name, limit_bytes=limit)
        return None

    def close(self) -> None:
        """Let go of the kernel's log."""
        self._log.close()


# --- ends of processes that are not our children ----------------------------------------------------------------


def _is_ending(pid: int, root: Path) -> bool:
    """Whether a process is on its way out: in version 1 it counts as moved to the root then, whatever killed it."""
    stat = (_read(root / f"proc/{pid}/stat") or "").rpartition(")")[2].split()
    return len(stat) > _STAT_FLAGS and bool(int(stat[_STAT_FLAGS]) & _EXITING)


def wait_status(pid: int, pidfd: int) -> int | None:
    """Return the wait status of a process of somebody else's that has ended, None when it can't be had.

    Until its parent has reaped it, /proc says it; afterwards the pidfd does, from Linux 6.15 on.
    """
    stat = (_read(Path(f"/proc/{pid}/stat")) or "").rpartition(")")[2].split()
    if stat[:1] == ["Z"] and len(stat) > _STAT_EXIT_CODE:
        return int(stat[_STAT_EXIT_CODE])
    buffer = bytearray(_PIDFD_INFO_BYTES)
    struct.pack_into("Q", buffer, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError:
        return None
    if not struct.unpack_from("Q", buffer, 0)[0] & _PIDFD_INFO_EXIT:
        return None
    return int(struct.unpack_from("i", buffer, _EXIT_CODE_AT)[0])


def core_place(root: Path = Path("/")) -> str:
    """Say where the kernel puts core files: a pattern of names, or the program that collects them."""
    pattern = (_read(root / "proc/sys/kernel/core_pattern") or "").strip()
    collector = pattern[1:].split()[:1] if pattern.startswith("|") else []
    if collector:
        return f"core files go to {collector[0]}; where that is systemd's, `coredumpctl info PID` shows them"
    return f"core files are named {pattern or 'core'}, seen from the rank's working directory"
