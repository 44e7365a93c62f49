"""Looking at processes from outside: CPU time to the nanosecond, and memory by kind."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NamedTuple, Self


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of all threads of a process so far, 0 for one that is gone."""
    clock = (~pid << 3) | 2  # what clock_getcpuclockid(3) returns: the scheduler's clock of that process
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


def cpu_total_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds of several processes together."""
    return sum(cpu_s(pid) for pid in pids)


class Memory(NamedTuple):
    """A process's resident memory: private (anonymous), files, and shared (memfd and the like: slots)."""

    private_bytes: int = 0
    file_bytes: int = 0
    shared_bytes: int = 0


def memory(pid: int) -> Memory:
    """Return the present memory of a process from the kernel's own counters, which cost microseconds.

    `RssAnon` has every private page and no page of a memfd; what smaps calls private would count a slot that only one
    process has touched yet, and walking the page tables of a slot takes longer than copying it.
    """
    found = {}
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name.startswith("Rss"):
                    found[name] = int(rest.split()[0]) * 1024
    except (OSError, ProcessLookupError):
        return Memory()
    return Memory(found.get("RssAnon", 0), found.get("RssFile", 0), found.get("RssShmem", 0))


class Watch:
    """The peak memory, while it is open, of this process and of its helpers, looked at every 4 ms by a thread."""

    def __init__(self, helpers: Callable[[], list[int]]) -> None:
        self._helpers = helpers
        self.own = Memory()
        self.beside_private_bytes = 0
        self.agent_bytes = 0
        """Of the first helper: private and file pages, without slots."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        pids: list[int] = []
        count = 0
        while not self._stop.wait(0.004):
            if count % 25 == 0:
                pids = self._helpers()
            count += 1
            own = memory(os.getpid())
            self.own = Memory(*(max(pair) for pair in zip(self.own, own, strict=True)))
            beside = [memory(pid) for pid in pids]
            self.beside_private_bytes = max(self.beside_private_bytes, sum(each.private_bytes for each in beside))
            if beside:
                self.agent_bytes = max(self.agent_bytes, beside[0].private_bytes + beside[0].file_bytes)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def trim() -> None:
    """Give freed memory back to the kernel, so that a peak counts what is taken and not what was left over."""
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def machine() -> tuple[float, float]:
    """Return the time, and the seconds that all cores together have been busy."""
    with open("/proc/stat") as file:
        fields = [int(part) for part in file.readline().split()[1:9]]
    busy = sum(fields) - fields[3] - fields[4]
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK")


def drop_cache(paths: Iterable[os.PathLike[str]]) -> None:
    """Have the kernel forget what it has cached of files, so that the next read is a disk's."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
