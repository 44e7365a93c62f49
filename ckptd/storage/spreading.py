"""Which disk takes the next shard: all of them should write at once, and later be read at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

_AVOIDED_S = 60.0
"""A disk that has failed a put is tried last for so long, since failing may take it half a minute."""
_FOLDERS = 8
_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of a disk when a shard is put."""

    has_room: bool
    is_avoided: bool
    """Whether it has failed lately."""
    in_flight_bytes: int
    """Of puts that have not returned."""
    folder_bytes: int
    """Of the same checkpoint, put or in flight."""


def choose(loads: Mapping[int, Load], turn: int) -> int:
    """Return which of some disks takes a shard.

    One that should be able to; of those the one that has the least to write now, then the one that has the least of
    that checkpoint. `turn` decides between equals, so that checkpoints of one shard go round.
    """

    def rank(at: int) -> tuple[bool, bool, int, int, int]:
        load = loads[at]
        return (
            not load.has_room,
            load.is_avoided,
            load.in_flight_bytes,
            load.folder_bytes,
            (at - turn) % (max(loads) + 1),
        )

    return min(loads, key=rank)


class Spread:
    """What a tier of several disks remembers of them. Any thread may call."""

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._busy: set[str] = set()
        self._in_flight = [0] * count
        self._failed_at_s: list[float | None] = [None] * count
        self._passed_over: set[int] = set()
        self._folders: dict[str, list[int]] = {}
        """Of the last checkpoints, how many bytes each disk has taken."""
        self._places: dict[str, int] = {}
        """Where keys were put or found last. It may be wrong, so it only says where to look first."""
        self._turn = 0

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Keep puts of one key apart, which could else end on two disks."""
        with self._changed:
            self._changed.wait_for(lambda: key not in self._busy)
            self._busy.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._busy.remove(key)
                self._changed.notify_all()

    @contextmanager
    def writing(self, key: str, size_bytes: int, free_bytes: Mapping[int, int]) -> Iterator[int]:
        """Choose one of the disks in `free_bytes` for a shard, and count the put while it lasts and when it is over."""
        with self._changed:
            at = self._choose(key, size_bytes, free_bytes)
            mine = self._folder(key)
            mine[at] += size_bytes
            self._in_flight[at] += size_bytes
            self._turn += 1
        is_put = False
        try:
            yield at
            is_put = True
        finally:
            with self._changed:
                self._in_flight[at] -= size_bytes
                if is_put:
                    self._note(key, at)
                    self._passed_over.discard(at)
                else:
                    mine[at] -= size_bytes

    def _choose(self, key: str, size_bytes: int, free_bytes: Mapping[int, int]) -> int:
        now_s, mine = time.monotonic(), self._folder(key)
        loads = {}
        for at, free in free_bytes.items():
            failed_at_s = self._failed_at_s[at]
            is_avoided = failed_at_s is not None and now_s < failed_at_s + _AVOIDED_S
            loads[at] = Load(free >= size_bytes, is_avoided, self._in_flight[at], mine[at])
        return choose(loads, self._turn)

    def failed(self, at: int) -> None:
        """Note that a disk has failed a put."""
        with self._changed:
            self._failed_at_s[at] = time.monotonic()

    def passed_over(self, at: int) -> bool:
        """Note that another disk took what this one could not; return whether it has taken something since the last."""
        with self._changed:
            is_news = at not in self._passed_over
            self._passed_over.add(at)
            return is_news

    def found(self, key: str, at: int) -> None:
        """Note where a key was found."""
        with self._changed:
            self._note(key, at)

    def gone(self, key: str) -> None:
        """Forget a key."""
        with self._changed:
            self._places.pop(key, None)

    def look_order(self, key: str) -> list[int]:
        """Return the disks in the order in which to look for a key."""
        with self._changed:
            first = self._places.get(key, 0)
        return [first, *(at for at in range(len(self._in_flight)) if at != first)]

    def _folder(self, key: str) -> list[int]:
        folder = key.rpartition("/")[0]
        mine = self._folders.setdefault(folder, [0] * len(self._in_flight))
        if len(self._folders) > _FOLDERS:
            del self._folders[next(iter(self._folders))]
        return mine

    def _note(self, key: str, at: int) -> None:
        self._places.pop(key, None)  # the newest last
        self._places[key] = at
        if len(self._places) > _KEYS:
            del self._places[next(iter(self._places))]
