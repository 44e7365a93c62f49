"""What the job of the crash matrix trains: bytes that follow from rank and step alone, so any step can be told right.

Rank 0 has more than 1 MiB that changes with every step (written past the page cache, over spares) and as much again
that never does (written once, then referred to); rank 1 is small and buffered.
"""

from __future__ import annotations

import hashlib
import threading

import xxhash

WORLD_SIZE = 2
_SIZES = {0: (1_300_000, 900_000), 1: (40_000, 20_000)}
_TABLE = bytes((value * 167 + 13) % 256 for value in range(256))
State = dict[str, bytearray]


def fresh(rank: int) -> State:
    """Return a rank's state before its first step."""
    moving, frozen = _SIZES[rank]
    return {
        "moving": bytearray((bytes(range(256)) * (moving // 256 + 1))[:moving]),
        "frozen": bytearray((bytes(range(255, -1, -1)) * (frozen // 256 + 1))[:frozen]),
        "chain": bytearray(hashlib.sha256(str(rank).encode()).digest()),
    }


def advance(state: State, step: int) -> None:
    """Do one step; whoever begins with another state than that of the step before never comes right again."""
    moving, chain = state["moving"], state["chain"]
    chain[:] = hashlib.sha256(chain + step.to_bytes(8, "little")).digest()
    moving[:] = moving.translate(_TABLE)
    moving[int.from_bytes(chain[:4], "little") % len(moving)] ^= chain[4]


def digests(state: State) -> dict[str, str]:
    """Return the xxh3-128 of every tensor; none of them is so long that a manifest would have leaves of it."""
    return {name: xxhash.xxh3_128_hexdigest(data) for name, data in state.items()}


class _Past:
    """The digests of a rank after every step so far, continued when more are asked for."""

    def __init__(self, rank: int) -> None:
        self._lock = threading.Lock()
        self._state = fresh(rank)
        self._digests = [digests(self._state)]

    def at(self, step: int) -> dict[str, str]:
        with self._lock:
            while len(self._digests) <= step:
                advance(self._state, len(self._digests))
                self._digests.append(digests(self._state))
            return self._digests[step]


_PASTS = {rank: _Past(rank) for rank in range(WORLD_SIZE)}


def expected(rank: int, step: int) -> dict[str, str]:
    """Return the digests of what a rank has to have after `step`."""
    return _PASTS[rank].at(step)
