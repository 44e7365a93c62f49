"""A tier with bounds: how many calls at once, and how many bytes per second."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ckptd.errors import invariant
from ckptd.storage.pacing import Pacer
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.storage.wrappers.forwarding import ForwardingTier

Result = TypeVar("Result")


class LimitedTier(ForwardingTier):
    """Bounds calls and bytes, for puts and for everything else separately.

    So a restore never waits for the uploads beside it, and two tiers that are copied to each other can't come to a
    halt: a put waits for reads of another tier, reads wait for no put.

    Of `concurrency` puts and as many other calls at once, those above wait their turn. `bytes_per_s` bounds what is
    put and, by itself, what is read; what a descriptor from `open` is read for passes by where the tier lends its
    files.
    """

    def __init__(
        self,
        tier: Tier,
        concurrency: int,
        bytes_per_s: float | None = None,
        *,
        pacer: Callable[[float], Pace] = Pacer,
    ) -> None:
        super().__init__(tier)
        invariant(concurrency >= 1, "a tier that may do nothing at all would wait for ever")
        self._putting = _Places(concurrency)
        self._others = _Places(concurrency)
        self._put_pace = None if bytes_per_s is None else pacer(bytes_per_s)
        self._read_pace = None if bytes_per_s is None else pacer(bytes_per_s)

    def _call(self, operation: str, key: str, act: Callable[[], Result]) -> Result:
        del key
        places = self._putting if operation == "put" else self._others
        places.take()
        try:
            return act()
        finally:
            places.give()

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`, asking the caller's pace and then the tier's before each piece."""
        super().put(key, data, create_only=create_only, pace=_both(pace, self._put_pace))

    def get(self, key: str) -> bytes:
        """Return a small object whole; how small it was is known afterwards, so those that follow pay for it."""
        data = super().get(key)
        self._book_read(len(data))
        return data

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into`, once its bytes may be moved; nobody's turn is taken by the wait."""
        self._book_read(len(into))
        super().read_into(key, offset, into)

    def open(self, key: str) -> int:
        """Return a descriptor; where a copy was brought for it, those that follow pay."""
        descriptor = super().open(key)
        if not self.capabilities.lends_files:
            self._book_read(os.fstat(descriptor).st_size)
        return descriptor

    def _book_read(self, size_bytes: int) -> None:
        if self._read_pace is not None:
            self._read_pace(size_bytes)


class _Places:
    """So many places, given to those who wait in the order in which they came.

    A semaphore would do, but for its unfairness: a thread that gives its place and asks again at once has it before
    anyone wakes up, so that a few busy ones keep all others waiting (one test of the conformance suite took 73 s
    instead of 0.3 s).
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: deque[threading.Lock] = deque()

    def take(self) -> None:
        """Wait for a place."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def give(self) -> None:
        """Give a place to whoever has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


def _both(first: Pace | None, second: Pace | None) -> Pace | None:
    """Return a pace that asks both; either may be missing."""
    if first is None or second is None:
        return first or second
    paces = (first, second)

    def ask(size_bytes: int) -> None:
        for pace in paces:
            pace(size_bytes)

    return ask
