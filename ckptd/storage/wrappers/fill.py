"""A tier that can be told to be full for a while, as a disk is: for `ckptctl chaos`, which must fill no real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ckptd.errors import FullError, NotFoundError
from ckptd.storage.stream import stream_of
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.storage.wrappers.forwarding import ForwardingTier


class FillableTier(ForwardingTier):
    """Does what the tier within does until `fill` is called.

    While it is full there is room only for what is deleted meanwhile, byte for byte: so old checkpoints can make room
    for new ones, as on a real disk. What lies there already can be read throughout.
    """

    def __init__(self, tier: Tier, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(tier)
        self._clock = clock
        self._lock = threading.Lock()
        self._full_until_s = 0.0
        self._room_bytes = 0

    def fill(self, for_s: float) -> None:
        """Be full from now on, for `for_s` seconds."""
        with self._lock:
            self._full_until_s = self._clock() + for_s
            self._room_bytes = 0

    @property
    def full(self) -> bool:
        """Whether nothing more than what is deleted finds room just now."""
        return self._clock() < self._full_until_s

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`; raises `FullError` while there is no room for it."""
        if self.full:
            self._take(key, stream_of(data).size_bytes)
        super().put(key, data, create_only=create_only, pace=pace)

    def delete(self, key: str) -> None:
        """Remove an object, which makes room."""
        freed_bytes = 0
        if self.full:
            try:
                freed_bytes = self.size_bytes(key)
            except NotFoundError:
                freed_bytes = 0
        super().delete(key)
        with self._lock:
            self._room_bytes += freed_bytes

    def check_writable(self) -> None:
        """Raise `StoreError` unless an object could be put now."""
        super().check_writable()
        if self.full:
            self._take("anything", 1)

    def _take(self, key: str, size_bytes: int) -> None:
        with self._lock:
            if size_bytes > self._room_bytes:
                raise FullError(
                    f"{self.url} has no room for {key}: `ckptctl chaos` lets it be full",
                    hint="it passes by itself; nothing on the disk was really filled",
                )
            self._room_bytes -= size_bytes
