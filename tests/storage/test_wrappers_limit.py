"""The limiting wrapper: bounds on calls and on bytes, and that they can't bring anything to a halt."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.errors import InvariantError, StoreError
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.storage.wrappers import LimitedTier


class _Counting(MemoryTier):
    """A memory tier that is slow, and knows how many calls were in it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = {"put": 0, "other": 0}
        self.most = {"put": 0, "other": 0}
        self._lock = threading.Lock()

    def _within(self, kind: str, work: Callable[[], None]) -> None:
        with self._lock:
            self.now[kind] += 1
            self.most[kind] = max(self.most[kind], self.now[kind])
        time.sleep(0.01)
        work()
        with self._lock:
            self.now[kind] -= 1

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        self._within("put", lambda: MemoryTier.put(self, key, data, create_only=create_only, pace=pace))

    def delete(self, key: str) -> None:
        self._within("other", lambda: MemoryTier.delete(self, key))

    def check_writable(self) -> None:
        self._within("other", lambda: None)


def test_bounds_calls_at_once() -> None:
    """No more than so many puts, and as many other calls, are in the tier at once; all of them end."""
    tier = _Counting()
    limited = LimitedTier(tier, 3)
    with ThreadPoolExecutor(16) as pool:
        for number in range(32):
            pool.submit(limited.put, f"job/{number}", b"x")
            pool.submit(limited.check_writable)
            pool.submit(limited.delete, "job/never")
    assert tier.most == {"put": 3, "other": 3}
    assert len(tier.objects) == 32


def test_a_failed_call_gives_its_place_back() -> None:
    """After errors the tier takes as many calls as before."""

    class Failing(MemoryTier):
        def check_writable(self) -> None:
            raise StoreError("down")

    limited = LimitedTier(Failing(), 1)
    for _ in range(3):
        with pytest.raises(StoreError):
            limited.check_writable()
    limited.put("job/a", b"x")
    assert limited.get("job/a") == b"x"


def test_places_are_given_in_turn() -> None:
    """Threads that call without a break do not keep another one out: it waits for a few calls, not for luck."""
    limited = LimitedTier(_Counting(), 2)
    over = threading.Event()
    calls = [0, 0, 0]

    def hog(number: int) -> None:
        while not over.is_set():
            limited.check_writable()
            calls[number] += 1

    hogs = [threading.Thread(target=hog, args=(number,)) for number in range(3)]
    for thread in hogs:
        thread.start()
    try:
        begun = sum(calls)
        for _ in range(10):
            limited.check_writable()
        others = sum(calls) - begun
    finally:
        over.set()
        for thread in hogs:
            thread.join()
    assert others < 10 * 3 * 2, f"the others had {others} calls during 10 of mine"


class _ObjectOf:
    """A stream that reads an object of a tier, as a copy from tier to tier does."""

    def __init__(self, tier: Tier, key: str, begun: threading.Barrier) -> None:
        self._tier, self._key, self._begun = tier, key, begun
        self.size_bytes = 4

    def read_into(self, offset: int, into: memoryview) -> None:
        self._begun.wait(10)
        self._tier.read_into(self._key, offset, into)


def test_copies_both_ways_at_once_come_to_an_end() -> None:
    """Two tiers that are copied to each other with every place taken do not wait for each other for ever."""
    left, right = LimitedTier(MemoryTier(), 2), LimitedTier(MemoryTier(), 2)
    left.put("job/a", b"left")
    right.put("job/b", b"wing")
    begun = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        for number in range(2):
            pool.submit(right.put, f"job/from-left-{number}", _ObjectOf(left, "job/a", begun))
            pool.submit(left.put, f"job/from-right-{number}", _ObjectOf(right, "job/b", begun))
    assert (right.get("job/from-left-1"), left.get("job/from-right-1")) == (b"left", b"wing")


class _Paces:
    """Paces that only write down what they were asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, bytes_per_s: float) -> Pace:
        assert bytes_per_s == 1000.0
        self.asked.append([])
        return self.asked[-1].append


def test_bounds_bytes_each_way(tmp_path: Path) -> None:
    """Puts ask the caller's pace and the tier's, reads of every kind ask another one, lent files none."""
    paces, own = _Paces(), list[int]()
    limited = LimitedTier(MemoryTier(), 2, 1000.0, pacer=paces)
    limited.put("job/a", b"x" * 100, pace=own.append)
    limited.put("job/b", b"x" * 50)
    assert limited.get("job/a") == b"x" * 100
    limited.read_into("job/a", 10, memoryview(bytearray(30)))
    os.close(limited.open("job/b"))
    assert paces.asked == [[100, 50], [100, 30, 50]]
    assert own == [100]
    lending = _Paces()
    local = LimitedTier(LocalTier(tmp_path), 2, 1000.0, pacer=lending)
    local.put("job/a", b"x" * 10)
    os.close(local.open("job/a"))
    assert lending.asked == [[10], []]


def test_the_bound_holds_by_the_clock() -> None:
    """Several threads together put and read no faster than the rate allows, by a real clock."""
    limited = LimitedTier(MemoryTier(), 4, 1e6)
    begin_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for number in range(6):
            pool.submit(limited.put, f"job/{number}", bytes(100_000))
    took_s = time.monotonic() - begin_s
    assert took_s >= (600_000 - 100_000 - 100_000) / 1e6  # the burst, and the put that overdrew it


def test_bounds_nothing_to_nothing() -> None:
    """A bound of no calls at all is a bug, not a tier that waits for ever."""
    with pytest.raises(InvariantError):
        LimitedTier(MemoryTier(), 0)
