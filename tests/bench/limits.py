"""What the machine itself allows: copies, the disk and digests, with nothing of ckptd in the way."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

BLOCK_BYTES = 4 * 2**20
RANKS = 2


def region(size: int) -> mmap.mmap:
    """Return touched, page-aligned memory."""
    memory = mmap.mmap(-1, size)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, size)
    return memory


def _together(work: Callable[[int], None]) -> float:
    """Run `work(rank)` for both ranks at once; return the seconds until the last is done."""
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    begin_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - begin_s


def memcpy_s(source: mmap.mmap, target: mmap.mmap) -> float:
    """Copy one rank's bytes into prepared memory, both ranks at once, in pieces of the size of a tensor."""
    size = len(source)
    base_from = ctypes.addressof(ctypes.c_char.from_buffer(source))
    base_to = ctypes.addressof(ctypes.c_char.from_buffer(target))
    half = size // RANKS
    piece = max(4096, half // 75)

    def work(rank: int) -> None:
        for at in range(rank * half, (rank + 1) * half, piece):
            ctypes.memmove(base_to + at, base_from + at, min(piece, (rank + 1) * half - at))

    return _together(work) * RANKS  # each thread has copied only half a rank's bytes


def write_s(source: mmap.mmap, folder: Path) -> float:
    """Write both ranks' bytes to new files with O_DIRECT and fsync."""
    view = memoryview(source)

    def work(rank: int) -> None:
        path = folder / f"limit{rank}"
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for at in range(0, len(view), BLOCK_BYTES):
            os.pwrite(file, view[at : at + BLOCK_BYTES], at)
        os.fsync(file)
        os.close(file)

    return _together(work)


def read_s(size: int, folder: Path) -> float:
    """Read both ranks' files back with O_DIRECT."""

    def work(rank: int) -> None:
        buffer = mmap.mmap(-1, BLOCK_BYTES)
        file = os.open(folder / f"limit{rank}", os.O_RDONLY | os.O_DIRECT)
        for at in range(0, size, BLOCK_BYTES):
            os.preadv(file, [buffer], at)
        os.close(file)

    return _together(work)


def digest_s(source: mmap.mmap) -> float:
    """Digest both ranks' bytes, a thread each."""
    return _together(lambda _: xxhash.xxh3_128_intdigest(source) and None)


def measure(size: int, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each limit for `size` bytes a rank and both ranks at once."""
    source, target = region(size), region(size)
    found: dict[str, list[float]] = {"memcpy": [], "O_DIRECT write": [], "O_DIRECT read": [], "digest": []}
    for number in range(repeats + 1):
        once = {
            "memcpy": memcpy_s(source, target),
            "O_DIRECT write": write_s(source, folder),
            "O_DIRECT read": read_s(size, folder),
            "digest": digest_s(source),
        }
        if number:  # the first is the warm-up
            for name, seconds in once.items():
                found[name].append(seconds)
    for rank in range(RANKS):
        (folder / f"limit{rank}").unlink()
    return found
