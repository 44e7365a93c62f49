"""What the machine itself allows: copies, the disk and digests, with no checkpointer in the way, all ranks at once."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

MIB = 2**20
BLOCKS_MIB = (1, 4, 16)
FLIGHTS = (1, 2, 4)
PIECE_BYTES = 3_579_136
"""One of 150 tensors of 512 MiB. glibc copies larger pieces faster: it writes them past the cache."""


@dataclass(frozen=True)
class Way:
    """How a file is written or read: the size of one operation and how many are in flight."""

    block_bytes: int = 4 * MIB
    flight: int = 2

    def __str__(self) -> str:
        return f"{self.block_bytes // MIB} MiB x {self.flight}"


class Bed:
    """One process's prepared memory and file."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.path = folder / f"limit{rank}"
        self.size = size
        self.source, self.target = _region(size), _region(size)

    def copy(self, piece: int) -> None:
        """Copy everything into prepared memory."""
        source, target = _address(self.source), _address(self.target)
        for at in range(0, self.size, piece):
            ctypes.memmove(target + at, source + at, min(piece, self.size - at))

    def write(self, way: Way, size: int) -> None:
        """Write a new file past the page cache, and fsync it."""
        self.path.unlink(missing_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        with memoryview(self.source) as view:
            _fly(way, size, lambda at, end: os.pwrite(file, view[at:end], at))
        os.fsync(file)
        os.close(file)

    def read(self, way: Way, size: int) -> None:
        """Read it back past the page cache."""
        file = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        with memoryview(self.target) as view:
            _fly(way, size, lambda at, end: os.preadv(file, [view[at:end]], at))
        os.close(file)

    def digest(self) -> None:
        """Digest everything, by one thread."""
        xxhash.xxh3_128_intdigest(self.source)


def _region(size: int) -> mmap.mmap:
    """Return shared memory with all its pages there, as a slot is."""
    memory = mmap.mmap(-1, size)
    ctypes.memset(_address(memory), 1, size)
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _fly(way: Way, size: int, operate: Callable[[int, int], int]) -> None:
    """Do all operations in order, with as many at once as the way says."""
    starts = iter(range(0, size, way.block_bytes))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                at = next(starts, None)
            if at is None:
                return
            end = min(at + way.block_bytes, size)
            assert operate(at, end) == end - at, "a short read or write"

    threads = [threading.Thread(target=work) for _ in range(way.flight - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()


class Limits:
    """Processes with a `Bed` each, told what to do at once."""

    def __init__(self, folder: Path, size: int, ranks: int = 2) -> None:
        """Start them. Sizes are rounded to whole pages."""
        self.size = size // 4096 * 4096
        self.ranks = ranks
        context = multiprocessing.get_context("fork")  # this process has no threads: it imports no torch
        self._barrier = context.Barrier(ranks)
        self._ends = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            context.Process(target=self._serve, args=(theirs, folder, rank), daemon=True).start()
            self._ends.append(ours)
        self.write_way, self.read_way = Way(), Way()

    def _serve(self, pipe: Any, folder: Path, rank: int) -> None:
        bed = Bed(folder, rank, self.size)
        while (order := pipe.recv()) is not None:
            what, *arguments = order
            self._barrier.wait()
            begin_s = time.monotonic()
            getattr(bed, what)(*arguments)
            pipe.send((begin_s, time.monotonic()))
        bed.path.unlink(missing_ok=True)
        pipe.send(None)

    def seconds(self, what: str, *arguments: Any) -> float:
        """Have all processes do something at once; return the time from the first begin to the last end."""
        for end in self._ends:
            end.send((what, *arguments))
        spans = [end.recv() for end in self._ends]
        begin_s, end_s = min(span[0] for span in spans), max(span[1] for span in spans)
        return float(end_s - begin_s)

    def tune(self) -> None:
        """Find the fastest ways to write and to read here, over a part of the size."""
        size = min(self.size, 192 * MIB)
        found: dict[str, dict[Way, float]] = {"write": {}, "read": {}}
        for way in (Way(block * MIB, flight) for block in BLOCKS_MIB for flight in FLIGHTS):
            for what in ("write", "read"):
                found[what][way] = self.seconds(what, way, size)
        self.write_way = min(found["write"], key=found["write"].__getitem__)
        self.read_way = min(found["read"], key=found["read"].__getitem__)

    def measure(self) -> dict[str, float]:
        """Return the seconds of each limit, once."""
        return {
            "memcpy": self.seconds("copy", self.size),
            "memcpy by tensors": self.seconds("copy", PIECE_BYTES),
            "O_DIRECT write": self.seconds("write", self.write_way, self.size),
            "O_DIRECT read": self.seconds("read", self.read_way, self.size),
            "digest": self.seconds("digest"),
        }

    def close(self) -> None:
        """End the processes and remove their files."""
        for end in self._ends:
            end.send(None)
            end.recv()
