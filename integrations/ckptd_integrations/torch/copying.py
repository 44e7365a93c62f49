"""Copying bytes between tensors and an image as fast as memory allows.

A tensor that lies contiguous in main memory is copied by `memmove` on its address: no tensor object is made for the
other side (10,000 small tensors would spend their time there), no view of the image is left behind, and the threads
of OpenMP, which spin while they wait, take no part. Large copies are shared with a few short-lived threads when there
are cores to spare, because one core does not reach the memory's bandwidth.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import compress, pairwise

LARGE_BYTES = 256 * 1024
"""From here on a copy takes long enough to be worth handing to another thread."""
SHARED_BYTES = 32 * 1024 * 1024
"""Below this sum of large copies, starting threads costs more than they give."""
CHUNK_BYTES = 128 * 1024 * 1024
"""Pieces a very large tensor is cut into, still large enough for the C library to write past the cache."""
MAX_THREADS = 4
"""More threads than this gain nothing on the machines we know, and take cores from the ranks beside us."""

_move_small = ctypes.PyDLL(None).memmove
"""A `memmove` that keeps the interpreter: after each of 10,000 small copies that let go of it, another busy thread
would have it for 5 ms."""
_move_small.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_move_small.restype = None


def copy_bytes(destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
    """Copy `sizes[i]` bytes from address `sources[i]` to `destinations[i]`, for all i.

    The caller keeps both sides alive and has checked their sizes: addresses can't be checked here. Other Python
    threads run meanwhile.
    """
    large = [size >= LARGE_BYTES for size in sizes]
    large_bytes = sum(compress(sizes, large))
    threads = copy_threads() if large_bytes >= SHARED_BYTES else 1
    jobs = iter(_cut(compress(destinations, large), compress(sources, large), compress(sizes, large)))
    helpers = _start(threads - 1, jobs)
    try:
        small = [not is_large for is_large in large]
        _drain(map(_move_small, compress(destinations, small), compress(sources, small), compress(sizes, small)))
        _work(jobs)
    finally:
        for helper in helpers:
            helper.join()


def copy_threads() -> int:
    """Return how many threads may copy at once: this rank's share of the cores it may run on."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = len(os.sched_getaffinity(0)) // max(1, int(ranks) if ranks.isdecimal() else 1)
    return max(1, min(MAX_THREADS, share))


def _drain(calls: Iterable[object]) -> None:
    deque(calls, maxlen=0)


def _cut(destinations: Iterable[int], sources: Iterable[int], sizes: Iterable[int]) -> list[tuple[int, int, int]]:
    jobs = []
    for destination, source, size in zip(destinations, sources, sizes, strict=True):
        pieces = max(1, round(size / CHUNK_BYTES))
        edges = [size * piece // pieces for piece in range(pieces + 1)]
        jobs += [(destination + begin, source + begin, end - begin) for begin, end in pairwise(edges)]
    return jobs


def _start(count: int, jobs: Iterable[tuple[int, int, int]]) -> list[threading.Thread]:
    helpers = []
    for _ in range(count):
        helper = threading.Thread(target=_work, args=(jobs,), name="ckptd-copy")
        try:
            helper.start()
        except RuntimeError:
            break  # No more threads may be started here; those that run, and this one, do all the work.
        helpers.append(helper)
    return helpers


def _work(jobs: Iterable[tuple[int, int, int]]) -> None:
    # All threads take from the same list iterator, whose `next` is atomic.
    for destination, source, size in jobs:
        ctypes.memmove(destination, source, size)
