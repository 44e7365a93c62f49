"""Reading what a checkpoint holds in bounded memory: ranges of objects, one leaf at a time, each checked."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from ckptd.errors import DamagedError
from ckptd.storage.digest import LEAF_BYTES, digest
from ckptd.storage.image import BLOCK_BYTES
from ckptd.storage.manifest import Chunk
from ckptd.storage.tier import Tier

_WINDOW_BYTES = 4 * LEAF_BYTES


class RangeReader:
    """Reads ranges of one object through a window of fixed size; in rising order, every byte is read once.

    A tensor begins where its element may lie, not where a block does. The window does, so that a tier can read it
    past the page cache.
    """

    def __init__(self, tier: Tier, key: str) -> None:
        self._tier = tier
        self._key = key
        self._size_bytes = tier.size_bytes(key)
        self._window = memoryview(mmap.mmap(-1, _WINDOW_BYTES))
        self._begin = self._end = 0

    @property
    def size_bytes(self) -> int:
        """The object's size."""
        return self._size_bytes

    def read(self, begin: int, end: int) -> memoryview:
        """Return a range of at most a leaf, valid until the next call; raises `DamagedError` beyond the end."""
        if end > self._size_bytes:
            raise DamagedError(f"{self._tier.url}/{self._key} ends at byte {self._size_bytes}, {end} were wanted")
        if begin < self._begin or end > self._end:
            self._move(begin)
        return self._window[begin - self._begin : end - self._begin]

    def _move(self, begin: int) -> None:
        begin -= begin % BLOCK_BYTES
        kept = self._end - begin if self._begin <= begin < self._end and self._end % BLOCK_BYTES == 0 else 0
        if kept:
            at = begin - self._begin
            self._window[:kept] = self._window[at : at + kept]
        # Whole blocks, but for an object that does not end with one.
        end = min(begin + _WINDOW_BYTES, self._size_bytes)
        self._begin = self._end = begin  # nothing is valid when the tier fails
        self._tier.read_into(self._key, begin + kept, self._window[kept : end - begin])
        self._end = end


def leaves(chunk: Chunk) -> Iterator[tuple[int, int, str | None]]:
    """Yield where each leaf of a chunk begins and ends in its file, and its digest."""
    if not chunk.leaves:
        yield chunk.begin, chunk.end, chunk.digest
        return
    for number, leaf in enumerate(chunk.leaves):
        begin = chunk.begin + number * LEAF_BYTES
        yield begin, min(begin + LEAF_BYTES, chunk.end), leaf


def read_checked(reader: RangeReader, chunk: Chunk, tensor: str) -> Iterator[memoryview]:
    """Yield a chunk's bytes leaf by leaf, each valid until the next; raises `DamagedError` that names the tensor."""
    for begin, end, wanted in leaves(chunk):
        data = reader.read(begin, end)
        if digest(data) != wanted:
            raise DamagedError(
                f"{chunk.file}: tensor {tensor!r} is not what was committed (its digest differs)",
                hint="`ckptctl verify` names everything that is damaged; another step may be intact",
            )
        yield data
