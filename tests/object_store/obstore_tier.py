"""What the tests of the tier over obstore share: a stream that costs no memory, and a way to open the tier."""

from __future__ import annotations

from ckptd.errors import DamagedError
from ckptd_plugins.storage_obstore import open_obstore
from ckptd_plugins.storage_obstore.tier import ObstoreTier
from ckptd_plugins.storage_s3.options import Place

MIB = 2**20
PART = 5 * MIB
"""The smallest part that S3 takes, so that little data makes many."""


class Drawn:
    """A stream of bytes that are made when they are read; it counts, and fails where it is told to."""

    def __init__(self, size_bytes: int, fails_at: int | None = None) -> None:
        self.size_bytes = size_bytes
        self.fails_at = fails_at
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` with what depends on where it is."""
        self.reads.append((offset, len(into)))
        if self.fails_at is not None and offset + len(into) > self.fails_at:
            raise DamagedError("weight of rank-0 is damaged")
        for at in range(0, len(into), MIB):  # several threads read at once, and what that takes is not the tier's
            into[at : at + MIB] = drawn(offset + at, len(into[at : at + MIB]))


def drawn(offset: int, size: int) -> bytes:
    """Return the bytes of `Drawn`."""
    first = offset // MIB
    blocks = b"".join(number.to_bytes(8, "little") * (MIB // 8) for number in range(first, (offset + size) // MIB + 1))
    return blocks[offset - first * MIB : offset - first * MIB + size]


def opened(place: Place | str, **options: object) -> ObstoreTier:
    """Open a tier there."""
    tier = open_obstore(place if isinstance(place, str) else place.url, options)
    assert isinstance(tier, ObstoreTier)
    return tier
