"""A tier in the memory of one process: for tests, simulations and plugin authors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from ckptd.errors import DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage.stream import piece, stream_of
from ckptd.storage.tier import Capabilities, Cost, Data, Entry, FailureGroup, Pace


class MemoryTier:
    """Keeps objects in a dict. Everything is lost with the process, which its capabilities say."""

    name = "memory"
    url = "memory://"
    capabilities = Capabilities(
        create_only_put=True,
        atomic_replace=True,
        range_read=True,
        multipart=False,
        server_checksum=False,
        consistent_list=True,
        exclusive_hold=True,
        lends_files=False,
        cost=Cost.MEMORY,
        failure_group=FailureGroup.PROCESS,
    )

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep a copy of `data`."""
        stream = stream_of(data)
        if pace is not None:
            pace(stream.size_bytes)
        kept = (bytes(piece(stream, 0, stream.size_bytes)), time.time())
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

    def open(self, key: str) -> int:
        """Return a memory file with a copy of the object."""
        data = self.get(key)
        writable = os.memfd_create("ckptd-object", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(writable), "wb") as file:
                file.write(data)
            return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"can't open {key} in memory: {error.strerror}") from error
        finally:
            os.close(writable)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects under `prefix`."""
        for key, (data, modified_at) in list(self.objects.items()):
            if key.startswith(prefix):
                yield Entry(key, len(data), modified_at)

    def delete(self, key: str) -> None:
        """Forget the object."""
        self.objects.pop(key, None)

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """Find nothing: a put is over at once."""
        del prefix, older_than_s
        return ()

    def hold(self, job: str, deadline_s: float) -> None:
        """Do nothing: no other process can reach it."""
        del job, deadline_s

    def close(self) -> None:
        """Keep everything: objects are gone with the tier."""

    def check_writable(self) -> None:
        """Do nothing: memory takes what fits."""
