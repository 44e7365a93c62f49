"""Memory and files for the tests of storage."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

from ckptd.storage.addresses import address_of


def aligned(size: int, filling: bytes = b"d") -> memoryview:
    """Memory that begins on a page, as slots do."""
    view = memoryview(mmap.mmap(-1, size))
    view[:] = filling * size
    return view


def pattern(size: int) -> memoryview:
    """Page-aligned memory in which no two blocks are alike."""
    view = aligned(-(-size // 4096) * 4096)
    for number in range(len(view) // 4096):
        view[number * 4096 : number * 4096 + 8] = number.to_bytes(8, "little")
    return view[:size]


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, whatever its name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


class Target:
    """Memory of its own, at any alignment, with untouched bytes around it."""

    def __init__(self, size: int, shift: int = 0) -> None:
        self._size = size
        self._shift = 4096 + shift
        self._map = mmap.mmap(-1, self._shift + size + 4096)
        self._view = memoryview(self._map)
        self.address = address_of(self._view) + self._shift

    def check(self, wanted: bytes) -> None:
        """The wanted bytes are there, and nothing around them was written."""
        assert self._view[self._shift : self._shift + self._size] == wanted
        assert not any(self._view[: self._shift])
        assert not any(self._view[self._shift + self._size :])


class Collector:
    """A function that is given bytes, from several threads, and checks that each comes once."""

    def __init__(self, begin: int, end: int) -> None:
        self._begin = begin
        self._found = bytearray(end - begin)
        self._seen = bytearray(end - begin)
        self._lock = threading.Lock()

    def __call__(self, offset: int, data: memoryview) -> None:
        at = offset - self._begin
        with self._lock:
            assert len(data) > 0
            assert at >= 0 and at + len(data) <= len(self._found)
            assert not any(self._seen[at : at + len(data)])
            self._seen[at : at + len(data)] = b"\1" * len(data)
            self._found[at : at + len(data)] = data

    def check(self, wanted: bytes) -> None:
        """All came."""
        assert all(self._seen)
        assert self._found == wanted
