"""Bytes that lie somewhere and are read piece by piece: so a large object is put without a copy of it in memory."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

from ckptd.errors import invariant
from ckptd.storage.addresses import address_of


@runtime_checkable
class Stream(Protocol):
    """Bytes of a known length that can be read from anywhere, by any thread, more than once."""

    @property
    def size_bytes(self) -> int:
        """How many bytes there are."""
        ...

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill all of `into` from `offset`; raises a `CkptdError` when the bytes can't be read or are damaged."""
        ...


class Buffers:
    """Buffers end to end, as a stream."""

    def __init__(self, parts: Sequence[bytes | memoryview]) -> None:
        self._parts = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        self._ends = list(accumulate(map(len, self._parts)))
        self._addresses = list(map(address_of, self._parts))

    @property
    def size_bytes(self) -> int:
        """How many bytes there are."""
        return self._ends[-1] if self._ends else 0

    @property
    def parts(self) -> Sequence[memoryview]:
        """The buffers that have any bytes."""
        return self._parts

    def view(self, begin: int, end: int) -> memoryview | None:
        """Return the bytes where they lie, None when more than one buffer holds them."""
        number = bisect_right(self._ends, begin)
        if number == len(self._parts) or end > self._ends[number]:
            return None
        first = self._ends[number] - len(self._parts[number])
        return self._parts[number][begin - first : end - first]

    def read_into(self, offset: int, into: memoryview) -> None:
        """Copy bytes out of the buffers; other threads run meanwhile."""
        invariant(0 <= offset <= offset + len(into) <= self.size_bytes, "more is read than there is")
        number, at, target = bisect_right(self._ends, offset), 0, address_of(into)
        while at < len(into):
            size_bytes = len(self._parts[number])
            skip = offset + at - (self._ends[number] - size_bytes)
            count = min(size_bytes - skip, len(into) - at)
            ctypes.memmove(target + at, self._addresses[number] + skip, count)
            number, at = number + 1, at + count


def stream_of(data: bytes | memoryview | Sequence[bytes | memoryview] | Stream) -> Stream:
    """Return anything that an object may be put from as a stream; buffers as `Buffers`."""
    if isinstance(data, bytes | memoryview):
        return Buffers([data])
    return data if isinstance(data, Stream) else Buffers(data)


def piece(data: Stream, begin: int, end: int) -> memoryview:
    """Return a part of a stream: where it lies if one buffer holds it, else copied."""
    lying = data.view(begin, end) if isinstance(data, Buffers) else None
    if lying is None:
        lying = memoryview(bytearray(end - begin))
        data.read_into(begin, lying)
    return lying
