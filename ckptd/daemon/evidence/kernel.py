"""What /proc says of a process. Nothing read here can wait for the process itself.

Its command line, environment and maps are left alone: to read them takes a lock that a hung process may hold.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ckptd.daemon.evidence.pieces import read_head

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_FILES = ("status", "wchan", "stack", "syscall", "schedstat", "io", "limits", "cgroup", "oom_score")
_MAX_TASKS = 512
_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12
"""Where /proc/PID/stat has them, counted from the field behind the program's name."""


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread as the kernel sees it now."""

    name: str
    state: str
    """One letter; empty when it is gone."""
    cpu_s: float
    """How long it has run."""
    wchan: str
    """In which function of the kernel it sleeps; empty when it runs or nobody may know."""
    wanted_s: float = 0.0
    """How long it has run or has waited for a processor: on a busy machine a thread that computes hardly runs."""


def thread(pid: int, tid: int | None = None) -> Thread:
    """Return what the kernel knows of a thread, by default of the process's main thread."""
    folder = PROC / str(pid) / "task" / str(pid if tid is None else tid)
    head, _, rest = (read_head(folder / "stat") or "").rpartition(")")
    fields = rest.split()
    if len(fields) <= _SYSTEM_TICKS:
        return Thread("", "", 0.0, "")
    cpu_s = (int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])) / _TICKS_PER_S
    wchan = (read_head(folder / "wchan") or "").strip()
    wanted_ns = (read_head(folder / "schedstat") or "").split()[:2]
    wanted_s = sum(map(int, wanted_ns)) / 1e9 if wanted_ns else cpu_s
    return Thread(head.partition("(")[2], fields[_STATE], cpu_s, "" if wchan == "0" else wchan, wanted_s)


def describe(pid: int) -> str:
    """Return the state of a process and of its threads as text, empty when it is gone."""
    folder = PROC / str(pid)
    if not folder.exists():
        return ""
    parts = []
    for name in _FILES:
        text = read_head(folder / name)
        parts.append(f"== {name} ==\n{'(may not be read)' if text is None else text.rstrip()}\n")
    return "\n".join([*parts, _tasks(pid)])


def _tasks(pid: int) -> str:
    try:
        numbers = sorted(int(item.name) for item in (PROC / str(pid) / "task").iterdir())
    except OSError:
        numbers = []
    lines = [f"== {len(numbers)} threads: number, state, CPU seconds, name, where it sleeps in the kernel =="]
    for number in numbers[:_MAX_TASKS]:
        item = thread(pid, number)
        lines.append(f"{number:>8} {item.state or '-'} {item.cpu_s:10.2f}  {item.name:<16} {item.wchan}")
    if len(numbers) > _MAX_TASKS:
        lines.append(f"and {len(numbers) - _MAX_TASKS} more")
    return "\n".join(lines) + "\n"
