"""A disk with a volatile write cache: what it has not been told to flush, a power cut may take, whole or in part.

A drive answers a write as soon as it has the bytes, and puts them down later, in any order. What it promises is that
everything it has answered before a flush is durable once that returns, and a write with FUA as soon as that returns.
So after a power cut every block holds one of: what was durable, or what any later write put there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass
from typing import Any

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
"""What is put down whole or not at all, as drives of the last decade do. ext4 counts on it: a block of its journal of
which some sectors are old is corruption to it, and no interrupted commit, so that it refuses to mount."""
_KEEPS = (0.0, 0.0, 0.2, 0.5, 0.9, 1.0)
_TEARS = (0.0, 0.3, 1.0)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a power cut did to the writes that were in the cache."""

    kept: int
    torn: int
    lost: int

    @property
    def writes(self) -> int:
        """How many there were."""
        return self.kept + self.torn + self.lost


@dataclass(frozen=True, slots=True)
class _Write:
    offset: int
    data: bytes
    fua: bool

    def units(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of `data` that are written whole or not at all."""
        at, size = 0, len(self.data)
        while at < size:
            end = min(size, at + BLOCK_BYTES - (self.offset + at) % BLOCK_BYTES)
            yield at, end
            at = end


class Disk:
    """A disk over two buffers of one size: `durable` outlives a power cut, `seen` is what reads return meanwhile."""

    def __init__(self, durable: MutableSequence[int] | Any, seen: MutableSequence[int] | Any) -> None:
        self._durable = durable
        self._seen = seen
        self._seen[:] = self._durable[:]
        self._cache: list[_Write] = []
        self._flushed = 0

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return len(self._durable)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return what was written last."""
        return bytes(self._seen[offset : offset + size_bytes])

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Take whole sectors into the cache; with `fua` they are durable when this returns."""
        if offset % SECTOR_BYTES or len(data) % SECTOR_BYTES or not 0 <= offset <= self.size_bytes - len(data):
            raise ValueError(f"{len(data)} bytes at {offset} are no sectors of a disk of {self.size_bytes} bytes")
        self._seen[offset : offset + len(data)] = data
        self._cache.append(_Write(offset, data, fua))

    @property
    def taken(self) -> int:
        """How many writes it has taken since it was made."""
        return self._flushed + len(self._cache)

    def flush(self, taken: int) -> None:
        """Make the first so many writes durable: what comes while a flush is under way is not covered by it."""
        covered = max(taken - self._flushed, 0)
        for write in self._cache[:covered]:
            self._durable[write.offset : write.offset + len(write.data)] = write.data
        del self._cache[:covered]
        self._flushed += covered

    def cut(self, rng: random.Random) -> Cut:
        """Lose power: of each write in the cache all blocks, some or none become durable, in an order that may be any.

        How much is lost differs from cut to cut, from nothing to everything.
        """
        keep, tear = rng.choice(_KEEPS), rng.choice(_TEARS)
        kept = torn = lost = 0
        for write in self._cache:
            units = list(write.units())
            if write.fua:
                survivors = units  # nothing older can come back: what follows it here is newer
            elif len(units) > 1 and rng.random() < tear:
                survivors = _torn(units, rng)
            else:
                survivors = units if rng.random() < keep else []
            for begin, end in survivors:
                self._durable[write.offset + begin : write.offset + end] = write.data[begin:end]
            kept += survivors == units
            lost += not survivors
            torn += 0 < len(survivors) < len(units)
        for write in self._cache:
            end = write.offset + len(write.data)
            self._seen[write.offset : end] = self._durable[write.offset : end]
        self._flushed += len(self._cache)
        self._cache.clear()
        return Cut(kept, torn, lost)


def _torn(units: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int]]:
    """Return what was put down of one write: its beginning, its end, or anything."""
    at = rng.randrange(1, len(units))
    return rng.choice((units[:at], units[at:], [unit for unit in units if rng.random() < 0.5]))
