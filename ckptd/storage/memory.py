"""A tier in the memory of one process: for tests, simulations and plugin authors."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ckptd.errors import DamagedError, FencedError, NotFoundError
from ckptd.storage.tier import Buffer, Capabilities, Entry


class MemoryTier:
    """Keeps objects in a dict. Everything is lost with the process, which its capabilities say."""

    name = "memory"
    url = "memory://"
    capabilities = Capabilities(create_only_put=True, range_read=True, survives_process=False, survives_node=False)

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}

    def put(self, key: str, data: Buffer, *, create_only: bool = False) -> None:
        """Keep a copy of `data`."""
        kept = (bytes(data), time.time())
        if not create_only:
            self.objects[key] = kept
        elif self.objects.setdefault(key, kept) is not kept:  # one step, so that one of many threads wins
            raise FencedError(f"{key} exists already")

    def get(self, key: str) -> bytes:
        """Return the object's bytes."""
        if key not in self.objects:
            raise NotFoundError(f"no object {key} in memory")
        return self.objects[key][0]

    def size_bytes(self, key: str) -> int:
        """Return the object's size."""
        return len(self.get(key))

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Copy a range of the object."""
        part = self.get(key)[offset : offset + len(into)]
        if len(part) < len(into):
            raise DamagedError(f"{key} ends at byte {offset + len(part)}, {offset + len(into)} were wanted")
        into[:] = part

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects under `prefix`."""
        for key, (data, modified_at) in list(self.objects.items()):
            if key.startswith(prefix):
                yield Entry(key, len(data), modified_at)

    def delete(self, key: str) -> None:
        """Forget the object."""
        self.objects.pop(key, None)

    def check_writable(self) -> None:
        """Do nothing: memory takes what fits."""
