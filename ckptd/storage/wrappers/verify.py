"""A tier that looks again: what was put is there, and what was read is whole.

What it can find cheaply, and what not:

- An object of up to 1 MiB (every manifest, claim and tag) is read back and compared whole.
- Of a larger one the size is compared, and three blocks, at its beginning, middle and end. That finds an object which
  is short, someone else's, shifted, or has holes at its ends; it does not find a flipped bit. Reading everything back
  would double the traffic, and a digest made while sending would have nothing to be compared with but that. Flipped
  bits on the way are the other side's to find (`server_checksum`), those at rest are found by the manifest's digests
  at every fetch, and by `ckptctl verify`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from ckptd.errors import CkptdError, DamagedError, NotFoundError, StoreError
from ckptd.storage.stream import Stream, piece, stream_of
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.storage.wrappers.forwarding import ForwardingTier

Result = TypeVar("Result")

WHOLE_BYTES = 2**20
"""An object of this size or less is read back whole."""
_SAMPLE_BYTES = 64 * 2**10
_LOOKS = 5
_MARKS = (b"\xa5", b"\x5a")


class VerifyingTier(ForwardingTier):
    """Checks puts afterwards and reads while they happen, at a small cost: see the head of the module.

    A put that came out wrong is removed again, since whoever copies takes an object of the right name for a good one,
    and raised as a transient `StoreError`: sending it again is what helps. A read that is short is a `DamagedError`,
    even where the tier within says nothing; without `reads` that is left to a tier which knows how long its answers
    have to be.
    """

    def __init__(self, tier: Tier, *, reads: bool = True) -> None:
        super().__init__(tier)
        self._reads = reads

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`, and look whether it is there."""
        stream = stream_of(data)
        super().put(key, stream, create_only=create_only, pace=pace)
        problem = self._problem(key, stream)
        if problem is None:
            return
        # Where no byte can change on its way, what a create-only put finds is somebody else's, and ours was lost.
        if not (create_only and self.capabilities.server_checksum):
            try:
                self._inner.delete(key)
            except CkptdError as error:
                problem += f", and it can't be removed: {error.message}"
        raise StoreError(f"{self.url}: {key} was put and {problem}", hint="if it happens again, distrust that store")

    def _problem(self, key: str, data: Stream) -> str | None:
        """Say what is wrong with an object that was just put."""
        size_bytes = data.size_bytes
        try:
            found_bytes = self._inner.size_bytes(key)
            if found_bytes != size_bytes:
                return f"has {found_bytes} bytes instead of {size_bytes}"
            for begin, end in _samples(size_bytes, self.capabilities.range_read):
                found = memoryview(bytearray(end - begin))
                self._inner.read_into(key, begin, found)
                if found != piece(data, begin, end):
                    return f"has other bytes than were sent between {begin} and {end}"
        except NotFoundError:
            return "is not there"
        except DamagedError as error:
            return f"can't be read back: {error.message}"
        return None

    def get(self, key: str) -> bytes:
        """Return a small object whole, and no less of it."""
        if not self._reads:
            return super().get(key)
        return self._whole(key, lambda: self._inner.get(key), len)

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into`, and notice when its end was not filled.

        A mark lies on its last byte before: only what was read can have removed it. A byte that happens to be the mark
        is told from one that was not filled by another mark, which one read of 256 is made a second time for.
        """
        if not self._reads:
            super().read_into(key, offset, into)
            return
        for mark in _MARKS:
            into[-1:] = mark[: len(into)]
            super().read_into(key, offset, into)
            if into[-1:] != mark:
                return
        raise DamagedError(f"{self.url}: {key} was read from byte {offset}, and not all {len(into)} bytes were filled")

    def open(self, key: str) -> int:
        """Return a descriptor of the whole object; a file that is lent is the object, whatever its size."""
        if self.capabilities.lends_files or not self._reads:
            return super().open(key)
        return self._whole(key, lambda: self._inner.open(key), _descriptor_bytes, os.close)

    def _whole(
        self,
        key: str,
        read: Callable[[], Result],
        measure: Callable[[Result], int],
        discard: Callable[[Result], None] = lambda _: None,
    ) -> Result:
        """Read an object of the size that the tier says it has; one that is being replaced is looked at again."""
        found_bytes = size_bytes = 0
        for _ in range(_LOOKS):
            found = read()
            found_bytes = measure(found)
            try:
                size_bytes = self._inner.size_bytes(key)
            except NotFoundError:
                return found  # deleted since, which is no reason to doubt what was read
            except CkptdError:
                discard(found)
                raise
            if found_bytes == size_bytes:
                return found
            discard(found)
        raise DamagedError(f"{self.url}: {key} has {size_bytes} bytes, and {found_bytes} were read")


def _samples(size_bytes: int, range_read: bool) -> list[tuple[int, int]]:
    """Return the ranges that are compared after a put; without range reads a large object is not read for them."""
    if size_bytes <= WHOLE_BYTES:
        return [(0, size_bytes)] if size_bytes else []
    if not range_read:
        return []
    middle = size_bytes // 2
    last = size_bytes - _SAMPLE_BYTES
    return [(begin, begin + _SAMPLE_BYTES) for begin in (0, middle, last)]


def _descriptor_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_size
