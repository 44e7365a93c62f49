"""What the suite of tiers puts, and how it works from many threads."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ckptd.storage.tier import Tier


def pattern(size: int, *, seed: int) -> bytes:
    """Return bytes in which no two blocks are alike, so that a shifted or repeated block shows."""
    blocks = -(-size // 256)
    filling = bytes(range(240))
    return b"".join(struct.pack("<QQ", seed, number) + filling for number in range(blocks))[:size]


def keys_of(tier: Tier, prefix: str) -> set[str]:
    """Return the keys that a tier lists, each of which it may name only once."""
    found = [entry.key for entry in tier.list(prefix)]
    assert len(found) == len(set(found)), f"the listing of {prefix!r} names a key twice: {sorted(found)}"
    return set(found)


def at_once(count: int, work: Callable[[int], None]) -> list[BaseException | None]:
    """Call `work(number)` in `count` threads that begin together; return what each raised."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, number) for number in range(count)]
    return [future.exception() for future in futures]


def raise_first(errors: Iterable[BaseException | None]) -> None:
    """Raise what `at_once` found, if it found anything."""
    for error in errors:
        if error is not None:
            raise error


@contextmanager
def in_turns() -> Iterator[None]:
    """Let threads take turns as often as they can: between looking and writing another one may look too."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
