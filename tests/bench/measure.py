"""Statistics, sampling of memory and CPU from outside, and tables."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import psutil


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, minimum, maximum and count."""
    listed = list(values)
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed), "n": len(listed)}


def show(values: dict[str, float] | None, unit: float = 1.0, digits: int = 2) -> str:
    """Return `median [min..max]` in a unit, "-" for what was not measured."""
    if values is None:
        return "-"
    low, middle, high = (values[key] * unit for key in ("min", "median", "max"))
    return f"{middle:.{digits}f} [{low:.{digits}f}..{high:.{digits}f}]"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as aligned columns."""
    titles = list(rows[0])
    lines = [titles, *([str(row[title]) for title in titles] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(titles))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class Sampler:
    """Samples processes' private and shared memory, 40 times a second, and their CPU time at begin and end."""

    def __init__(self, groups: dict[str, list[int]]) -> None:
        self._groups = {name: [psutil.Process(pid) for pid in pids] for name, pids in groups.items()}
        self.samples: list[tuple[float, dict[str, tuple[int, int]]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.025):
            now = {name: _memory(processes) for name, processes in self._groups.items()}
            self.samples.append((time.monotonic(), now))

    def extra_bytes(self, group: str, begin_s: float, end_s: float) -> tuple[int, int]:
        """Return the peak of a group's private and shared memory in a time, above what it had at its begin."""
        inside = [sample[group] for at_s, sample in self.samples if begin_s <= at_s <= end_s]
        before = [sample[group] for at_s, sample in self.samples if at_s <= begin_s]
        if not inside or not before:
            return 0, 0
        return max(item[0] for item in inside) - before[-1][0], max(item[1] for item in inside) - before[-1][1]

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()


def _memory(processes: list[psutil.Process]) -> tuple[int, int]:
    private = shared = 0
    for process in processes:
        for pid in [process.pid, *_children(process)]:
            anonymous, shmem = _status(pid)
            private += anonymous
            shared = max(shared, shmem)
    return private, shared


def _children(process: psutil.Process) -> list[int]:
    try:
        return [child.pid for child in process.children(recursive=True)]
    except psutil.Error:
        return []


def _status(pid: int) -> tuple[int, int]:
    values = {"RssAnon": 0, "RssShmem": 0}
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in values:
                    values[name] = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return values["RssAnon"], values["RssShmem"]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time that processes and their descendants have used."""
    total = 0.0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            for each in [process, *process.children(recursive=True)]:
                times = each.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


def other_cores(begin: tuple[float, float], ours_s: float) -> float:
    """Return how many cores everything else has used since `machine()` gave `begin`: the noise of a figure."""
    at_s, busy_s = machine()
    return max(0.0, (busy_s - begin[1] - ours_s) / (at_s - begin[0]))


def machine() -> tuple[float, float]:
    """Return the time, and the seconds that all cores together have been busy."""
    with open("/proc/stat") as file:
        fields = [int(part) for part in file.readline().split()[1:9]]
    busy = sum(fields) - fields[3] - fields[4]
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK")
