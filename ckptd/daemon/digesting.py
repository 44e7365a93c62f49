"""Digests of what lies in slots, shared out among threads: a large tensor by its leaves, small ones in batches."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from ckptd.storage.digest import LEAF_BYTES, combine, digests
from ckptd.storage.reuse import Entry
from ckptd.storage.shards import Leaves

_BATCH_BYTES = 2 * LEAF_BYTES
_BATCH_LEAVES = 1024


class Digests(NamedTuple):
    """The digests of some entries."""

    values: dict[Entry, str]
    leaves: dict[Entry, Sequence[str]]
    """Of those entries that have several."""

    def __or__(self, others: Digests) -> Digests:
        return Digests(self.values | others.values, self.leaves | others.leaves)


@dataclass(frozen=True, slots=True)
class _Batch:
    image: memoryview
    parts: Sequence[slice]
    digests: list[str] = field(default_factory=list)


class Digesting:
    """The digests of some entries, under way in up to `threads` threads of a pool."""

    def __init__(
        self, images: Mapping[int, memoryview], leaves: Mapping[int, Leaves], pool: Executor, threads: int
    ) -> None:
        self._leaves = leaves
        self._batches = {
            rank: [_Batch(images[rank], parts) for parts in _batches(of_rank.parts)] for rank, of_rank in leaves.items()
        }
        self._waiting = deque(chain.from_iterable(self._batches.values()))
        self.futures: list[Future[None]] = [pool.submit(self._work) for _ in range(min(threads, len(self._waiting)))]

    def _work(self) -> None:
        while True:
            try:
                batch = self._waiting.popleft()
            except IndexError:
                return
            batch.digests.extend(digests(batch.image, batch.parts))

    def found(self) -> Digests:
        """Return the digests; raises what went wrong. The futures have to be done."""
        for item in self.futures:
            item.result()
        found = Digests({}, {})
        for rank, (entries, _, several) in self._leaves.items():
            leaves = list(chain.from_iterable(batch.digests for batch in self._batches[rank]))
            values = dict(zip(entries, leaves, strict=True))
            at = 0
            for entry in filter(values.__contains__, several):
                at = entries.index(entry, at)
                found.leaves[entry] = leaves[at : at + several[entry]]
                values[entry] = combine(found.leaves[entry])
            found.values.update(values)
        return found


def _batches(parts: Sequence[slice]) -> Iterator[Sequence[slice]]:
    """Share out the leaves of an image, in the order in which they lie there."""
    at = 0
    while at < len(parts):
        most = min(at + _BATCH_LEAVES, len(parts))
        end = bisect_right(parts, parts[at].start + _BATCH_BYTES, at, most, key=attrgetter("stop"))
        yield parts[at:end]
        at = end
