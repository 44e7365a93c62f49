"""Digests of what lies in slots, shared out among threads: a large tensor by its leaves, small ones in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future

from ckptd.storage.digest import LEAF_BYTES, TensorDigest, digest, of_leaves
from ckptd.storage.reuse import Entry
from ckptd.types import TensorSpan

_BATCH_BYTES = 2 * LEAF_BYTES
_BATCH_LEAVES = 1024

_Leaf = tuple[Entry, int, int, int]
"""An entry, the number of one of its leaves, and where that begins and ends in the image."""


class Digesting:
    """The digests of some entries, under way in up to `threads` threads of a pool."""

    def __init__(
        self,
        images: Mapping[int, memoryview],
        entries: Mapping[Entry, TensorSpan],
        pool: Executor,
        threads: int,
    ) -> None:
        self._images = images
        self._leaves: dict[Entry, list[str]] = {}
        self._batches = deque(self._share_out(entries))
        self.futures: list[Future[None]] = [pool.submit(self._work) for _ in range(min(threads, len(self._batches)))]

    def _share_out(self, entries: Mapping[Entry, TensorSpan]) -> Iterator[list[_Leaf]]:
        batch: list[_Leaf] = []
        batch_bytes = 0
        for entry, span in entries.items():
            begin, end = span.begin, span.end
            self._leaves[entry] = [""] * max(1, -(-(end - begin) // LEAF_BYTES))
            for number in range(len(self._leaves[entry])):
                leaf_end = min(begin + LEAF_BYTES, end)
                batch.append((entry, number, begin, leaf_end))
                batch_bytes += leaf_end - begin
                begin = leaf_end
                if batch_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_LEAVES:
                    yield batch
                    batch, batch_bytes = [], 0
        if batch:
            yield batch

    def _work(self) -> None:
        while True:
            try:
                batch = self._batches.popleft()
            except IndexError:
                return
            for entry, number, begin, end in batch:
                self._leaves[entry][number] = digest(self._images[entry.rank][begin:end])

    def found(self) -> dict[Entry, TensorDigest]:
        """Return the digests; the futures have to be done."""
        return {entry: of_leaves(leaves) for entry, leaves in self._leaves.items()}
