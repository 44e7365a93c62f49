"""A whole checkpoint put together in one temporary file that is mapped: for formats written by other libraries.

They want all tensors at once. Mapped from a file those take no memory that the kernel could not reclaim, and each is
checked before it is there. The file has no name any more when it can be used, so nothing can be left behind.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ckptd.errors import DamagedError
from ckptd.storage.boxes import Shape
from ckptd.storage.export import Source
from ckptd.storage.image import VALUES_NAME, read_values
from ckptd.storage.manifest import JOB, Manifest
from ckptd.storage.selection import own_chunk
from ckptd.storage.wholes import Whole, moves, put_together
from ckptd.types import TensorSpan

_ALIGNMENT = 64


class Elements(NamedTuple):
    """The elements of a tensor, in row-major order."""

    dtype: str
    shape: Shape
    digest: str | None
    """None for one that was put together of several parts."""
    data: memoryview
    """Memory that nobody else has; it stays as long as anybody refers to it."""


Place = tuple[int, Whole]
"""Where a tensor begins in the file, and what it is."""


class Assembled:
    """The tensors and values of a checkpoint as its ranks had them."""

    def __init__(self, loaded: Manifest, memory: memoryview, places: Mapping[tuple[str, int | None], Place]) -> None:
        self.manifest = loaded
        self._memory = memory
        self._places = places

    def tensor(self, name: str, rank: int) -> Elements:
        """Return a tensor as a rank had it; raises `DamagedError` when the checkpoint has none of that name."""
        stored = self.manifest.tensors.get(name)
        if stored is None:
            raise DamagedError(f"tensor {name!r} is missing from a checkpoint whose values name it")
        owner = None if stored.placement == JOB else own_chunk(stored, rank, self.manifest.world_size).shard
        begin, whole = self._places[name, owner]
        digest = whole.chunks[0].digest if len(whole.chunks) == 1 else None
        return Elements(whole.dtype, whole.shape, digest, self._memory[begin : begin + whole.size_bytes])

    def values(self, rank: int) -> bytes:
        """Return everything that a rank had and that is no tensor, as its framework wrote it."""
        data = self.tensor(VALUES_NAME, rank).data
        return read_values(data, TensorSpan(VALUES_NAME, "U8", (len(data),), 0, len(data)))


def assemble(source: Source, folder: Path) -> Assembled:
    """Put a checkpoint together in a file below `folder`, which needs as much room as the state has bytes.

    Raises what reading it raises, and `OSError` when the file can't be written.
    """
    places, size_bytes = _places(source.manifest)
    path = folder / f".assembled-{os.urandom(8).hex()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        distinct = dict(places.values())
        put_together(source.tier, source.job, (m for at, whole in distinct.items() for m in moves(whole, path, at)))
        # Shared with the file: of private memory the kernel grants no more than the machine has.
        memory = memoryview(mmap.mmap(descriptor, size_bytes))
    finally:
        os.close(descriptor)
        path.unlink()
    return Assembled(source.manifest, memory, places)


def _places(loaded: Manifest) -> tuple[dict[tuple[str, int | None], Place], int]:
    """Return where everything goes, and how large that is; what ranks have alike goes to one place."""
    places: dict[tuple[str, int | None], Place] = {}
    at = 0
    for name, stored in loaded.tensors.items():
        alike: dict[tuple[str, Shape, str | None], Place] = {}
        of_job = stored.placement == JOB
        for chunk in stored.chunks[:1] if of_job else stored.chunks:
            if of_job:
                whole = Whole(name, chunk.dtype, stored.shape or (), stored.chunks)
            else:
                whole = Whole(name, chunk.dtype, chunk.shape, (chunk,), chunk.shard)
            look = (chunk.dtype, chunk.shape, chunk.digest)
            if look not in alike:
                # No two begin at one place, also when one is empty: the place is what tells them apart.
                alike[look] = at, whole
                at += max(-(-whole.size_bytes // _ALIGNMENT), 1) * _ALIGNMENT
            places[name, whole.rank] = alike[look]
    return places, max(at, 1)
